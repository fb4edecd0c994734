"""Errors, peaks of memory, and times: launched one by one, and as replays of CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_REPEATS = 5
Call = Callable[[], Any]


def errors(truth: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative, in the 2-norm."""
    return {n: float((t - truth[n]).norm() / truth[n].norm()) for n, t in found.items()}


def right(error: Mapping[str, float], yardstick: Mapping[str, float]) -> bool:
    """At most twice the yardstick's; of a loss, of a row's loss there, as the errors of rows cancel by chance."""
    allowed = dict(yardstick)
    if "row" in allowed:
        allowed["loss"] = max(allowed["loss"], allowed["row"])
    eps = torch.finfo(torch.float32).eps
    return all(e <= 2 * allowed[n] + eps for n, e in error.items())  # so for NaN


def quantiles(times: Sequence[float]) -> dict[str, float]:
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"p20": p20, "p50": p50, "p80": p80}


def peak_mib(call: Call) -> float:
    """Of the GPU's memory, allocated above what was there before; called twice, as the first call gets what stays."""
    call()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)


def timed(
    arms: Mapping[str, Sequence[Call]], repeats: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """ms of each call. `repeats` at most, and no more than take `seconds`, but LEAST_REPEATS. The arms take turns, so
    that a clock that drifts does so for all; each takes its calls one after the other."""

    def now() -> Any:
        if device.type == "cpu":
            return time.perf_counter() * 1e3
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def synchronized() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    spans: dict[str, list[Any]] = {arm: [] for arm in arms}

    def turn(number: int) -> None:
        for place, (arm, calls) in enumerate(arms.items()):
            start = now()
            calls[(number + place) % len(calls)]()
            spans[arm].append((start, now()))

    turn(0)
    begin = synchronized()
    turn(1)
    each = synchronized() - begin
    repeats = min(repeats, max(LEAST_REPEATS, int(seconds / each)))
    warm_up = max(3, repeats // 5)  # with the two above
    for number in range(2, warm_up + repeats):
        turn(number)
    synchronized()
    if device.type == "cpu":
        return {arm: [b - a for a, b in span[warm_up:]] for arm, span in spans.items()}
    return {arm: [a.elapsed_time(b) for a, b in span[warm_up:]] for arm, span in spans.items()}


class Replays:
    """Records arms as training records micro-batches (fastlora.train.graphs), and times what is replayed."""

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder
        self.why_not = ""
        """Why nothing is recorded any more."""

    def times(
        self, arms: Mapping[str, Sequence[Call]], repeats: int, seconds: float, device: torch.device
    ) -> dict[str, list[float] | str]:
        """ms of a call, or why the arm cannot be recorded. An arm's graph holds all of its calls, one after the other,
        so that a single one is never what is left in the L2 cache; a replay's time is shared among them."""
        found: dict[str, list[float] | str] = {}
        replays: dict[str, Sequence[Call]] = {}
        for arm, calls in arms.items():
            replay = self._record(calls, device)
            if isinstance(replay, str):
                found[arm] = replay
            else:
                replays[arm] = [replay]
        if replays:
            for arm, times in timed(replays, repeats, seconds, device).items():
                found[arm] = [ms / len(arms[arm]) for ms in times]
        replays.clear()
        if not self.why_not:
            self.recorder.forget()
        return found

    def _record(self, calls: Sequence[Call], device: torch.device) -> Call | str:
        if self.why_not:
            return self.why_not
        nothing = torch.zeros((), device=device)

        def every(_: Any) -> Tensor:
            for call in calls:
                call()
            return nothing

        for last in (False, True):
            try:
                _, why_not = self.recorder.warm_up(every, {}, last=last)
            except torch.OutOfMemoryError:
                why_not = "out of memory"
            if why_not:
                return str(why_not)
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # a capture can only take what is free
            replay: Call = self.recorder.record(every, {})
        except Exception as error:
            # A capture that broke off leaves PyTorch's allocator and random generator in it.
            line = (str(error).splitlines() or [""])[0]
            self.why_not = f"an earlier graph broke off: {type(error).__name__}: {line}"
            return f"{type(error).__name__}: {line}"
        return replay
