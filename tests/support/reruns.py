"""CUDA graphs on a CPU: a record is the function itself, run again on the memory that it was recorded on.

It holds the function to what a graph demands: nothing waits, gradients stay where they were, what was recorded is not
asked anew, and recording computes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from fastlora_kernels import DenseWeights
from waits import Waits

from fastlora.train import graphs

Inputs = Mapping[str, torch.Tensor]


class Reruns:
    """A graphs.Recorder. `fail`: shape's number, from 0 on -> what recording it raises."""

    def __init__(self, fail: Mapping[int, Exception] | None = None) -> None:
        self.fail = dict(fail or {})
        self.warm_ups: list[bool] = []
        self.order: list[str] = []
        self.records = self.forgotten = 0

    def warm_up(
        self, function: Callable[[Inputs], torch.Tensor], inputs: Inputs, *, last: bool
    ) -> tuple[torch.Tensor, str]:
        self.warm_ups.append(last)
        self.order.append("warm up")
        with graphs.as_recorded() if last else contextlib.nullcontext(), Waits() as waits:
            loss = function(inputs)
        return loss, f"it waits ({waits.found[0]})" if last and waits.found else ""

    def record(
        self, function: Callable[[Inputs], torch.Tensor], inputs: Inputs
    ) -> Callable[[], torch.Tensor]:
        self.records += 1
        self.order.append("record")
        if error := self.fail.get(self.records - 1):
            raise error
        static = {name: tensor.data_ptr() for name, tensor in inputs.items()}
        made, kept = self.forgotten, torch.full((), float("nan"))

        def replay() -> torch.Tensor:
            assert made == self.forgotten, "a replay of a graph that is gone"
            assert static == {name: tensor.data_ptr() for name, tensor in inputs.items()}
            with graphs.as_recorded(), Waits(error=True):
                kept.copy_(function(inputs))
            return kept

        return replay

    def forget(self) -> None:
        self.forgotten += 1


class Recorders:
    """In place of the GPU's, for runs: the newest one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **named: Any) -> None:
        self.made: list[Reruns] = []
        monkeypatch.setattr(graphs, "can_record", lambda: True)

        def make() -> Reruns:
            self.made.append(Reruns(**named))
            return self.made[-1]

        monkeypatch.setattr(graphs, "CudaRecorder", make)

    @property
    def last(self) -> Reruns:
        return self.made[-1]


@contextlib.contextmanager
def never_recorded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shapes are static, and every step is computed as usual."""
    with monkeypatch.context() as patch:
        patch.setattr(
            graphs.Graphs, "__call__", lambda self, function, inputs, baked=None: function(inputs)
        )
        yield


def refreshes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices were made anew, each time that dense weights were."""
    refreshed: list[int] = []
    own = DenseWeights.refresh

    def refresh(weights: DenseWeights) -> None:
        refreshed.append(len(weights))
        own(weights)

    monkeypatch.setattr(DenseWeights, "refresh", refresh)
    return refreshed
