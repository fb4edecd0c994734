from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest

from fastlora.errors import RunDirError
from fastlora.rundir.curves import plot_loss
from fastlora.rundir.provenance import commit
from fastlora.rundir.store import (
    COMPLETE,
    RunDir,
    check_place,
    is_disk_full,
    locked,
    make_folder,
    whole_folder,
    write_atomic,
)


def test_runs_are_numbered_and_never_shared(tmp_path: Path) -> None:
    runs = [RunDir.create(tmp_path / "runs") for _ in range(3)]
    assert [run.path.name for run in runs] == ["1", "2", "3"]


def test_a_run_is_locked(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    run.update(status="running")
    with pytest.raises(RunDirError, match="another process"):
        RunDir.open_unfinished(tmp_path)
    run.close()
    assert RunDir.open_unfinished(tmp_path).path == run.path


def test_resume_takes_the_newest_unfinished(tmp_path: Path) -> None:
    for status in ("interrupted", "failed", "finished"):
        run = RunDir.create(tmp_path)
        run.update(status=status)
        run.close()
    assert RunDir.open_unfinished(tmp_path).path.name == "2"
    with pytest.raises(RunDirError, match="no unfinished run"):
        RunDir.open_unfinished(tmp_path / "elsewhere")


def test_resume_passes_by_runs_that_it_cannot_take(tmp_path: Path) -> None:
    def made(recipe: str, *, checkpoint: bool = False) -> RunDir:
        run = RunDir.create(tmp_path)
        run.update(status="failed", recipe=recipe)
        if checkpoint:
            (run.checkpoints / "checkpoint-1").mkdir()
            run.mark_complete(run.checkpoints / "checkpoint-1")
        return run

    def unlike(manifest: dict[str, str]) -> list[str]:
        return [] if manifest["recipe"] == "ours" else [f"recipe: {manifest['recipe']}"]

    runs = [made("ours"), made("ours", checkpoint=True), made("ours"), made("theirs"), made("ours")]
    for run in runs[:-1]:
        run.close()
    resumed = RunDir.open_unfinished(tmp_path, unlike)
    assert resumed.path.name == "2"  # 5 is in use, 4 another's, 3 failed before it had trained
    assert RunDir.open_unfinished(tmp_path, unlike).path.name == "3"
    (tmp_path / "6").mkdir()
    (tmp_path / "6" / "manifest.json").write_text("{")
    with pytest.raises(RunDirError) as refused:
        RunDir.open_unfinished(tmp_path, lambda _: ["not today"])
    assert f"{tmp_path}/6: not a run's folder" in str(refused.value)
    assert f"{tmp_path}/4:\n  not today" in str(refused.value)


def test_a_run_that_cannot_be_locked_or_has_no_adapter_says_why(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    run.update(resume_command="fastlora run x --resume")
    run.close()
    with pytest.raises(RunDirError, match=r"(?s)has not finished; go on with:.*fastlora run x"):
        run.require_adapter()
    run.update(result={})
    with pytest.raises(RunDirError, match="its adapter is gone"):
        run.require_adapter()
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    (run.adapter / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(RunDirError, match=r"its adapter is damaged .*put .*/adapter back"):
        run.require_adapter()
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()  # root is refused this too
    with pytest.raises(RunDirError, match="cannot be written"):
        RunDir.open(run.path)


def test_only_decimal_names_are_runs(tmp_path: Path) -> None:
    (tmp_path / "²").mkdir()
    assert RunDir.create(tmp_path).path.name == "1"


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    check_place(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "runs", Path("/proc/runs"), tmp_path / ("x" * 300)):
        with pytest.raises(RunDirError, match=r"output\.dir"):
            check_place(place)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"output\.dir"):
        RunDir.create(tmp_path / "file" / "runs")


def test_a_folder_to_write_in_is_made_or_explained(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", "go elsewhere")
    make_folder(tmp_path / "a" / "b", "go elsewhere")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(RunDirError, match="go elsewhere"):
            make_folder(place, "go elsewhere")


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock"),
        (tmp_path / "lock").open() as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_commit_is_that_of_the_code_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTLORA_COMMIT", raising=False)
    installed = tmp_path / ".venv" / "fastlora"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("")
    assert commit(installed) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / ".gitignore").write_text(".venv\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *command], check=True)
    assert commit(installed) is None
    head = commit(tmp_path)
    assert head is not None
    assert len(head) == 40
    (tmp_path / ".gitignore").write_text("")
    assert commit(tmp_path) == f"{head}+changes"


def test_atomic_write_keeps_the_old_content_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"

    def fill(content: str, fail: bool) -> None:
        with whole_folder(target) as folder:
            (folder / "weights").write_text(content)
            if fail:
                raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        fill("half", fail=True)
    assert list(tmp_path.iterdir()) == []
    fill("one", fail=False)
    with pytest.raises(OSError, match="cut"):
        fill("two", fail=True)
    assert (target / "weights").read_text() == "one"
    fill("two", fail=False)
    assert (target / "weights").read_text() == "two"


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".merged.{pid}").mkdir()
    with whole_folder(tmp_path / "merged"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"merged", f".merged.{os.getppid()}"}


def test_checkpoints_count_only_when_complete(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    for step in (5, 10, 15, 20):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("x")
        if step != 20:
            run.mark_complete(folder)
    assert [step for step, _ in run.complete_checkpoints()] == [5, 10, 15]
    assert [path.name for path in run.drop_incomplete_checkpoints()] == ["checkpoint-20"]
    run.rotate(keep=1, best_step=5)
    assert [step for step, _ in run.complete_checkpoints()] == [5, 15]
    assert not (run.checkpoints / "checkpoint-10").exists()
    assert (run.checkpoints / "checkpoint-5" / COMPLETE).exists()


def test_metrics_forget_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    for step in range(1, 6):
        run.append_metrics({"step": step, "loss": 1 / step})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [entry["step"] for entry in run.read_metrics()] == [1, 2, 3, 4, 5]
    run.rewind_metrics(3)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    run.append_metrics({"step": 3, "eval_loss": 1.0})
    run.rewind_metrics(3)
    assert len(run.read_metrics()) == 4
    run.rewind_metrics(3, owes_evaluation=True)
    assert len(run.read_metrics()) == 3


def test_a_full_disk_is_recognised_through_its_causes() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(RuntimeError("Error: I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "x")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "x"))


def test_the_loss_plot_is_a_png(tmp_path: Path) -> None:
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    plot_loss(entries, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
