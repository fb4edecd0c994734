"""4-bit weights dequantized once for all micro-batches between two steps of the optimizer.

    weights = DenseWeights(layers)
    with weights.used():      # forward and backward
        ...
    weights.refresh()         # once the adapters have changed

Between two steps neither W nor s B A changes, so that each micro-batch makes the same matrix to the last bit, twice or
three times. Kept it takes 2 bytes a weight (8B: 14 GB). Only while `used` is open: a call that knows nothing of
the steps, an evaluation or an answer, makes its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastlora_kernels.ops.dequantize import Fold, dequantize
from fastlora_kernels.ops.four_bit import FourBit

_now: DenseWeights | None = None
"""Not one for each thread: backward runs in a thread of its own."""


class DenseWeights:
    """Of the 4-bit weights within `modules`, those that are asked for while it is used. All get their memory with the
    first of them: taken one by one, between what a forward keeps, they would leave holes."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parameters = [one for module in modules for one in module.parameters()]
        self._wanted = {id(one): one for one in parameters if FourBit.of(one) is not None}
        self._room: dict[int, torch.Tensor] = {}
        self._folds: dict[int, Fold | None] = {}
        """Of the matrices that were made by now."""

    def __len__(self) -> int:
        """How many matrices there are by now."""
        return len(self._folds)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it a matrix is made once. It stays what it is until `refresh`, whatever becomes of its adapter."""
        global _now
        before, _now = _now, self
        try:
            yield
        finally:
            _now = before

    def refresh(self) -> None:
        """Make each anew, in its place, of its adapter as that is now."""
        for name, fold in self._folds.items():
            room_NK = self._room[name]
            dequantize(_four_bit(self._wanted[name]), room_NK.dtype, fold, out=room_NK)

    def forget(self) -> None:
        """Give their memory back."""
        self._folds.clear()
        self._room.clear()

    def matrix(self, weight: FourBit, dtype: torch.dtype, fold: Fold | None) -> torch.Tensor | None:
        """(N, K), of an earlier call or made now; None: not to be kept, or kept as another: in another type, with
        another adapter in it, or with one where there is none now (which goes by the number of tokens)."""
        name = id(weight.source)
        if name not in self._wanted:
            return None
        made = name in self._folds
        # What is no parameter may be another tensor at the next call.
        if not made and fold and not all(isinstance(one, nn.Parameter) for one in fold[:2]):
            return None
        if not self._room:
            self._room = {
                each: torch.empty(_four_bit(one).shape, dtype=dtype, device=one.device)
                for each, one in self._wanted.items()
            }
        room_NK = self._room[name]
        if room_NK.dtype != dtype:
            return None
        if not made:
            dequantize(weight, dtype, fold, out=room_NK)
            self._folds[name] = fold
        return room_NK if _same(self._folds[name], fold) else None


def _four_bit(parameter: Any) -> FourBit:
    """Of one that was found to be such."""
    found = FourBit.of(parameter)
    assert found is not None
    return found


def _same(one: Fold | None, other: Fold | None) -> bool:
    """Whether it is the same adapter, though perhaps not the same Python object: a model may have several on one
    weight."""
    if one is None or other is None:
        return one is other
    places = [[matrix.data_ptr() for matrix in fold[:2]] for fold in (one, other)]
    return places[0] == places[1] and one[2] == other[2]


def kept_matrix(weight: FourBit, dtype: torch.dtype, fold: Fold | None) -> torch.Tensor | None:
    """Of the weights that are used now, if any; see DenseWeights.matrix."""
    return None if _now is None else _now.matrix(weight, dtype, fold)
