"""What runs on this machine needed, beside what was predicted; and the ceilings that the benchmark measured here.

A file per GPU in fastlora's cache. The next prediction for a like setup (engine, policy, loss, quantization, versions)
is corrected by the median of what the last runs needed beyond weights and state, over what was predicted of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from fastlora.cache import cache_folder
from fastlora.plan.setup import Setup
from fastlora.rundir.provenance import versions
from fastlora.rundir.store import write_atomic

_KEPT = 50
_TAKEN = 5
_MOST = 1.5
"""A correction beyond it is a fault of the prediction, and not this machine's."""
_DECIDE = ("torch", "unsloth", "unsloth_zoo", "transformers", "peft", "bitsandbytes")
"""Packages whose version decides memory."""


@dataclass(frozen=True, slots=True)
class Peak:
    """One run."""

    like: str
    """Runs of one kind: see `kind`."""
    always_gib: float
    predicted_gib: float
    """Reserved, before any correction."""
    shown_gib: float
    """As it was told the user before the run: corrected by the runs before."""
    measured_gib: float
    model: str
    tokens: int
    """Of its longest micro-batch."""
    at: str
    run: str = ""
    """Its folder: a run that was cut short and resumed teaches once."""

    @property
    def error(self) -> float:
        """Of what was shown: 0.05 is 5 % too much."""
        return self.shown_gib / self.measured_gib - 1

    @property
    def ratio(self) -> float:
        predicted = max(self.predicted_gib - self.always_gib, 1e-3)
        return max(self.measured_gib - self.always_gib, 1e-3) / predicted


@cache
def _stack() -> str:
    """Looked up once: a budget asks hundreds of times, at 14 ms each."""
    installed = versions()
    return ",".join(f"{name}={installed[name]}" for name in _DECIDE if name in installed)


def kind(setup: Setup) -> str:
    parts = (setup.engine, setup.policy, setup.loss, setup.quantization, f"kernels={setup.kernels}")
    return " ".join((*parts, *(["graphs"] if setup.graphs else []), _stack()))


def file_of(gpu: str) -> Path:
    return cache_folder() / "plan" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.json"


def _read(gpu: str) -> dict[str, Any]:
    """Empty where the file is not there or not whole: what it held can be measured again."""
    try:
        found = json.loads(file_of(gpu).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(gpu: str, content: dict[str, Any]) -> None:
    path = file_of(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def peaks(gpu: str) -> list[Peak]:
    try:
        return [Peak(**entry) for entry in _read(gpu).get("peaks", [])]
    except TypeError:  # written by another version
        return []


def remember(gpu: str, peak: Peak) -> None:
    before = [
        one for one in peaks(gpu) if not peak.run or (one.run, one.like) != (peak.run, peak.like)
    ]
    kept = [*before, peak][-_KEPT:]
    _write(gpu, {**_read(gpu), "peaks": [asdict(one) for one in kept]})


def ceilings(gpu: str) -> dict[str, float] | None:
    found = _read(gpu).get("ceilings")
    return (
        found if isinstance(found, dict) and {"gemm_tflops", "copy_gb_s"} <= found.keys() else None
    )


def remember_ceilings(gpu: str, found: dict[str, float]) -> None:
    if found:
        _write(gpu, {**_read(gpu), "ceilings": found})


@dataclass(frozen=True, slots=True)
class Correction:
    factor: float
    runs: int
    error: float | None
    """The largest of these runs' predictions, as they were shown: 0.03 is within 3 %."""


def correction(gpu: str | None, setup: Setup) -> Correction:
    like = kind(setup)
    taken = [one for one in (peaks(gpu) if gpu else []) if one.like == like][-_TAKEN:]
    if not taken:
        return Correction(1.0, 0, None)
    factor = min(_MOST, max(1 / _MOST, median(one.ratio for one in taken)))
    return Correction(factor, len(taken), max(abs(one.error) for one in taken))
