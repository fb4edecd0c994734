"""LoRA kernels for any PEFT model. Works without fastlora; imports nothing from it.

from fastlora_kernels import attach, attach_head, detach, detach_head
print(attach(model))          # LoRA layers and gated MLPs
reason = attach_head(model)   # the loss, with an adapter on the output layer or without

from fastlora_kernels import keep_layers, recompute_layers
recompute_layers(model, ["layer"] * 32, offload=True)   # gradient checkpointing, layer by layer
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora_kernels.apply import Attached, attach, detach
    from fastlora_kernels.dense import DenseWeights
    from fastlora_kernels.layers.head import attach_head, detach_head
    from fastlora_kernels.ops.dora_linear import dora_linear
    from fastlora_kernels.ops.embedding import lora_embedding
    from fastlora_kernels.ops.glu import glu, glu_lora_linear
    from fastlora_kernels.ops.head_loss import lora_head_loss
    from fastlora_kernels.ops.lora_linear import lora_linear, lora_linears
    from fastlora_kernels.recompute import keep_layers, recompute_layers

_HOMES = {
    "Attached": "apply",
    "DenseWeights": "dense",
    "attach": "apply",
    "attach_head": "layers.head",
    "detach": "apply",
    "detach_head": "layers.head",
    "dora_linear": "ops.dora_linear",
    "glu": "ops.glu",
    "glu_lora_linear": "ops.glu",
    "keep_layers": "recompute",
    "lora_embedding": "ops.embedding",
    "lora_head_loss": "ops.head_loss",
    "lora_linear": "ops.lora_linear",
    "lora_linears": "ops.lora_linear",
    "recompute_layers": "recompute",
}
__all__ = [
    "Attached", "DenseWeights", "attach", "attach_head", "detach", "detach_head", "dora_linear", "glu",
    "glu_lora_linear", "keep_layers", "lora_embedding", "lora_head_loss", "lora_linear", "lora_linears",
    "recompute_layers",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Found on first use: importing the package alone loads neither torch nor peft."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
