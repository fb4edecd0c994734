"""Probes on a CPU, where there are none by default, and what they say that they took."""

from __future__ import annotations

from typing import Any

import pytest

from fastlora.train import probe
from fastlora.train.collate import ROW_LENGTHS
from fastlora.train.oom import Continuation


class Probes:
    """Each run within it probes. `peak_gib`: what PyTorch would have reserved, half of it for tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peak_gib: float = 4.0) -> None:
        self.tried: list[list[int]] = []
        """The lengths of the rows of each."""
        self.held: list[int] = []
        """The bytes that each held in the place of the optimizer's state."""
        monkeypatch.setattr(probe, "worth_it", lambda: True)
        monkeypatch.setattr(probe, "peak_gib", lambda: peak_gib)
        monkeypatch.setattr(probe, "peak_allocated_gib", lambda: peak_gib / 2)
        train, hold = Continuation.train, probe.Probe._hold_what_steps_do

        def seen(continuation: Continuation, forward: Any, batch: Any, **named: Any) -> Any:
            if continuation.probing:
                self.tried.append(list(batch[ROW_LENGTHS]))
            return train(continuation, forward, batch, **named)

        monkeypatch.setattr(Continuation, "train", seen)

        def holds(one: probe.Probe, *rest: Any) -> Any:
            held = hold(one, *rest)
            self.held.append(sum(tensor.nbytes for tensor in held))
            return held

        monkeypatch.setattr(probe.Probe, "_hold_what_steps_do", holds)
