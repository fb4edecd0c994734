"""The longest micro-batch is tried before the first step, and the run is the one without it. Its rows are of very
different lengths."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ooms import Ooms
from place import Crash, Place, assert_same, last
from plans import H100, predicted
from probes import Probes
from reruns import Recorders
from transformers import Trainer

from fastlora.errors import EngineError
from fastlora.plan import measured
from fastlora.train import learn
from fastlora.train.probe import Probe
from fastlora.train.stop import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = (
    "train.micro_batch=4", "train.effective_batch=8", "train.steps=5", "train.save_every_steps=2",
    "lora.dropout=0.1", "train.eval_every_steps=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(place: Place) -> dict[str, Any]:
    """On a CPU nothing is tried."""
    with pytest.MonkeyPatch.context() as patch:
        steps = Ooms(patch)
        manifest = place.run(*SETTINGS)
    assert [rows for _, rows in steps.done] == [4] * 10
    assert "plan" not in manifest
    return manifest


def newest(place: Place) -> dict[str, Any]:
    runs = place.work.folder.glob("runs/*")
    folder = max(runs, key=lambda run: int(run.name))
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def test_no_bit_changes_also_when_resumed(
    place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout and accumulation; the optimizer's state is there when it is resumed."""
    steps, probes = Ooms(monkeypatch), Probes(monkeypatch)
    whole = place.run(*SETTINGS)
    assert_same(place, whole, plain)
    assert steps.done[:2] == [(1, 4), (1, 4)]
    assert len(steps.done) == 2 + 10
    lengths, again = probes.tried
    assert lengths == again
    assert len(lengths) == 4
    assert lengths[0] == plain["data"]["train"]["longest_row_tokens"]
    crash = Crash(monkeypatch, at=4)
    with pytest.raises(RuntimeError, match="crashed"):
        place.run(*SETTINGS)
    crash.at = 0
    resumed = place.run(*SETTINGS, resume=True)
    assert_same(place, resumed, plain)
    assert probes.tried == [lengths] * 6
    found, later = whole["plan"]["probe"], resumed["plan"]["probe"]
    assert (found["step"], later["step"]) == (1, 3)
    assert (found["rows"], found["rows_in_forward"], found["tokens"]) == (4, 4, lengths[0])
    # AdamW's two moments in float32; a resumed run has them.
    trained = sum(tensor.numel() for tensor in place.adapter(last(whole)).values())
    assert probes.held == [8 * trained, 8 * trained, 0]
    assert "probe: the 4 longest rows" in place.said


def test_what_the_first_backward_leaves_is_there_in_a_second_forward(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the workspace of its thread's products, and unsloth's buffers: a loss then is beside them."""
    probes, step, there = Probes(monkeypatch), Trainer.training_step, []

    def training_step(trainer: Any, *rest: Any, **named: Any) -> Any:
        found.append((len(there), [p.grad is not None for p in trainer.model.parameters()]))
        loss = step(trainer, *rest, **named)
        there.append("workspace")
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    found: list[tuple[int, list[bool]]] = []
    monkeypatch.setattr(
        "fastlora.train.probe.peak_allocated_gib", lambda: max(1 + 0.25 * left for left, _ in found)
    )
    manifest = place.run(*SETTINGS, "train.steps=1", "train.effective_batch=4")
    assert manifest["plan"]["probe"]["peak_allocated_gib"] == 1.25
    # And none of its gradients, where a step begins without.
    assert [left for left, _ in found] == [0, 1, 2]
    assert not any(any(gradients) for _, gradients in found)
    assert len(probes.tried) == 2


def test_a_loss_of_labelled_tokens_is_tried_where_there_are_most(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In between, so that the longest rows come last, when all is there that stays."""
    letters = "abcdefghijkl"  # no two alike, which would be left out
    long = [{"prompt": one * 40, "completion": "be"} for one in letters]
    full = [{"prompt": "a", "completion": one * 30} for one in letters]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in [*long, *full]))
    sources = (f'data.sources=["{few}"]', "data.eval_split=2", "train.steps=1")
    probes = Probes(monkeypatch)
    for chunked, tried in (("true", [0, 1, 0]), ("false", [0, 0])):
        probes.tried.clear()
        manifest = place.run(*SETTINGS, *sources, f"train.chunked_loss={chunked}")
        longest = manifest["data"]["train"]["longest_row_tokens"]
        assert [int(max(lengths) < longest) for lengths in probes.tried] == tried
        assert manifest["plan"]["probe"]["tokens"] == longest


def test_a_run_that_is_over_tries_nothing(
    place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plot_loss(*_: Any, **__: Any) -> None:
        raise OSError("gone")

    probes = Probes(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(learn, "plot_loss", plot_loss)
        with pytest.raises(OSError, match="gone"):
            place.run(*SETTINGS)
    resumed = place.run(*SETTINGS, resume=True)
    assert_same(place, resumed, plain)
    assert len(probes.tried) == 2


@pytest.mark.parametrize("packing", ["false", "true"])
def test_out_of_memory_in_it_the_run_is_that_of_the_smaller_micro_batch(
    packing: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first step then runs out of it: done again, it is not to train on the probe's rows."""
    common = (*SETTINGS, f"data.packing={packing}", "model.seq_len_tokens=80")
    with monkeypatch.context() as patch:
        steps, probes = Ooms(patch, {1: ["forward"]}), Probes(patch)
        tell = Probe._tell

        def told(probe: Probe, figures: Any) -> None:
            tell(probe, figures)
            steps.plan[1] = ["backward"]

        patch.setattr(Probe, "_tell", told)
        shrunk = place.run(*common)
    assert steps.raised == [(1, "forward"), (1, "backward")]
    assert "before step 1: out of memory with 4 rows of up to " in place.said
    assert "They are tried again" in place.said
    assert "\nstep 1: out of memory with 2 rows of up to " in place.said
    assert [(one["step"], one["before"], one["rows"]) for one in shrunk["oom"]] == [
        (1, 4, 2), (1, 2, 1),
    ]  # fmt: skip
    # What did not fit is no measure: it is tried once more, in forwards that fit.
    assert len(probes.tried) == 2 + 2
    assert shrunk["plan"]["probe"]["rows_in_forward"] == 2
    assert not shrunk["plan"]["probe"]["as_planned"]
    assert_same(place, shrunk, place.run(*common, "train.micro_batch=1"))


def test_where_not_one_row_fits_it_ends_before_any_step(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Ooms(monkeypatch, rows=0)
    Probes(monkeypatch)
    with pytest.raises(EngineError) as told:
        place.run(*SETTINGS, "train.micro_batch=2")
    lines = str(told.value).splitlines()
    assert lines[0].startswith("before step 1: out of memory with one row of up to ")
    assert lines[0].endswith("train.checkpointing = 'full'.")
    assert lines[1] == "With more memory free, begin it again with:"
    assert "--set model.seq_len_tokens=" in lines[4]
    assert len(steps.raised) == 3  # two rows, one, one with checkpointing
    assert not steps.done
    failed = newest(place)
    assert failed["status"] == "failed"
    assert not place.work.losses(last(failed))


def test_no_room_for_the_optimizers_state(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Ooms(monkeypatch)
    Probes(monkeypatch)

    def states_bytes(sizes: Any, optimizer: str) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("fastlora.train.probe.states_bytes", states_bytes)
    with pytest.raises(EngineError, match=r"optimizer at step 1, whose state.*paged_adamw_8bit"):
        place.run(*SETTINGS)
    assert not steps.done


def test_interrupted_in_it_no_step_is_begun(
    place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Probes(monkeypatch)
    with monkeypatch.context() as patch:
        step, hit = Trainer.training_step, []

        def training_step(*rest: Any, **named: Any) -> Any:
            hit.append(rest)
            os.kill(os.getpid(), signal.SIGINT)
            return step(*rest, **named)

        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(Interrupted):
            place.run(*SETTINGS)
    assert len(hit) == 1
    stopped = newest(place)
    assert stopped["status"] == "interrupted"
    resumed = place.run(*SETTINGS, resume=True)
    assert resumed["path"] == stopped["path"]
    assert_same(place, resumed, plain)


GRAPHS = (
    *SETTINGS, "memory.cuda_graphs=true", "lora.dropout=0.0", "train.chunked_loss=true", "train.steps=10",
)  # fmt: skip


@pytest.mark.parametrize("packing", ["false", "true"])
def test_graphs_are_recorded_before_the_first_step(
    packing: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, after every length was computed as usual: what they need never stands beside what that needs."""
    settings = (*GRAPHS, f"data.packing={packing}", "data.eval_split=15")  # 65 rows: the last has 1
    recorders = Recorders(monkeypatch)
    without = place.run(*settings)
    probes = Probes(monkeypatch)
    probed = place.run(*settings)
    assert_same(place, probed, without)
    lengths = probed["cuda_graphs"]["lengths"]
    one, other = recorders.made
    assert 0 < one.records <= other.records == len(lengths)
    assert other.order == ["warm up"] * 2 * len(lengths) + ["record"] * len(lengths)
    found = probed["cuda_graphs"]
    assert found["recorded"] == len(lengths)
    assert found["of"] == without["cuda_graphs"]["of"]
    assert found["replayed"] == found["of"]
    assert len(probes.tried) == 2 + 3 * len(lengths)
    widths = [max(tried) for tried in probes.tried[2 : 2 + len(lengths)]]
    if packing == "false":
        assert widths[1:] == list(lengths[-2::-1])  # the longest is as long as its rows are
    assert f"; CUDA graphs: {len(lengths)}" in place.said


def test_more_rows_are_not_computed_than_there_are(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorders(monkeypatch)
    Probes(monkeypatch)
    steps = Ooms(monkeypatch)
    more = ("train.micro_batch=128", "train.effective_batch=128", "train.steps=2")
    place.run(*GRAPHS, *more, "data.eval_split=15")
    assert {rows for _, rows in steps.done} == {65}


def test_interrupted_while_graphs_are_recorded_it_does_not_go_through_them(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorders(monkeypatch)
    probes, step = Probes(monkeypatch), Trainer.training_step

    def training_step(*rest: Any, **named: Any) -> Any:
        if len(probes.tried) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*rest, **named)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(Interrupted):
        place.run(*GRAPHS)
    assert len(probes.tried) == 3
    assert newest(place)["status"] == "interrupted"


def test_where_recording_fails_nothing_more_is_tried(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Recorders(monkeypatch, fail={0: RuntimeError("operation not permitted")})
    probes = Probes(monkeypatch)
    stopped = place.run(*GRAPHS)
    assert stopped["cuda_graphs"]["stopped"].startswith("RuntimeError: operation not permitted")
    assert len(probes.tried) == 2 + len(made.last.warm_ups) + 1


@pytest.mark.parametrize("fails", ["record", "warm up"])
def test_out_of_memory_while_graphs_are_recorded(
    fails: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    oom = torch.OutOfMemoryError("CUDA out of memory.")
    peaks = iter([4.0])
    Probes(monkeypatch)
    # Of the probe; what there was when it ran out of memory is no measure.
    monkeypatch.setattr("fastlora.train.probe.peak_gib", lambda: next(peaks, 80.0))
    Recorders(monkeypatch, fail={1: oom} if fails == "record" else {})
    if fails == "warm up":
        # The longest rows have more labels than provided for: two forwards, twice.
        Ooms(monkeypatch, {1: ["none"] * 4 + ["backward"]})
    disturbed = place.run(*GRAPHS)
    ((step, rows, graphs),) = [(o["step"], o["rows"], o.get("graphs")) for o in disturbed["oom"]]
    assert (step, rows, graphs) == (1, 4, False)
    assert disturbed["plan"]["probe"]["peak_gib"] == 4.0
    assert disturbed["cuda_graphs"]["stopped"] == "out of memory at step 1"
    assert len([entry for entry in place.work.losses(last(disturbed)) if entry[1] == "loss"]) == 10


def test_it_is_compared_with_the_plan_and_teaches_where_the_run_is_cut_short(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    found = predicted(engine="peft", train={"micro_batch": 4})
    monkeypatch.setattr(learn, "predict_run", lambda job: found)
    needed = 1.25 * found.memory.reserved_gib
    Probes(monkeypatch, peak_gib=needed)
    crash = Crash(monkeypatch, at=2)
    with pytest.raises(RuntimeError, match="crashed"):
        place.run(*SETTINGS)
    kept = newest(place)["plan"]
    assert kept["probe"]["peak_gib"] == pytest.approx(needed, abs=1e-3)
    assert kept["probe"]["peak_allocated_gib"] == pytest.approx(needed / 2, abs=1e-3)
    assert kept["probe"]["error"] == pytest.approx(-0.2, abs=1e-4)
    assert kept["peak"]["reserved_gib"] == pytest.approx(found.memory.reserved_gib, abs=1e-3)
    said = f"{found.memory.reserved_gib:.2f} were predicted (-20.0%), more than 5% off"
    assert said in place.said
    (peak,) = measured.peaks(H100)
    assert peak.measured_gib == pytest.approx(needed, abs=1e-3)
    again = predicted(engine="peft", train={"micro_batch": 4})
    assert again.memory.reserved_gib > found.memory.reserved_gib
    # Come to its end, what it needed then is taken in its place.
    crash.at = 0
    result = learn._result

    def with_peak(*given: Any) -> dict[str, Any]:
        return result(*given) | {"peak_reserved_gib": 2 * needed}

    monkeypatch.setattr(learn, "_result", with_peak)
    finished = place.run(*SETTINGS, resume=True)
    assert finished["plan"]["measured_reserved_gib"] == 2 * needed
    assert finished["plan"]["probe"]["error"] == pytest.approx(-0.2, abs=1e-4)
    assert [one.measured_gib for one in measured.peaks(H100)] == [2 * needed]


def test_with_less_at_a_time_than_was_predicted_for_nothing_is_learnt(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    found = predicted(engine="peft", train={"micro_batch": 4})
    monkeypatch.setattr(learn, "predict_run", lambda job: found)
    Probes(monkeypatch)
    Crash(monkeypatch, at=2)
    Ooms(monkeypatch, {1: ["forward"]})
    with pytest.raises(RuntimeError, match="crashed"):
        place.run(*SETTINGS)
    assert "error" not in newest(place)["plan"]["probe"]
    assert "were predicted for 4 in a forward" in place.said
    assert measured.peaks(H100) == []


def test_a_budget_is_told_of(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"allocated_gib": 1.0, "allowed_gib": 11.25}
    monkeypatch.setattr("fastlora.train.probe.memory_now", lambda: figures)
    probes, caps = Probes(monkeypatch, peak_gib=6.5), []
    found = predicted(engine="unsloth", memory={"stream_layers": 20})
    monkeypatch.setattr(learn, "predict_run", lambda job: found)
    monkeypatch.setattr(
        "fastlora.train.probe.cap_as_asked",
        lambda recipe, engine, planned: caps.append((len(probes.tried), planned)),
    )
    manifest = place.run(*SETTINGS, "train.steps=1", 'memory.vram="12GiB"')
    assert "; 7.25 of 12.00 GiB with the CUDA context" in place.said
    # Before each micro-batch and after the last, since each may load kernels and pin memory.
    assert caps == [(tried, found.memory.context) for tried in (0, 1, 2)]
    assert last(manifest) > 0
