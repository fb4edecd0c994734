"""PEFT's LoRA layer on an embedding, with our op as its forward."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding
from torch import nn

from fastlora_kernels.layers import common
from fastlora_kernels.layers.fallback import MORE_THAN_X, no_dtype, unserved
from fastlora_kernels.ops.embedding import lora_embedding

Parts = tuple[nn.Embedding, nn.Parameter, nn.Parameter, float]
"""Base layer, A (R, V), B (K, R), scaling."""


class AttachedEmbedding(Embedding):  # type: ignore[misc]  # peft is untyped
    """PEFT's layer, with our op as its forward where that gives PEFT's result."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (...) token ids -> (..., K), in the base's dtype."""
        parts = parts_of(self)
        if args or kwargs:
            why_not = MORE_THAN_X
        elif isinstance(parts, str):
            why_not = parts
        else:
            base, a, b, scaling = parts
            dtype = _compute_dtype(x, base.weight, a, b)
            if dtype is not None:
                return lora_embedding(
                    x, base.weight, a, b, scaling, padding_idx=base.padding_idx, dtype=dtype
                )
            why_not = no_dtype(x, "base and adapter")
        unserved(self, why_not)
        return Embedding.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]


ATTACHED: dict[type, type] = {Embedding: AttachedEmbedding}
DETACHED = {ours: theirs for theirs, ours in ATTACHED.items()}


def never(layer: Any) -> str | None:
    """Why this layer cannot be served whatever its state; None if it can."""
    return common.never(layer, DETACHED, {Embedding: nn.Embedding})  # Gemma's are scaled


def parts_of(layer: Any, training: bool = False) -> Parts | str:
    """The layer's parts as they now are, or why PEFT must serve the layer in its present state.

    `training` is for the layers that look at dropout: PEFT has none here.
    """
    adapters = common.active_adapters(layer, layer.lora_embedding_A)
    if isinstance(adapters, str):
        return adapters
    (adapter,) = adapters
    if adapter in layer.lora_variant:
        return f"variant {type(layer.lora_variant[adapter]).__name__}"
    base = layer.base_layer
    if common.hooked(base) or layer.tp_layer is not None or type(base.weight) is not nn.Parameter:
        return "hooks or special weights on its base"
    if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
        return "max_norm, scale_grad_by_freq or sparse"
    if base.weight.requires_grad:
        return "base layer is trained too"
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, float | int):
        return "scaling is not a number"
    return base, layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], scaling


def mixed(parts: Parts) -> bool:
    """Whether base and adapter differ in dtype."""
    base, a, b, _ = parts
    return not base.weight.dtype == a.dtype == b.dtype


def _compute_dtype(ids: torch.Tensor, *parameters: torch.Tensor) -> torch.dtype | None:
    """In which PEFT would take the product here; None if the op would add it in another dtype than PEFT does."""
    device = ids.device.type
    if type(ids) is not torch.Tensor or device not in ("cpu", "cuda"):
        return None
    dtypes = {tensor.dtype for tensor in parameters}
    if torch.is_autocast_enabled(device):
        return None if torch.float64 in dtypes else torch.get_autocast_dtype(device)
    return dtypes.pop() if len(dtypes) == 1 else None
