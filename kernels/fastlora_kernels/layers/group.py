"""LoRA layers that are given the same x one after the other (q, k, v; gate, up) run as one op.

No forward of a model is changed for it: the first of them to be called computes the outputs of all, and the others
find theirs waiting, if they are called with the very same x in the very same state. Else each runs alone. What
torch.compile traces cannot wait; there it takes a caller that has all of them at hand (see `outputs_of`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C import DisableTorchFunctionSubclass

from fastlora_kernels.layers.common import hooked, own
from fastlora_kernels.layers.fallback import ungrouped
from fastlora_kernels.layers.linear import (
    DETACHED,
    GROUP,
    AttachedLinear4bit,
    Parts,
    compute_dtype,
    parts_of,
)
from fastlora_kernels.ops import registered
from fastlora_kernels.ops.lora_linear import lora_linears

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
)
MISSES = 3
"""So often may outputs be left behind, until the layers run alone for good: they are not what they seemed."""


class _Waiting(NamedTuple):
    x: torch.Tensor
    state: tuple[Any, ...]
    outputs: dict[int, tuple[tuple[Any, ...], torch.Tensor]]
    """By the id of a layer: what it was computed with, and its output."""


class Group:
    """Some layers on the same x. Held by each of them, holds none of them; a copy of a model has no groups."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.names = "+".join(layers)
        self._layers = [weakref.ref(layer) for layer in layers.values()]
        self._waiting: _Waiting | None = None
        self._misses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def output(
        self, layer: nn.Module, x: torch.Tensor, parts: Parts, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The output of `layer`, whose parts these are, for x computed in `dtype`; None if it must run alone."""
        # torch.compile cannot follow what waits; inference tensors do not count their changes.
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        waiting, state = self._waiting, _state(x, dtype)
        if waiting is not None:
            if waiting.x is x and waiting.state == state:
                return self._take(waiting, layer, parts)
            self._waiting = None
            self._misses += 1
        if self._misses >= MISSES:
            ungrouped(layer, self.names)
            return None
        members: list[tuple[nn.Module, Parts]] = []
        for reference in self._layers:
            other = reference()
            if other is layer:
                members.append((layer, parts))
            elif other is not None and type(other) in DETACHED:
                found = parts_of(other)
                if not isinstance(found, str) and _joins(found, x, dtype):
                    members.append((other, found))
        if len(members) < 2 or all(member is not layer for member, _ in members):
            return None
        ys = lora_linears(x.to(dtype), [found.projection() for _, found in members])
        outputs = {
            id(member): (_stamp(found), y) for (member, found), y in zip(members, ys, strict=True)
        }
        _, y = outputs.pop(id(layer))
        self._waiting = _Waiting(x, state, outputs)
        return y

    def _take(self, waiting: _Waiting, layer: nn.Module, parts: Parts) -> torch.Tensor | None:
        stamp, y = waiting.outputs.pop(id(layer), (None, None))
        if not waiting.outputs:
            self._waiting = None
            self._misses = 0
        return y if stamp == _stamp(parts) else None


def outputs_of(layers: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor]:
    """What calling each of `layers` on x gives, LoRA layers or others. Where torch.compile traces it, those that are
    served alike are one op; in eager the first that is called sees to that."""
    if not torch.compiler.is_compiling():
        return [layer(x) for layer in layers]
    together = []
    for place, layer in enumerate(layers):
        if type(layer) in DETACHED and not hooked(layer):
            parts = parts_of(layer)
            if not isinstance(parts, str) and parts.magnitude is None:
                dtype = compute_dtype(parts, x)
                if dtype is not None and registered.serves(parts.projection()):
                    together.append((place, layer, parts, dtype))
    if len(together) < 2 or len({dtype for *_, dtype in together}) > 1:
        return [layer(x) for layer in layers]
    ys = registered.lora_linears(
        x.to(together[0][3]), [parts.projection() for _, _, parts, _ in together]
    )
    found = {
        place: y.to(x.dtype) if type(layer) is AttachedLinear4bit else y
        for (place, layer, *_), y in zip(together, ys, strict=True)
    }
    return [found[n] if n in found else layer(x) for n, layer in enumerate(layers)]


def group_siblings(model: nn.Module) -> list[str]:
    """Let the served layers of `model` that share an x run as groups. Returns each group's names, joined by +.

    Without those that have DoRA, whose own op takes one layer (see _joins).
    """
    found = []
    for parent in model.modules():
        for names in SIBLINGS:
            layers: dict[str, Any] = {}
            for name in names:
                child = parent._modules.get(name)
                if type(child) in DETACHED:
                    parts = parts_of(child, training=True)
                    if not isinstance(parts, str) and parts.magnitude is None:
                        layers[name] = child
            if len(layers) > 1 and len({layer.in_features for layer in layers.values()}) == 1:
                group = Group(layers)
                for layer in layers.values():
                    vars(layer)[GROUP] = group
                found.append(group.names)
    return found


def drop_waiting(model: nn.Module) -> None:
    """Let go of outputs that wait for a layer which will not be called: the forward that made them was broken off."""
    for module in model.modules():
        if isinstance(group := vars(module).get(GROUP), Group):
            group._waiting = None


def _joins(parts: Parts, x: torch.Tensor, dtype: torch.dtype) -> bool:
    return parts.magnitude is None and compute_dtype(parts, x) == dtype


def _state(x: torch.Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    return x._version, x.requires_grad, x.data_ptr(), torch.is_grad_enabled(), dtype


def _stamp(parts: Parts) -> tuple[Any, ...]:
    """Equal for two calls only if nothing was replaced or written to in between."""
    base, down, up, scaling, _, dropout, _ = parts
    with DisableTorchFunctionSubclass():
        parameters = own(base, "weight"), own(base, "bias"), own(down, "weight")
        tensors = [
            None if tensor is None else (id(tensor), tensor._version, tensor.data_ptr())
            for tensor in (*parameters, own(up, "weight"), own(up, "bias"))
        ]
    return (id(base), id(down), id(up), scaling, dropout, *tensors)
