"""The search for the most that fits, against cards whose memory is a known function."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from plans import recipe

from fastlora.bench import frontier
from fastlora.bench.frontier import RESOLUTION, FrontierTask, Trial, search
from fastlora.bench.schema import Arm, Work


def card(
    peak: Callable[[int], float], cap: float
) -> tuple[Callable[[int], Trial | None], list[int]]:
    tried: list[int] = []

    def attempt(size: int) -> Trial | None:
        tried.append(size)
        used = peak(size)
        return Trial(used, 0.001 * size) if used <= cap else None

    return attempt, tried


@pytest.mark.parametrize(
    "peak",
    [
        lambda size: 5 + size / 4000,  # linear, as with checkpointing and a flash kernel
        lambda size: 5 + (size / 20000) ** 2,  # attention that keeps its square
        lambda size: 5 + size // 3000,  # an allocator that grows in blocks
    ],
)
def test_it_ends_between_what_fits_and_what_does_not(peak: Callable[[int], float]) -> None:
    attempt, tried = card(peak, 24)
    found = search(attempt, 4096, 131072, 256, 24)
    assert peak(found.fits) <= 24
    assert found.fails is not None
    assert peak(found.fails) > 24
    assert found.fails - found.fits <= max(256, RESOLUTION * found.fits)
    assert found.trial == Trial(peak(found.fits), 0.001 * found.fits)
    assert len(tried) <= 12
    assert len(set(tried)) == len(tried)


def test_the_models_limit_ends_it() -> None:
    attempt, _ = card(lambda size: 5 + size / 1e6, 24)
    found = search(attempt, 4096, 32768, 256, 24)
    assert (found.fits, found.fails) == (32768, None)


def test_nothing_fits() -> None:
    attempt, tried = card(lambda size: 99, 24)
    found = search(attempt, 4096, 131072, 256, 24)
    assert (found.fits, found.trial) == (0, None)
    assert min(tried) == 256


def test_batches_go_down_to_one() -> None:
    attempt, _ = card(lambda size: 7 + 7 * size, 24)
    assert search(attempt, 1, 1024, 1, 24).fits == 2
    attempt, _ = card(lambda size: 20 + 7 * size, 24)
    assert search(attempt, 1, 1024, 1, 24).fits == 0


def test_the_cap_is_set_anew_before_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context grows with the kernels that longer rows load, which the allocator's limit leaves out."""
    import torch

    weight, caps, steps = torch.nn.Parameter(torch.ones(1)), [], []

    def loss(*_: Any) -> torch.Tensor:
        steps.append(len(caps))
        return weight.sum()

    loaded: Any = SimpleNamespace(
        set_adapter=lambda _: None,
        adapter=lambda: [("lora_A", weight)],
        recipe=recipe(),
        model=SimpleNamespace(config=SimpleNamespace(vocab_size=16)),
        collate=lambda rows: {},
        on_device=lambda inputs: inputs,
        device="cpu",
        loss=loss,
    )
    monkeypatch.setattr(FrontierTask, "load", lambda _: loaded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(frontier, "cap_memory", caps.append)
    monkeypatch.setattr(frontier, "memory", lambda: {"peak_reserved_gib": 1.0})
    arm = Arm.parse("peft")
    task = FrontierTask(
        arm=arm, recipe=recipe(), parity_checkpoint="", rows="", gradients="", work=Work(),
        vram_cap_gib=24.0, limits={"seq_len_tokens": 512, "micro_batch": 1},
    )  # fmt: skip
    told: list[list[str]] = []
    found = frontier.run_frontier(task, lambda so_far: told.append([*so_far]))
    assert told == [["seq_len_tokens"], ["seq_len_tokens", "micro_batch"]]
    assert [found[axis]["fits"] for axis in task.limits] == [512, 1]
    assert caps == [24.0] * 5
    assert steps == [2, 3, 4, 5]
