"""PEFT's LoRA layer on a linear base, with our op as its forward.

A served layer gets one of the classes below, and in its dict what was reported of it (layers/fallback.py) and the
group that it runs in (layers/group.py), if any; what can change from call to call is looked at on every call.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from fastlora_kernels.bnb_or_not import (
    BaseLinear4bit,
    BaseLinear8bit,
    Int8Params,
    Linear4bit,
    Linear8bit,
    Params4bit,
)
from fastlora_kernels.layers import common
from fastlora_kernels.layers.common import own
from fastlora_kernels.layers.fallback import MORE_THAN_X, no_dtype, unserved
from fastlora_kernels.ops import registered
from fastlora_kernels.ops.dora_linear import dora_linear
from fastlora_kernels.ops.eight_bit import EightBit
from fastlora_kernels.ops.four_bit import FourBit
from fastlora_kernels.ops.lora_linear import Projection, Weight, lora_linear

MAX_RANK = 256
GROUP = "_fastlora_group"
"""Where a layer's dict has its group."""


class Parts(NamedTuple):
    """A layer as it is at one call."""

    base: nn.Linear
    down: nn.Linear
    """A."""
    up: nn.Linear
    """B."""
    scaling: float
    magnitude: torch.Tensor | None
    """With DoRA."""
    dropout: float
    """0 outside training."""
    weight: Weight

    def projection(self) -> Projection:
        base, down, up, scaling, _, dropout, weight = self
        # The product of an 8-bit weight has it already.
        bias = None if isinstance(weight, EightBit) else own(base, "bias")
        a, b, beta = own(down, "weight"), own(up, "weight"), own(up, "bias")
        return Projection(weight, bias, a, b, scaling, beta, dropout)


class AttachedLinear(Linear):  # type: ignore[misc]  # peft is untyped
    """PEFT's layer, with our op as its forward where that gives PEFT's result."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., K) -> (..., N), in the autocast dtype or else in x's."""
        y = unserved(self, MORE_THAN_X) if args or kwargs else served(self, x)
        return Linear.forward(self, x, *args, **kwargs) if y is None else y  # type: ignore[no-any-return]


class AttachedLinear4bit(Linear4bit):  # type: ignore[misc]
    """The same on a 4-bit base, which computes in its own compute_dtype and answers in x's dtype."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        y = unserved(self, MORE_THAN_X) if args or kwargs else served(self, x)
        return Linear4bit.forward(self, x, *args, **kwargs) if y is None else y.to(x.dtype)  # type: ignore[no-any-return]


class AttachedLinear8bit(Linear8bit):  # type: ignore[misc]
    """The same on an 8-bit base, which computes in x's dtype."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        y = unserved(self, MORE_THAN_X) if args or kwargs else served(self, x)
        return Linear8bit.forward(self, x, *args, **kwargs) if y is None else y  # type: ignore[no-any-return]


ATTACHED: dict[type, type] = {
    Linear: AttachedLinear,
    Linear4bit: AttachedLinear4bit,
    Linear8bit: AttachedLinear8bit,
}
DETACHED = {ours: theirs for theirs, ours in ATTACHED.items()}
BASES = {Linear: nn.Linear, Linear4bit: BaseLinear4bit, Linear8bit: BaseLinear8bit}
WEIGHTS = {nn.Linear: nn.Parameter, BaseLinear4bit: Params4bit, BaseLinear8bit: Int8Params}


def served(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The layer's output by our op, in the dtype computed in; None if PEFT must serve this call.

    Where torch.compile traces it, by the op of ops/registered.py; with dropout or an 8-bit weight it stands outside
    the graph.
    """
    parts = parts_of(layer)
    if isinstance(parts, str):
        return unserved(layer, parts)
    dtype = compute_dtype(parts, x)
    if dtype is None:
        return unserved(layer, no_dtype(x, "base, adapter and x"))
    compiling = torch.compiler.is_compiling()
    if compiling and not registered.serves(parts.weight, parts.dropout):
        return _uncompiled(layer, x)  # type: ignore[no-any-return]
    if parts.magnitude is not None:
        if dtype is torch.float64:
            return unserved(layer, "DoRA in float64")  # its sums are in float32
        given = (
            x.to(dtype), parts.weight, parts.base.bias, parts.down.weight, parts.up.weight,
            parts.magnitude, parts.scaling,
        )  # fmt: skip
        if compiling:
            return registered.dora_linear(*given)
        return dora_linear(*given, parts.dropout)
    if (group := vars(layer).get(GROUP)) is not None:
        y = group.traced(layer, x) if compiling else group.output(layer, x, parts, dtype)
        if y is not None:
            return y  # type: ignore[no-any-return]
    # What autocast does. The op casts W, b, A and B itself and returns gradients in their own dtype.
    if compiling:
        return registered.lora_linear(x.to(dtype), parts.projection())
    return lora_linear(x.to(dtype), *parts.projection())


@torch.compiler.disable
def _uncompiled(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    return served(layer, x)


def never(layer: Any) -> str | None:
    """Why this layer cannot be served whatever its state; None if it can."""
    return common.never(layer, DETACHED, BASES)


def parts_of(layer: Any, training: bool = False) -> Parts | str:
    """The layer's parts as they now are, or why PEFT must serve the layer in its present state.

    `training` counts dropout as active although the layer may be in eval mode.
    """
    modules = layer._modules  # as in common.own
    lora_a = modules["lora_A"]
    adapters = common.active_adapters(layer, lora_a)
    if isinstance(adapters, str):
        return adapters
    (adapter,) = adapters
    base, down, up = modules["base_layer"], lora_a[adapter], modules["lora_B"][adapter]
    drop = modules["lora_dropout"][adapter]
    if not (_plain(base) and _plain(down) and _plain(up)) or common.hooked(drop):
        return "hooks or special weights on its base or adapter"
    if own(down, "bias") is not None:
        return "bias in the adapter's A"
    if own(up, "weight").shape[1] > MAX_RANK:
        return f"rank above {MAX_RANK}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, float | int):
        return "scaling is not a number"
    weight = weight_of(base)
    if isinstance(weight, str):
        return weight
    bias = own(base, "bias")
    if bias is not None and bias.requires_grad:
        return "base layer is trained too"  # the op gives W and b no gradient
    p = _dropout(drop, training)
    if p is None:
        return "dropout of another kind"
    magnitude = None
    if adapter in layer.lora_variant:
        if type(layer.lora_variant[adapter]) is not DoraLinearVariant:
            return f"variant {type(layer.lora_variant[adapter]).__name__}"
        if not (layer.training or training):
            p = 0.0  # PEFT's DoRA asks the layer, its dropout for LoRA itself
        if own(up, "bias") is not None:
            return "DoRA with a bias in the adapter"
        if isinstance(weight, EightBit):
            return "DoRA on an 8-bit weight"
        if base.in_features % 2:
            return "DoRA on an odd number of inputs"
        magnitude = layer.lora_magnitude_vector[adapter].weight
    return Parts(base, down, up, scaling, magnitude, p, weight)


def weight_of(base: Any) -> Weight | str:
    """The frozen weight for our op, or why it cannot be served."""
    if type(base) is BaseLinear4bit:
        quantized = FourBit.of(own(base, "weight"))
        if quantized is None:
            return "4-bit weight not quantized yet, or of another layout"
        # Not dispatch.wanted, whose cache torch.compile does not trace.
        if quantized.codes.device.type == "cpu" and not os.environ.get("FASTLORA_KERNELS"):
            return "4-bit weight on a CPU"  # the reference is slower than bitsandbytes there
        return quantized
    if type(base) is BaseLinear8bit:
        if base.state.has_fp16_weights or (base.state.CB is None and base.weight.CB is None):
            return "8-bit weight not quantized"
        return EightBit(base)
    weight: torch.Tensor = own(base, "weight")
    return "base layer is trained too" if weight.requires_grad else weight


def mixed(parts: Parts) -> bool:
    """Whether base and adapter differ in dtype. An 8-bit base has none of its own."""
    base: Any = parts.down if type(parts.base) is BaseLinear8bit else parts.base
    dtype: torch.dtype = base.compute_dtype if type(base) is BaseLinear4bit else base.weight.dtype
    return not dtype == parts.down.weight.dtype == parts.up.weight.dtype


def compute_dtype(parts: Parts, x: torch.Tensor) -> torch.dtype | None:
    """The one dtype in which PEFT would compute here; None if there are several, or x is a special tensor."""
    base, down, up, *_ = parts
    adapter = own(down, "weight"), own(up, "weight"), own(up, "bias")
    if type(base) is BaseLinear4bit:
        dtype = _one_dtype(x, *adapter)
        return dtype if dtype == base.compute_dtype else None
    if type(base) is BaseLinear8bit:
        dtype = _one_dtype(x, *adapter)
        return dtype if dtype == x.dtype else None
    return _one_dtype(x, own(base, "weight"), own(base, "bias"), *adapter)


def _one_dtype(x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.dtype | None:
    device = x.device.type
    if type(x) not in (torch.Tensor, nn.Parameter) or device not in ("cpu", "cuda"):
        return None
    dtypes = {x.dtype, *(tensor.dtype for tensor in parameters if tensor is not None)}
    if torch.is_autocast_enabled(device):
        # Autocast leaves float64 alone.
        return None if torch.float64 in dtypes else torch.get_autocast_dtype(device)
    return x.dtype if len(dtypes) == 1 else None


def _dropout(dropout: nn.Module, training: bool) -> float | None:
    """Its probability in this state; None for another kind of dropout."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or dropout.p >= 1:
        return None
    return dropout.p if training or dropout.training else 0.0


def _plain(linear: nn.Module) -> bool:
    """Whether calling `linear` is x W^T + b and no more.

    Offloading, sharding and quantization come as hooks, a replaced forward, or tensors of another class.
    """
    weight = vars(linear)["_parameters"].get("weight")
    return WEIGHTS.get(type(linear)) is type(weight) and not common.hooked(linear)
