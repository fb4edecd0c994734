"""A run that runs out of memory goes on in smaller forwards, and is the run that it would have been."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ooms import PLACES, Ooms
from place import Crash, Place, assert_same, last

from fastlora.errors import EngineError

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 100


@pytest.fixture(scope="module")
def make_place(make_workplace: Callable[[], Any]) -> Callable[[], Place]:
    return lambda: Place(make_workplace())


@pytest.fixture(scope="module")
def place(make_place: Callable[[], Place]) -> Place:
    """For runs that do not mind each other."""
    return make_place()


def test_a_hundred_steps_with_ooms_and_an_interrupt_end_where_the_undisturbed_run_does(
    make_place: Callable[[], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, disturbed = make_place(), make_place()
    settings = f"train.steps={STEPS}"
    whole.run(settings)
    draw = random.Random(f"out of memory in {STEPS} steps")
    first, second, third = draw.randint(2, 58), draw.randint(61, 65), draw.randint(67, STEPS)
    (one, two, three) = draw.sample(PLACES, 3)
    crash = Crash(monkeypatch, at=66)  # which loses what came after the checkpoint of step 60
    ooms = Ooms(monkeypatch, {first: [one], second: [two], third: [three]})
    with pytest.raises(RuntimeError, match="crashed"):
        disturbed.run(settings)
    assert ooms.raised == [(first, one), (second, two)]
    crash.at = 0
    manifest = disturbed.run(settings, resume=True)
    assert f"resume: from step {second} on 2 rows in a forward" in disturbed.said
    # From 61 on as it was the first time, and the second does not run out of memory again.
    assert ooms.raised == [(first, one), (second, two), (third, three)]
    again = [count for step, count in ooms.done if step == second]
    assert again[-4:] == [2, 2, 2, 2]
    assert [count for step, count in ooms.done if step == first][-2:] == [4, 4]
    assert [(entry["step"], entry["before"], entry["rows"]) for entry in manifest["oom"]] == [
        (first, 8, 4), (second, 4, 2), (third, 2, 1),
    ]  # fmt: skip
    told = f"step {third}: out of memory with 2 rows of up to "
    assert any(note.startswith(told) for note in manifest["resumed"][-1]["notes"])
    expected, found = whole.work.losses(), disturbed.work.losses()
    assert [(step, which) for step, which, _ in found] == [(s, w) for s, w, _ in expected]
    for (step, which, want), (_, _, got) in zip(expected, found, strict=True):
        if "tokens" in which:
            assert got == want, (step, which)  # every sample counts once
        elif step < first:
            assert got == want, (step, which)
        else:
            # float32 sums in another order, through up to a hundred steps of Adam
            assert got == pytest.approx(want, rel=1e-4 if which == "grad_norm" else 1e-5), step
    before, after = whole.adapter(), disturbed.adapter()
    for name, tensor in before.items():
        assert (after[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


@pytest.mark.parametrize("packing", ["false", "true"])
def test_the_step_is_that_of_a_run_with_the_smaller_micro_batch(
    packing: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with dropout and accumulation, wherever memory ran out."""
    common = (
        f"data.packing={packing}", "lora.dropout=0.1", "train.steps=2", "train.effective_batch=16",
        "model.seq_len_tokens=40",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        ooms = Ooms(patch, {1: list(PLACES[:3])}, effective_batch=16)
        disturbed = place.run(*common, "train.micro_batch=8")
    assert ooms.raised == [(1, where) for where in PLACES[:3]]
    assert_same(place, disturbed, place.run(*common, "train.micro_batch=1"))


def test_with_kernels_nothing_waits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """gate's forward computes up's output as well; up is where memory runs out, again and again."""
    from fastlora_kernels.layers import group

    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    dropped: list[int] = []
    drop = group.drop_waiting

    def counted(model: Any) -> None:
        groups = [vars(module).get(group.GROUP) for module in model.modules()]
        dropped.append(len({id(one) for one in groups if one is not None and one._waiting}))
        drop(model)
        assert not any(one._waiting for one in groups if one is not None)

    monkeypatch.setattr("fastlora.train.oom.drop_waiting", counted)
    common = ("train.steps=2", "lora.dropout=0.0")
    with monkeypatch.context() as patch:
        ooms = Ooms(patch, {1: ["forward", "forward", "last"]})
        disturbed = place.run(*common)
    assert ooms.raised == [(1, "forward"), (1, "forward"), (1, "last")]
    assert dropped == [1, 1, 0]
    assert any(row["kernel"] == "fastlora" for row in disturbed["kernels"])
    assert_same(place, disturbed, place.run(*common, "train.micro_batch=1"))


def test_with_one_row_layers_are_checkpointed_and_then_it_ends_with_a_way_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.steps=4", "train.micro_batch=2", "train.save_every_steps=50")
    with monkeypatch.context() as patch:
        ooms = Ooms(patch, {2: ["backward"] * 2, 3: ["backward"]})
        with pytest.raises(EngineError) as told:
            place.run(*settings)
    assert ooms.raised == [(2, "backward"), (2, "backward"), (3, "backward")]
    lines = str(told.value).splitlines()
    assert lines[0].startswith("step 3: out of memory with one row of up to ")
    assert lines[0].endswith("train.checkpointing = 'full'. Step 2 is saved.")
    assert lines[1] == "With more memory free, go on with:"
    assert lines[2].startswith("  fastlora run ")
    assert lines[2].endswith(" --resume")
    assert "did fit" in lines[3] or "half of" in lines[3]
    assert "--set model.seq_len_tokens=" in lines[4]
    assert "--resume" not in lines[4]
    failed = json.loads(
        (max(place.work.folder.glob("runs/*"), key=number) / "manifest.json").read_text()
    )
    assert failed["status"] == "failed"
    assert failed["oom"][-1]["checkpointing"] == "full"
    # More memory is free now: it goes on behind step 2, in one row and with checkpointing, as if never stopped.
    assert (Path(failed["path"]) / "checkpoints" / "checkpoint-2" / "COMPLETE").exists()
    with monkeypatch.context() as patch:
        ooms = Ooms(patch)
        resumed = place.run(*settings, 'train.checkpointing="none"', resume=True)
    assert resumed["path"] == failed["path"]
    assert [step for step, _ in ooms.done] == [3] * 8 + [4] * 8
    assert resumed["resumed"][-1]["changed"] == ["train.checkpointing: was 'auto', now 'none'"]
    # Checkpointing changes no bit, and the run is one of single rows from step 2 on.
    with monkeypatch.context() as patch:
        Ooms(patch, {2: ["before"]})
        assert_same(place, resumed, place.run(*settings))


def number(folder: Path) -> int:
    return int(folder.name)


def test_an_evaluation_goes_on_in_smaller_batches(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.steps=2", 'data.supervise="completion"')
    plain = place.run(*settings)
    from trl import SFTTrainer

    predict, calls = SFTTrainer.prediction_step, []

    def prediction_step(
        trainer: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        calls.append(len(inputs["labels"]))
        if calls[-1] > 3:
            raise RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            )
        return predict(trainer, model, inputs, *rest, **named)

    monkeypatch.setattr(SFTTrainer, "prediction_step", prediction_step)
    disturbed = place.run(*settings)
    assert calls == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert [(entry["where"], entry["step"], entry["rows"]) for entry in disturbed["oom"]] == [
        ("evaluation", 2, 4), ("evaluation", 2, 2),
    ]  # fmt: skip
    for (_, which, want), (_, _, got) in zip(
        place.work.losses(last(plain)), place.work.losses(last(disturbed)), strict=True
    ):
        assert got == (pytest.approx(want, rel=1e-6) if which == "eval_loss" else want)


def test_out_of_memory_in_the_optimizer_is_no_step_to_do_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(
        EngineError, match=r"out of memory while training.*optimizer at step 1.*paged_adamw_8bit"
    ):
        place.run("train.steps=2")


def test_out_of_memory_while_loading(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("fastlora.train.learn.load_model", load)
    with pytest.raises(EngineError, match="out of memory while loading the model"):
        place.run("train.steps=2")


def test_other_errors_stay_what_they_are(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    Ooms(monkeypatch, {1: ["backward"]}, error=RuntimeError, said="CUDA error: misaligned address")
    with pytest.raises(RuntimeError, match="misaligned address"):
        place.run("train.steps=2")
