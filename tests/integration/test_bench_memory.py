"""Arms that keep less, or are recorded: the same losses and gradients as the arm that does neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reruns import Recorders, Reruns, refreshes

from fastlora.bench import work
from fastlora.bench.arm import empty, timed_steps
from fastlora.bench.loaded import ArmTask, Loaded
from fastlora.bench.schema import Arm
from fastlora.bench.suites import plan_for, renamed
from fastlora.bench.weights import random_checkpoint
from fastlora.errors import EngineError
from fastlora.plan.advise import with_settings
from fastlora.train import static
from fastlora.train.graphs import Graphs

STEPS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An arm's name -> its losses, gradients and notes after a few steps on the same rows."""
    plan = plan_for("tiny", 0.0)
    assert plan.shape
    cache: Path = tmp_path_factory.mktemp("checkpoints")
    checkpoint = random_checkpoint(plan.shape, plan.recipe.model, cache)
    train = plan.recipe.train
    # As many rows a step as every arm has.
    rows = work.random_rows(
        plan.work.model_copy(update={"steps": STEPS, "lengths": "full"}), vocabulary=plan.shape["vocab_size"],
        seq_len_tokens=32, rows_per_step=train.micro_batch * train.accumulation_steps,
    )  # fmt: skip

    def run(name: str, quantization: str = "none") -> dict[str, Any]:
        arm = Arm.parse(name)
        recipe = arm.recipe(renamed(plan.recipe, str(checkpoint)))
        recipe = with_settings(recipe, {"model.quantization": quantization})
        task = ArmTask(
            arm=arm, recipe=recipe, parity_checkpoint="", rows="", gradients="", work=plan.work
        )
        loaded = task.load()
        loaded.set_adapter(0.02)
        steps = work.steps(rows, recipe.train.micro_batch, recipe.train.accumulation_steps)
        found = timed_steps(loaded, steps)
        gradients = {n: p.grad.clone() for n, p in loaded.adapter() if p.grad is not None}
        empty(loaded)
        return {**found, "gradients": gradients, "notes": loaded.notes, "graphs": loaded.graphs}

    return run


def test_what_is_kept_changes_no_number(trained: Any) -> None:
    plain = trained("peft+fastlora-checkpointing")
    for name in (
        "peft+fastlora+offload",
        "peft+fastlora+offload+keep1",
        "peft+fastlora+attention1+offload",
    ):
        found = trained(name)
        assert found["losses"] == plain["losses"], name
        for tensor, gradient in plain["gradients"].items():
            assert torch.equal(found["gradients"][tensor], gradient), (name, tensor)


def test_larger_micro_batches_are_the_same_work(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of one, recorded or not: the rows, their order, losses and gradients of one of two."""
    recorders = Recorders(monkeypatch)
    plain = trained("peft+fastlora-checkpointing")
    for name in ("peft+fastlora+batch4-checkpointing", "peft+fastlora+record+batch4-checkpointing"):
        found = trained(name)
        for same in ("digest", "order", "step_tokens", "step_supervised"):
            assert found[same] == plain[same], (name, same)
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        for tensor, gradient in plain["gradients"].items():
            torch.testing.assert_close(found["gradients"][tensor], gradient, rtol=1e-3, atol=1e-6)
    assert found["graphs"].replays == STEPS - found["graphs"].warm_ups
    assert recorders.last.records == 1


def test_an_arm_whose_embedding_stays_is_no_arm(trained: Any) -> None:
    with pytest.raises(EngineError, match=r"^\+hostembed: the embedding stays where it is: "):
        trained("peft+hostembed")


def test_a_recorded_arm_trains_alike(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained("peft+fastlora-checkpointing")
    with pytest.raises(EngineError, match="CUDA graphs need a CUDA GPU"):
        trained("peft+fastlora+record")
    recorders = Recorders(monkeypatch)
    found = trained("peft+fastlora+record-checkpointing")
    assert recorders.last.records == 1
    assert recorders.last.forgotten == 1  # given back before gradients are compared
    assert found["graphs"].replays > 0
    assert any("micro-batches were replays of 1 graphs" in note for note in found["notes"])
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    for tensor, gradient in plain["gradients"].items():
        torch.testing.assert_close(found["gradients"][tensor], gradient, rtol=1e-3, atol=1e-6)


def test_an_arm_with_dense_weights_trains_by_those_of_its_step(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorders(monkeypatch)
    refreshed = refreshes(monkeypatch)
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    plain = trained("peft+fastlora+record-checkpointing", "nf4")
    found = trained("peft+fastlora+record+dense2-checkpointing", "nf4")
    assert refreshed == [0] + (STEPS - 1) * [14]  # after the adapter is set, and after steps
    assert found["losses"] == plain["losses"]
    for tensor, gradient in plain["gradients"].items():
        assert torch.equal(found["gradients"][tensor], gradient), tensor


def test_an_arm_that_cannot_be_recorded_says_so(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorders(monkeypatch, fail={0: ValueError("it asks the host")})
    with pytest.raises(EngineError, match=r"\+record: not recorded: ValueError: it asks the host"):
        trained("peft+fastlora+record")
    monkeypatch.setattr(static, "why_not", lambda *given, **named: "this model draws")
    with pytest.raises(EngineError, match=r"^\+record: this model draws$"):
        trained("peft+fastlora+record")


@pytest.mark.parametrize(
    ("replays", "why_not", "said"),
    [(3, "", ""), (0, "", "no shape came often enough"), (3, "it waits", "it waits")],
)
def test_what_stops_in_the_middle_is_not_recorded(replays: int, why_not: str, said: str) -> None:
    loaded = Loaded.__new__(Loaded)
    loaded.graphs = None
    assert loaded.not_recorded == ""
    loaded.graphs = Graphs(Reruns(), [])
    loaded.graphs.replays, loaded.graphs.why_not = replays, why_not
    assert loaded.not_recorded == said
