"""An interrupted run that is resumed is, to the last bit, the run that was not interrupted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

STEPS = 16
HERE = Path(__file__).parent


def interrupted(workplace: object, how: str, step: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "interrupt.py"), how, str(step), "run", str(workplace.recipe)],
        cwd=workplace.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(workplace: object, number: int = 1) -> dict[str, bytes]:
    tensors = load_file(workplace.path(number) / "adapter" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def uninterrupted(make_workplace: Callable[[], object]) -> object:
    workplace = make_workplace()
    workplace.run()
    return workplace


def assert_same_run(resumed: object, whole: object) -> None:
    assert resumed.losses() == whole.losses()
    assert weights(resumed) == weights(whole)
    assert resumed.manifest()["status"] == "finished"
    assert not resumed.path(2).exists()


def test_two_runs_are_the_same_and_neither_overwrites(uninterrupted: object) -> None:
    uninterrupted.run()
    assert uninterrupted.losses(2) == uninterrupted.losses(1)
    assert weights(uninterrupted, 2) == weights(uninterrupted, 1)
    assert len([entry for entry in uninterrupted.losses() if entry[1] == "loss"]) == STEPS


# 4, 8, 12: where a checkpoint is written anyway; 8 is the end of an epoch; 3, 7 and 11 lie within one.
@pytest.mark.parametrize(
    ("how", "step"), [("SIGINT", s) for s in (3, 4, 8, 11, 12)] + [("SIGTERM", 7)]
)
def test_a_signal_saves_and_resume_goes_on(
    how: str, step: int, uninterrupted: object, make_workplace: Callable[[], object]
) -> None:
    workplace = make_workplace()
    stopped = interrupted(workplace, how, step)
    assert stopped.returncode == {"SIGINT": 130, "SIGTERM": 143}[how], stopped.stderr[-3000:]
    assert f"fastlora run {workplace.recipe} --resume" in stopped.stderr
    assert workplace.manifest()["status"] == "interrupted"
    assert (workplace.path() / "checkpoints" / f"checkpoint-{step}" / "COMPLETE").exists()
    workplace.run("--resume")
    assert_same_run(workplace, uninterrupted)


def test_a_second_signal_leaves_at_once(workplace: object, uninterrupted: object) -> None:
    stopped = interrupted(workplace, "twice", 6)
    assert stopped.returncode == 130
    assert not (workplace.path() / "checkpoints" / "checkpoint-6").exists()
    workplace.run("--resume")  # from checkpoint 4
    assert_same_run(workplace, uninterrupted)


def test_kill_in_the_middle_of_a_save(workplace: object, uninterrupted: object) -> None:
    assert interrupted(workplace, "kill-save", 8).returncode == -9
    torn = workplace.path() / "checkpoints" / "checkpoint-8"
    assert torn.exists()
    assert not (torn / "COMPLETE").exists()
    _, err = workplace.run("--resume")
    assert "checkpoint-8 was not written to its end" in err
    assert_same_run(workplace, uninterrupted)


def test_a_full_disk_says_so_and_resumes(workplace: object, uninterrupted: object) -> None:
    stopped = interrupted(workplace, "full-save", 8)
    assert stopped.returncode == 1
    assert "the disk is full; free some space" in stopped.stderr
    assert f"fastlora run {workplace.recipe} --resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    workplace.run("--resume")
    assert_same_run(workplace, uninterrupted)


def test_resume_refuses_another_recipe_or_other_data(workplace: object) -> None:
    assert interrupted(workplace, "SIGINT", 2).returncode == 130
    _, err = workplace.run("--resume", "--set", "train.lr=1e-3", "--set", "lora.rank=8", expect=1)
    assert "train.lr: was 0.002, now 0.001" in err
    assert "lora.rank: was 4, now 8" in err
    with (workplace.folder / "rows.jsonl").open("a") as file:
        file.write(
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        )
    _, err = workplace.run("--resume", expect=1)
    assert "the data have changed" in err


def test_nothing_to_resume(uninterrupted: object) -> None:
    _, err = uninterrupted.run("--resume", expect=1)
    assert "no unfinished run" in err
