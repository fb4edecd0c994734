"""Our op in place of the forward of a PEFT model's LoRA layers.

    attached = attach(model)
    print(attached)     # what is served, what is left to PEFT and why
    detach(model)

A served layer gets another class and nothing else: same parameters, same state dict, no references kept, so
that copies, saved adapters, merging and weights that are moved or replaced all work as before.

On a model that Unsloth loaded, its fused paths go past the forward of the LoRA layers; what is served there
are the layers that it leaves to PEFT (q and v without k, a base with bias, other architectures).
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from fastlora_kernels.bnb_or_not import BaseLinear4bit, Linear4bit, Params4bit
from fastlora_kernels.ops.dequantize import FourBit
from fastlora_kernels.ops.dora_linear import dora_linear
from fastlora_kernels.ops.lora_linear import lora_linear

Kinds = Mapping[str, int]
_Parts = tuple[nn.Linear, nn.Linear, nn.Linear, float, torch.Tensor | None]
"""Base layer, A, B, scaling and, with DoRA, the magnitude."""


@dataclass(frozen=True)
class Attached:
    """What `attach` found, in LoRA layers per kind; a kind is the last part of a name, as q_proj."""

    served: Kinds
    only_autocast: Kinds
    """Of those served: base and adapter differ in dtype, so that PEFT keeps them outside autocast."""
    left: Mapping[str, Kinds]
    """Reason -> kinds that PEFT serves."""

    def lines(self) -> Iterator[str]:
        total = _total(self.served) + sum(_total(kinds) for kinds in self.left.values())
        yield f"fastlora serves {_total(self.served)} of {total} LoRA layers{_listed(self.served)}"
        if self.only_autocast:
            yield f"  under autocast only: {_total(self.only_autocast)}{_listed(self.only_autocast)}"
        for reason, kinds in self.left.items():
            yield f"  left to PEFT, {reason}: {_total(kinds)}{_listed(kinds)}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def attach(model: nn.Module) -> Attached:
    """Serve every LoRA layer of `model` that our op can serve; leave the others as they are.

    Served: PEFT's LoRA layers on a plain, frozen `torch.nn.Linear` or a bitsandbytes `Linear4bit`, one active
    adapter, DoRA but no other variant, no bias in the adapter, no dropout in training. What can change from
    call to call is looked at on every call, and PEFT's own forward runs where it does not fit: adapters disabled,
    merged or switched, `adapter_names`, dropout, hooks, dtypes. Outside autocast, base, adapter and x must be of one
    dtype: there PEFT computes a float32 adapter in float32, and in x's bfloat16 dA and dB would be off by 0.2 %.

    A reason in the report that can pass (a disabled adapter, dropout) holds for now and for training. May be
    called again, for a new report. A gradient of a gradient through a served layer raises RuntimeError.
    """
    served: Counter[str] = Counter()
    only_autocast: Counter[str] = Counter()
    left: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        kind = name.rpartition(".")[2] or type(layer).__name__
        found: str | _Parts | None = _never(layer)
        if found is None:
            layer.__class__ = ATTACHED.get(type(layer), type(layer))
            found = _parts(layer, training=True)
        if isinstance(found, str):
            left[found][kind] += 1
            continue
        served[kind] += 1
        base, down, up, *_ = found
        base_dtype = base.compute_dtype if type(base) is BaseLinear4bit else base.weight.dtype
        if not base_dtype == down.weight.dtype == up.weight.dtype:
            only_autocast[kind] += 1
    return Attached(dict(served), dict(only_autocast), {why: dict(n) for why, n in left.items()})


def detach(model: nn.Module) -> None:
    """Give every layer of `model` PEFT's own forward again."""
    for layer in model.modules():
        if type(layer) in DETACHED:
            layer.__class__ = DETACHED[type(layer)]


class AttachedLinear(Linear):  # type: ignore[misc]  # peft is untyped
    """PEFT's layer, with our op as its forward where that gives PEFT's result."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., K) -> (..., N), in the autocast dtype or else in x's."""
        parts = _parts(self)
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
        parts = _parts(self)
        if not (args or kwargs or isinstance(parts, str)):
            base, down, up, *_ = parts
            dtype = _compute_dtype(x, down.weight, up.weight)
            if dtype is not None and dtype == base.compute_dtype:
                return _op(parts, x.to(dtype), base.weight).to(x.dtype)
        return Linear4bit.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]


def _op(parts: _Parts, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    base, down, up, scaling, magnitude = parts
    bias = None if base.bias is None else base.bias.to(x.dtype)
    if magnitude is None:
        return lora_linear(x, weight, bias, down.weight, up.weight, scaling)
    return dora_linear(x, weight, bias, down.weight, up.weight, magnitude, scaling)


ATTACHED = {Linear: AttachedLinear, Linear4bit: AttachedLinear4bit}
DETACHED = {ours: theirs for theirs, ours in ATTACHED.items()}


def _never(layer: Any) -> str | None:
    """Why this layer cannot be served whatever its state; None if it can."""
    peft = DETACHED.get(type(layer), type(layer))
    if peft not in ATTACHED:
        return f"layer is a {type(layer).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if type(layer.base_layer) is not (BaseLinear4bit if peft is Linear4bit else nn.Linear):
        return f"base layer is a {type(layer.base_layer).__name__}"
    return None


def _parts(layer: Any, training: bool = False) -> _Parts | str:
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


def _total(kinds: Kinds) -> int:
    return sum(kinds.values())


def _listed(kinds: Kinds) -> str:
    return f" ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if kinds else ""
