"""PEFT's LoRA layer on a linear base, with our op as its forward.

A served layer gets one of the classes below and nothing else; what can change from call to call is looked at on
every call.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from fastlora_kernels.bnb_or_not import BaseLinear4bit, Linear4bit, Params4bit
from fastlora_kernels.ops.dequantize import FourBit
from fastlora_kernels.ops.dora_linear import dora_linear
from fastlora_kernels.ops.lora_linear import lora_linear

Parts = tuple[nn.Linear, nn.Linear, nn.Linear, float, torch.Tensor | None]
"""Base layer, A, B, scaling and, with DoRA, the magnitude."""


class AttachedLinear(Linear):  # type: ignore[misc]  # peft is untyped
    """PEFT's layer, with our op as its forward where that gives PEFT's result."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., K) -> (..., N), in the autocast dtype or else in x's."""
        parts = parts_of(self)
        if not (args or kwargs or isinstance(parts, str)):
            base, down, up, *_ = parts
            dtype = _compute_dtype(x, base.weight, base.bias, down.weight, up.weight)
            if dtype is not None:
                # What autocast does. The op casts A and B itself and returns their gradients in their own dtype.
                return _op(parts, x.to(dtype), base.weight.to(dtype))
        return Linear.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]


class AttachedLinear4bit(Linear4bit):  # type: ignore[misc]
    """The same on a 4-bit base, which computes in its own compute_dtype and answers in x's dtype."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        parts = parts_of(self)
        if not (args or kwargs or isinstance(parts, str)):
            base, down, up, *_ = parts
            dtype = _compute_dtype(x, down.weight, up.weight)
            if dtype is not None and dtype == base.compute_dtype:
                return _op(parts, x.to(dtype), base.weight).to(x.dtype)
        return Linear4bit.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]


def _op(parts: Parts, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    base, down, up, scaling, magnitude = parts
    bias = None if base.bias is None else base.bias.to(x.dtype)
    if magnitude is None:
        return lora_linear(x, weight, bias, down.weight, up.weight, scaling)
    return dora_linear(x, weight, bias, down.weight, up.weight, magnitude, scaling)


ATTACHED = {Linear: AttachedLinear, Linear4bit: AttachedLinear4bit}
DETACHED = {ours: theirs for theirs, ours in ATTACHED.items()}


def never(layer: Any) -> str | None:
    """Why this layer cannot be served whatever its state; None if it can."""
    peft = DETACHED.get(type(layer), type(layer))
    if peft not in ATTACHED:
        return f"layer is a {type(layer).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if type(layer.base_layer) is not (BaseLinear4bit if peft is Linear4bit else nn.Linear):
        return f"base layer is a {type(layer.base_layer).__name__}"
    return None


def parts_of(layer: Any, training: bool = False) -> Parts | str:
    """The layer's parts as they now are, or why PEFT must serve the layer in its present state.

    `training` counts dropout as active although the layer may be in eval mode.
    """
    if layer.disable_adapters:
        return "adapter disabled"
    if layer.merged:
        return "adapter merged"
    lora_a = layer.lora_A
    adapters = [name for name in layer.active_adapters if name in lora_a]
    if len(adapters) != 1:
        return f"{len(adapters)} active adapters"
    (adapter,) = adapters
    magnitude = None
    if adapter in layer.lora_variant:
        if type(layer.lora_variant[adapter]) is not DoraLinearVariant:
            return f"variant {type(layer.lora_variant[adapter]).__name__}"
        magnitude = layer.lora_magnitude_vector[adapter].weight
        if layer.base_layer.in_features % 2:
            return "DoRA on an odd number of inputs"
    dropout = layer.lora_dropout[adapter]
    if type(dropout) is not nn.Identity and (
        type(dropout) is not nn.Dropout or (dropout.p > 0 and (training or dropout.training))
    ):
        return "dropout in training"
    base, down, up = layer.base_layer, lora_a[adapter], layer.lora_B[adapter]
    if not (_plain(base) and _plain(down) and _plain(up)):
        return "hooks or special weights on its base or adapter"
    if down.bias is not None or up.bias is not None:
        return "bias in the adapter"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    if type(base) is BaseLinear4bit:
        if FourBit.of(base.weight) is None:
            return "4-bit weight not quantized yet, or of another layout"
        if base.weight.device.type == "cpu" and "FASTLORA_KERNELS" not in os.environ:
            return "4-bit weight on a CPU"  # the reference is slower than bitsandbytes there
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "base layer is trained too"  # the op gives W and b no gradient
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, float | int):
        return "scaling is not a number"
    return base, down, up, scaling, magnitude


def _plain(linear: nn.Module) -> bool:
    """Whether calling `linear` is x W^T + b and no more.

    Offloading, sharding and quantization come as hooks, a replaced forward, or tensors of another class.
    """
    return (type(linear), type(linear.weight)) in (
        (nn.Linear, nn.Parameter),
        (BaseLinear4bit, Params4bit),
    ) and not (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or "forward" in vars(linear)
    )


def _compute_dtype(x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.dtype | None:
    """The one dtype in which PEFT would compute here; None if there are several, or x is a special tensor."""
    device = x.device.type
    if type(x) not in (torch.Tensor, nn.Parameter) or device not in ("cpu", "cuda"):
        return None
    dtypes = {x.dtype, *(tensor.dtype for tensor in parameters if tensor is not None)}
    if torch.is_autocast_enabled(device):
        # Autocast leaves float64 alone.
        return None if torch.float64 in dtypes else torch.get_autocast_dtype(device)
    return x.dtype if len(dtypes) == 1 else None
