"""The most that fits under a VRAM cap: the longest row at batch 1, the largest batch of full rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastlora.bench import work as works
from fastlora.bench.arm import make_optimizer
from fastlora.bench.loaded import ArmTask
from fastlora.bench.memory import memory
from fastlora.bench.schema import Axis
from fastlora.engines.memory import cap_memory, forget_peak, free_memory, is_out_of_memory

RESOLUTION = 0.04
"""The search ends when what fits and what does not lie so close together."""


UNITS: dict[Axis, int] = {"seq_len_tokens": 256, "micro_batch": 1}
"""Tried sizes are multiples of these."""


class FrontierTask(ArmTask):
    limits: dict[Axis, int]
    """Not searched beyond: the model's longest position, or a batch that nobody uses."""


@dataclass(frozen=True, slots=True)
class Trial:
    peak_gib: float
    seconds: float
    """Of a second step: the first compiles and tunes."""


@dataclass(frozen=True, slots=True)
class Found:
    fits: int
    fails: int | None
    trial: Trial | None


def search(
    attempt: Callable[[int], Trial | None], start: int, limit: int, unit: int, cap_gib: float
) -> Found:
    """The largest size for which `attempt` gives a Trial and not None, to RESOLUTION or one `unit`.

    Memory grows nearly linearly in the size, so the next size comes from the two largest that fitted,
    aimed a little under the cap; between one that fits and one that fails, at worst, the middle.
    """
    fits: list[tuple[int, Trial]] = []
    low, high = 0, None
    size = max(unit, min(start, limit) // unit * unit)
    while True:
        trial = attempt(size)
        if trial is None:
            high = size
        else:
            fits.append((size, trial))
            low = size
        if high is None and low >= limit // unit * unit:
            break
        if high is not None and high - low <= max(unit, RESOLUTION * low):
            break
        size = _next(fits, low, high, limit, cap_gib) // unit * unit
        size = min(
            max(size, low + unit), (high - unit) if high is not None else limit // unit * unit
        )
        if size <= low:
            break
    return Found(low, high, fits[-1][1] if fits else None)


def _next(
    fits: list[tuple[int, Trial]], low: int, high: int | None, limit: int, cap_gib: float
) -> int:
    if high is None and len(fits) < 2:
        return 2 * low
    guess = 0.0
    if len(fits) >= 2:
        (size_a, a), (size_b, b) = fits[-2:]
        slope = (b.peak_gib - a.peak_gib) / (size_b - size_a)
        if slope > 0:
            guess = size_b + 0.97 * (cap_gib - b.peak_gib) / slope
    if high is None:
        return round(min(max(guess, 1.2 * low), 8 * low, limit))
    return round(guess) if low < guess < high else (low + high) // 2


def run_frontier(task: FrontierTask, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """For each axis fits, fails, tokens_per_s and peak_reserved_gib of its search; the model is loaded once, for
    the longest row. `tell` is given what was found so far after each of them."""
    import torch

    cap_memory(task.vram_cap_gib)
    row_tokens = task.recipe.model.seq_len_tokens
    longest = task.recipe.model.model_copy(update={"seq_len_tokens": task.limits["seq_len_tokens"]})
    task = task.model_copy(update={"recipe": task.recipe.model_copy(update={"model": longest})})
    loaded = task.load()
    loaded.set_adapter(0.0)
    parameters = [parameter for _, parameter in loaded.adapter()]
    train = loaded.recipe.train
    optimizer = make_optimizer(parameters, train.optimizer, train.lr, train.weight_decay)
    vocabulary = loaded.model.config.vocab_size

    def attempt(axis: Axis, size: int) -> Trial | None:
        count, length = (1, size) if axis == "seq_len_tokens" else (size, row_tokens)
        rows = works.random_rows(
            task.work.model_copy(update={"steps": 1, "lengths": "full"}),
            vocabulary=vocabulary,
            seq_len_tokens=length,
            rows_per_step=count,
        )
        try:
            free_memory()
            forget_peak()
            for _ in range(2):
                cap_memory(task.vram_cap_gib)  # beside a context that has grown
                torch.cuda.synchronize()
                started = time.perf_counter()
                inputs = loaded.on_device(loaded.collate(rows))
                counted = torch.tensor(len(rows) * (length - 1), device=loaded.device)
                loaded.loss(inputs, counted).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
            peak = memory()["peak_reserved_gib"]
            assert peak is not None
            trial = Trial(peak, time.perf_counter() - started)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            optimizer.zero_grad(set_to_none=True)
            trial = None
        free_memory()
        told = (
            "out of memory" if trial is None else f"{trial.peak_gib:.2f} GiB, {trial.seconds:.2f} s"
        )
        print(f"frontier: {axis} {size}: {told}", flush=True)
        return trial

    cap = task.vram_cap_gib or torch.cuda.mem_get_info()[1] / 2**30
    answer: dict[str, Any] = {}
    searches: tuple[tuple[Axis, int, int], ...] = (
        ("seq_len_tokens", 4096, 1),
        ("micro_batch", 1, row_tokens),
    )
    for axis, start, row in searches:
        found = search(partial(attempt, axis), start, task.limits[axis], UNITS[axis], cap)
        answer[axis] = {
            "fits": found.fits,
            "fails": found.fails,
            "tokens_per_s": found.fits * row / found.trial.seconds if found.trial else None,
            "peak_reserved_gib": found.trial.peak_gib if found.trial else None,
        }
        tell(answer)
    return answer
