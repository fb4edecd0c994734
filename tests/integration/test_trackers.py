"""TensorBoard's and W&B's files, read back."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastlora.errors import EngineError
from fastlora.recipe.load import load_recipe
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir
from fastlora.train.session import Request, train_run
from fastlora.train.trackers import Trackers, tracker_problems

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the trackers


def recipe_for(*trackers: str) -> Recipe:
    return Recipe.model_validate({
        "model": {"name": "x"}, "data": {"sources": ["x"]},
        "output": {"dir": "runs", "report_to": list(trackers)},
    })  # fmt: skip


def trained(workplace: Any, tracker: str) -> dict[str, Any]:
    settings = (f'output.report_to=["{tracker}"]', "train.steps=4", "train.eval_every_steps=2")
    recipe = load_recipe(workplace.recipe, settings)
    request = Request(recipe, str(workplace.recipe), settings)
    return train_run(request, Console(file=io.StringIO()))


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_what_the_run_logged(workplace: Any) -> None:
    pytest.importorskip("tensorboard")
    run = Path(trained(workplace, "tensorboard")["path"])
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key, name in (
        ("loss", "train/loss"), ("eval_loss", "eval/loss"), ("lr", "train/learning_rate"),
        ("grad_norm", "train/grad_norm"), ("tokens_per_s", "train/tokens_per_s"), ("tokens", "train/tokens"),
    ):  # fmt: skip
        wanted = [(entry["step"], entry[key]) for entry in logged if key in entry]
        found = scalars(run / "tensorboard", name)
        assert [step for step, _ in found] == [step for step, _ in wanted], name
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted])


def test_a_resumed_run_goes_on_in_the_same_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = RunDir.create(tmp_path)
    recipe = recipe_for("tensorboard")

    def log(values: dict[int, float]) -> None:
        trackers = Trackers(recipe, run)
        for step, value in values.items():
            trackers.callbacks[0].tb_writer.add_scalar("train/loss", value, step)
        trackers.close(lambda problem: pytest.fail(problem))

    log({1: 1.0, 2: 2.0, 3: 3.0})
    (run.checkpoints / "checkpoint-2").mkdir()
    run.mark_complete(run.checkpoints / "checkpoint-2")
    log({3: 30.0, 4: 40.0})
    found = scalars(run.path / "tensorboard", "train/loss")
    assert found == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_wandb_offline_keeps_its_files_in_the_run(
    workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(workplace.folder)
    manifest = trained(workplace, "wandb")
    kept = list(
        (Path(manifest["path"]) / "wandb").glob(f"offline-run-*-{manifest['wandb_id']}/*.wandb")
    )
    assert len(kept) == 1
    content = kept[0].read_bytes()
    for name in (b"tokens_per_s", b"train/loss", b"eval/loss", b"seq_len_tokens"):
        assert name in content, name
    assert not (workplace.folder / "wandb").exists()
    second = trained(workplace, "wandb")
    assert second["wandb_id"] != manifest["wandb_id"]
    assert list((Path(second["path"]) / "wandb").glob("offline-run-*/*.wandb"))


WANDB = """
import types
def setup():
    return types.SimpleNamespace(settings=types.SimpleNamespace(mode={mode!r}))
def login():
    raise ValueError("No API key configured.")
def init(**_):
    raise RuntimeError("the service did not answer")
run = None
"""


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    (folder / "wandb.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_wandb_without_an_account_is_refused_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, WANDB.format(mode="online"))
    (problem,) = tracker_problems(recipe_for("wandb"))
    assert "ValueError: No API key configured)" in problem
    assert "`wandb login`" in problem
    assert "WANDB_MODE=offline" in problem


def test_wandb_offline_needs_no_account_and_a_failed_start_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, WANDB.format(mode="offline"))
    assert list(tracker_problems(recipe_for("wandb"))) == []
    run = RunDir.create(tmp_path / "runs")
    with pytest.raises(
        EngineError, match=r"wandb cannot start \(RuntimeError: the service did not"
    ):
        Trackers(recipe_for("wandb"), run)


def test_a_folder_of_wandbs_name_is_not_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (problem,) = tracker_problems(recipe_for("wandb", "wandb"))
    assert problem.startswith("output.report_to: wandb is not installed; pip install wandb")


def test_a_broken_tracker_is_a_problem_and_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "import no_such_module_of_wandbs")
    (problem,) = tracker_problems(recipe_for("wandb"))
    assert "ModuleNotFoundError" in problem
