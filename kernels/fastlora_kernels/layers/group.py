"""LoRA layers that are given the same x one after the other (q, k, v; gate, up) run as one op.

No forward of a model is changed for it: the first of them to be called computes the outputs of all, and the others
find theirs waiting, if they are called with the very same x in the very same state. Else each runs alone. Where
torch.compile traces it that state cannot be looked at: there a caller must have all of them at hand (`outputs_of`), or
the source of the forward that calls them show that nothing happens in between (`trace_together`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C import DisableTorchFunctionSubclass, _current_graph_task_id
from torch._C._autograd import _top_saved_tensors_default_hooks

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
from fastlora_kernels.layers.source import in_order, worker
from fastlora_kernels.ops import registered
from fastlora_kernels.ops.lora_linear import lora_linears

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
)
MISSES = 3
"""So often may outputs be left behind, until the layers run alone for good: they are not what they seemed."""
CHECKPOINT = "torch.utils.checkpoint"


class _Waiting(NamedTuple):
    x: weakref.ref[torch.Tensor]
    state: tuple[Any, ...]
    outputs: dict[int, tuple[tuple[Any, ...], torch.Tensor]]
    """By the id of a layer: what it was computed with, and its output."""


class Group:
    """Some layers on the same x. Held by each of them, holds none of them; a copy of a model has no groups."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.names = "+".join(layers)
        self._layers = [weakref.ref(layer) for layer in layers.values()]
        self._in_order: list[weakref.ref[nn.Module]] = []
        self._waiting: _Waiting | None = None
        self._traced: tuple[torch.Tensor, list[torch.Tensor | None]] | None = None
        self._misses = 0
        self._alone = False
        self._to_repeat: weakref.WeakSet[Any] = weakref.WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def output(
        self, layer: nn.Module, x: torch.Tensor, parts: Parts, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The output of `layer`, whose parts these are, for x computed in `dtype`; None if it must run alone."""
        if x.is_inference():  # which does not count its changes
            return None
        saving = _top_saved_tensors_default_hooks(True) if torch.is_grad_enabled() else None
        pack, unpack = saving or (None, None)
        # Each forward and each repetition under checkpointing has hooks of its own: neither takes what the other left.
        state = _state(x, dtype, pack)
        if self._waiting is not None:
            if self._waiting.x() is x and self._waiting.state == state:
                return self._take(self._waiting, layer, parts)
            self._miss()
        if self._run_alone(unpack):
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
        # What a repetition leaves would hold all of it, until the next call: it goes with x.
        gone = weakref.WeakMethod(self._miss)
        here = weakref.ref(x, lambda x: (miss := gone()) and miss(x))
        self._waiting = _Waiting(here, state, outputs)
        return y

    def follow(self, layers: Sequence[nn.Module]) -> None:
        """`layers` in the order in which traced code calls them on one x, with nothing in between."""
        mine = [layer for layer in layers if vars(layer).get(GROUP) is self]
        self._in_order = [weakref.ref(layer) for layer in mine]

    def traced(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """`output` where torch.compile traces it: by the order alone (see `trace_together`)."""
        layers = [reference() for reference in self._in_order]
        place = next((n for n, other in enumerate(layers) if other is layer), -1)
        if place == 0:
            alone = any(other is None or hooked(other) for other in layers)
            ys = [None] if alone else _as_one_op(layers, x)
            self._traced = None if ys[0] is None else (x, ys)
        if place < 0 or self._traced is None or self._traced[0] is not x:
            return None
        _, ys = self._traced
        if all(y is None for y in ys[place + 1 :]):
            self._traced = None
        return ys[place]

    def _run_alone(self, unpack: Any) -> bool:
        """Whether the layers run one by one for good. `unpack`: the hook by which saved tensors come back, if any.

        Checkpointing that is not reentrant repeats a forward in backward, which must save as many tensors then. So that
        is not decided while there is a graph that may be repeated: its saved tensors hold that hook.
        """
        if not self._alone and self._misses >= MISSES and not self._to_repeat:
            self._alone = True
        in_backward = _current_graph_task_id() >= 0
        if not self._alone and not in_backward and getattr(unpack, "__module__", "") == CHECKPOINT:
            self._to_repeat.add(unpack)
        return self._alone

    def _miss(self, x: Any = None) -> None:
        """Outputs were left behind; `x`: the reference to a tensor that is gone."""
        if self._waiting is not None and (x is None or x is self._waiting.x):
            self._waiting = None
            self._misses += 1

    def let_go(self) -> None:
        """Of outputs that wait."""
        self._waiting = self._traced = None

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
    return [
        layer(x) if y is None else y.to(x.dtype) if type(layer) is AttachedLinear4bit else y
        for layer, y in zip(layers, _as_one_op(layers, x), strict=True)
    ]


def _as_one_op(layers: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor | None]:
    """Of those that are served alike, for torch.compile; None for a layer that has to run alone."""
    together = []
    for place, layer in enumerate(layers):
        if type(layer) in DETACHED and not hooked(layer):
            parts = parts_of(layer)
            if not isinstance(parts, str) and parts.magnitude is None:
                dtype = compute_dtype(parts, x)
                if dtype is not None and registered.serves(parts.weight, parts.dropout):
                    together.append((place, parts, dtype))
    outputs: list[torch.Tensor | None] = [None for _ in layers]
    if len(together) < 2 or len({dtype for *_, dtype in together}) > 1:
        return outputs
    ys = registered.lora_linears(
        x.to(together[0][2]), [parts.projection() for _, parts, _ in together]
    )
    for (place, *_), y in zip(together, ys, strict=True):
        outputs[place] = y
    return outputs


def group_siblings(model: nn.Module) -> list[str]:
    """Let the served layers of `model` that share an x run as groups. Returns each group's names, joined by +.

    Without those that have DoRA, whose own op takes one layer (see _joins). Groups that there were are gone.
    """
    for module in model.modules():
        vars(module).pop(GROUP, None)
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


def trace_together(model: nn.Module) -> None:
    """Let groups of `model`, which has them (see `group_siblings`), be one op in traced code too.

    For layers that are compiled each by itself, as unsloth's are: outputs that wait are state of the trace, which
    torch.compile refuses where checkpointing stands inside what it compiles.
    """
    order_in = functools.cache(_order_in)  # for now: as for MLPs' forms (layers/mlp.py)
    for parent in model.modules():
        cls: Any = type(parent)
        for names in SIBLINGS:
            there = tuple(name for name in names if name in parent._modules)
            if "forward" not in vars(parent) and (order := order_in(cls, there)):
                layers = [parent._modules[name] for name in order]
                for group in {vars(layer).get(GROUP) for layer in layers} - {None}:
                    group.follow(layers)  # type: ignore[union-attr]


def _order_in(cls: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    function = worker(cls.forward)
    return () if function is None else in_order(function, names)


def drop_waiting(model: nn.Module) -> None:
    """Let go of outputs that wait for a layer which will not be called: the forward that made them was broken off."""
    for module in model.modules():
        if isinstance(group := vars(module).get(GROUP), Group):
            group.let_go()


def _joins(parts: Parts, x: torch.Tensor, dtype: torch.dtype) -> bool:
    return parts.magnitude is None and compute_dtype(parts, x) == dtype


def _state(x: torch.Tensor, dtype: torch.dtype, saving: Any) -> tuple[Any, ...]:
    return x._version, x.requires_grad, x.data_ptr(), torch.is_grad_enabled(), dtype, saving


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
