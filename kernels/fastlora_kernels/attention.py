"""Outputs of a layer's attention that backward is given instead of computing them again.

    keep = Keep(put)
    with keep.around():             # forward, without a graph
        attention(x)                # an `Attention` in a module's place
    with Give(keep.entries, tensors).around():
        attention(x)                # backward: with a graph, and without the expensive part

Kept are the outputs of LoRA layers that our op serves (q, k, v, o) and of the attention operator, with the
log-sum-exp that its backward reads. What lies between them is cheap: norms, rotary embeddings, reshapes. An
operator that draws random numbers for dropout is not kept, nor one that is not among OPERATORS: they are made again.
Selective activation recomputation, Korthikanti et al. 2022 (arXiv:2205.05198), section 5, turned round: there attention
was large and cheap and the MLP was kept; fused attention is small and dear.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_flash_attention_forward", "aten::_efficient_attention_forward", "aten::_cudnn_attention_forward",
        "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "xformers_flash::flash_fwd",
        "xformers_flash3::flash_fwd",
    }
)  # fmt: skip
"""PyTorch's, which scaled_dot_product_attention chooses among, flash-attn's, and xformers' copies of it (the third
version on Hopper)."""
SMALL = 256
"""Numbers; what has no more is kept as it is, and not copied to the host: the random generator's state, say."""


class Entry(NamedTuple):
    """What one operator gave."""

    operator: Any
    outputs: tuple[Any, ...]
    """With a `_Place` for every tensor that was put away."""


class _Place(NamedTuple):
    among: int


class Keep:
    """Takes what attention makes. `put`: gets each tensor, in the order in which backward will want them; by the end
    of the region it must not be written to."""

    def __init__(self, put: Callable[[torch.Tensor], None]) -> None:
        self.put, self.entries, self._count = put, list[Entry](), 0

    def around(self) -> Any:
        return _waiting(self)

    def take(self, operator: Any, outputs: Sequence[Any], *, own: bool = False) -> None:
        """`own`: nobody writes to them; of others a copy is kept, as rotary embeddings may be made in place."""
        kept = []
        for output in outputs:
            if isinstance(output, torch.Tensor) and output.numel() > SMALL:
                self.put(output if own else output.clone())
                kept.append(_Place(self._count))
                self._count += 1
            else:
                kept.append(output)
        self.entries.append(Entry(operator, tuple(kept)))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = func(*_with_log_sum_exp(func, args), **kwargs)
        self.take(func, outputs, own=True)
        return outputs


class Give:
    """Gives what a Keep took, in order. Once something else is asked for, nothing more: all is computed again."""

    def __init__(self, entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> None:
        self.entries, self.tensors = list(entries), tensors
        self.given, self._missed = set[str](), set[str]()

    @property
    def whole(self) -> frozenset[str]:
        """Names of the operators of which none was computed again."""
        return frozenset(self.given - self._missed)

    def around(self) -> Any:
        return _waiting(self)

    def next(self, operator: Any) -> tuple[Any, ...] | None:
        if not self.entries or self.entries[0].operator != operator:
            self.entries = []
            self._missed.add(name_of(operator))
            return None
        self.given.add(name_of(operator))
        outputs = self.entries.pop(0).outputs
        return tuple(self.tensors[o.among] if isinstance(o, _Place) else o for o in outputs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self.next(func)
        return func(*args, **kwargs) if given is None else given


def name_of(operator: Any) -> str:
    """As in OPERATORS; of our op, its class's."""
    schema = getattr(operator, "_schema", None)
    return str(operator.__name__ if schema is None else schema.name)


class _Thread(threading.local):
    waiting: Keep | Give | None = None
    """Of the region that is computed."""
    now: Keep | Give | None = None
    """The same within its attention."""


_thread = _Thread()


@contextmanager
def _waiting(one: Keep | Give) -> Iterator[None]:
    before = _thread.waiting, _thread.now
    _thread.waiting, _thread.now = one, None
    try:
        yield
    finally:
        _thread.waiting, _thread.now = before


def given(operator: Any) -> tuple[Any, ...] | None:
    """The outputs of one of our ops, where it is attention's and they were kept."""
    now = _thread.now
    return now.next(operator) if isinstance(now, Give) else None


def taken(operator: Any, outputs: Sequence[torch.Tensor]) -> None:
    """Keep the outputs of one of our ops, where they are attention's and wanted."""
    if isinstance(_thread.now, Keep):
        _thread.now.take(operator, outputs)


class _Operators(TorchDispatchMode):
    """Sees the attention operator beneath autograd, which goes on to make the same graph of what comes back."""

    def __init__(self, one: Keep | Give) -> None:
        super().__init__()
        self.one = one

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func._schema.name in OPERATORS and not _drops(func, args, kwargs or {}):
            return self.one.run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _drops(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))
    return False


def _with_log_sum_exp(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What backward reads, which without a graph nobody asks for."""
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("compute_log_sumexp") if "compute_log_sumexp" in names else len(args)
    return (*args[:place], True, *args[place + 1 :]) if place < len(args) else args


class Attention:
    """An attention's forward, inside of its hooks, that keeps its outputs where its region asks for it."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self.module = module
        self.own = forward
        """The instance's own; None: its class's, whichever that is by then."""

    @property
    def func(self) -> Any:
        """Named as a partial names it."""
        cls: Any = type(self.module)
        return self.own or cls.forward.__get__(self.module)

    @torch.compiler.disable  # a compiled layer ends and begins again around it
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        one = _thread.waiting
        before = _thread.now
        _thread.now = one
        try:
            with nullcontext() if one is None else _Operators(one):
                return self.func(*args, **kwargs)
        finally:
            _thread.now = before
