"""The run directory.

    runs/llama31/3/
      manifest.json   recipe as resolved, versions, data, GPU, seed, commit, fallbacks, result
      metrics.jsonl   one line per logged step
      loss.png
      answers.json, comparison.json   prompts answered before and after: see fastlora.export.answers
      report.html     all of it in one page
      checkpoints/checkpoint-N/   with the file COMPLETE, written last
      adapter/        PEFT format
      merged/         the merged model, if asked for

A second run never writes into a first: runs are numbered, and the number is taken by mkdir.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlora.errors import RunDirError

COMPLETE = "COMPLETE"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, flush to the disk, rename: a reader sees the old content or the new, never half.
    Text becomes UTF-8."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A rename or a new file survives a power cut only once its folder is flushed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a scratch folder to fill; it becomes `target` when all of it is on the disk."""
    drop_scratch(target)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        sync_tree(scratch)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def drop_scratch(target: Path) -> None:
    """Remove what processes that were killed had written of `target`."""
    from psutil import pid_exists

    for scratch in target.parent.glob(f".{glob.escape(target.name)}.*"):
        pid = scratch.suffix[1:]
        if pid.isdecimal() and not pid_exists(int(pid)):
            shutil.rmtree(scratch, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is a full disk. safetensors and torch put the text in a
    RuntimeError of their own, so the text is looked at too."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if (
            "No space left on device" in text
            or "os error 28" in text
            or "file write failed" in text
        ):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


def check_place(parent: Path) -> None:
    """Find out whether a run can be made under `parent`, and leave nothing there.

    Raises RunDirError: it cannot.
    """
    try:
        existing = next(place for place in (parent, *parent.absolute().parents) if place.exists())
        os.rmdir(tempfile.mkdtemp(prefix=".fastlora-", dir=existing))
    except OSError as error:
        raise _no_place(parent, error) from None


def _no_place(parent: Path, error: OSError, remedy: str = "set output.dir") -> RunDirError:
    return RunDirError(f"{parent}: a run cannot be made here: {error.strerror}; {remedy}")


def make_folder(folder: Path, remedy: str) -> None:
    """Make `folder` if need be. Raises RunDirError, with `remedy`, where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".fastlora-", dir=folder))
    except OSError as error:
        raise _no_place(folder, error, remedy) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock on the file `path`. It is left there: another may be waiting for it."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def new_folder(parent: Path, remedy: str = "set output.dir") -> Path:
    """Make and return parent/N with the next free number. Raises RunDirError, with `remedy`, where that
    cannot be."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name) for path in _runs(parent)), default=0)
        while True:
            number += 1
            try:
                (parent / str(number)).mkdir()
                return parent / str(number)
            except FileExistsError:
                continue
    except OSError as error:
        raise _no_place(parent, error, remedy) from None


class RunDir:
    """One run's folder, locked for as long as the process lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}
        self._lock: int | None = None

    @classmethod
    def create(cls, parent: Path) -> RunDir:
        """Take the next free number under `parent`. Raises RunDirError where that is not writable."""
        run = cls(new_folder(parent))
        run.checkpoints.mkdir()
        run._take_lock()
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """The run in `path`. Raises RunDirError: not a run's folder, or in use."""
        run = cls(path)
        run._read_manifest()
        run._take_lock()
        return run

    @classmethod
    def look(cls, path: Path) -> RunDir:
        """The run in `path`, to be read only, also while a process trains there. Raises RunDirError: not a run's
        folder."""
        run = cls(path)
        run._read_manifest()
        return run

    @classmethod
    def newest_finished(cls, parent: Path) -> RunDir:
        """To be read only. Raises RunDirError: no run under `parent` has finished."""
        for path in sorted(_runs(parent), key=lambda path: -int(path.name)):
            with contextlib.suppress(RunDirError):
                run = cls.look(path)
                if run.manifest.get("status") == "finished":
                    return run
        raise RunDirError(f"{parent}: no finished run")

    @classmethod
    def open_unfinished(
        cls, parent: Path, unlike: Callable[[dict[str, Any]], list[str]] = lambda _: []
    ) -> RunDir:
        """The newest run under `parent` that did not finish; one with a checkpoint before one without.

        `unlike`: why the run of a manifest is not to be taken; nothing if it is.

        Raises RunDirError: there is none. It names the unfinished ones, with the reasons against them.
        """
        candidates, refused = [], []
        for path in sorted(_runs(parent), key=lambda path: -int(path.name)):
            run = cls(path)
            if not run.manifest_path.exists():
                continue  # stopped before it had begun
            try:
                run._read_manifest()
            except RunDirError as error:
                refused.append(str(error))
                continue
            if run.manifest.get("status") != "finished":
                if why := unlike(run.manifest):
                    refused.append("\n  ".join([f"{path}:", *why]))
                else:
                    candidates.append(run)
        for run in sorted(candidates, key=lambda run: not run.complete_checkpoints()):
            try:
                run._take_lock()
            except RunDirError as error:
                refused.append(str(error))
                continue
            run._read_manifest()  # a live process may have finished it since
            if run.manifest.get("status") != "finished":
                return run
            run.close()
        message = f"{parent}: no unfinished run of this recipe to resume; leave out --resume to start a new one"
        raise RunDirError("\n".join([message, *refused]))

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    def _read_manifest(self) -> None:
        try:
            self.manifest = dict(json.loads(self.manifest_path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            why = "holds no manifest.json" if isinstance(error, FileNotFoundError) else error
            raise RunDirError(f"{self.path}: not a run's folder ({why})") from None

    def _take_lock(self) -> None:
        try:
            self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise RunDirError(
                f"{self.path}: cannot be written: {error.strerror}; make it writable, or copy it and name the copy"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RunDirError(
                f"{self.path}: another process is at work here (training or exporting); wait for it or stop it"
            ) from None

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def require_adapter(self) -> None:
        """Raises RunDirError: the run has not come to its adapter, or the adapter is gone or damaged."""
        way_on = self.manifest.get("resume_command")
        if "result" not in self.manifest:
            raise RunDirError(
                f"{self.path}: holds no adapter; the run has not finished"
                + (f"; go on with:\n  {way_on}" if way_on else "")
            )
        from safetensors import SafetensorError, safe_open

        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (self.adapter / name).exists():
                raise RunDirError(
                    f"{self.path}: its adapter is gone: no {self.adapter / name}; put it back, or train again"
                )
        try:
            json.loads((self.adapter / "adapter_config.json").read_bytes())
            with safe_open(self.adapter / "adapter_model.safetensors", framework="np"):
                pass
        except (OSError, ValueError, SafetensorError) as error:
            raise RunDirError(
                f"{self.path}: its adapter is damaged ({error}); put {self.adapter} back from a copy, or train again"
            ) from None

    def update(self, **entries: Any) -> None:
        """Set manifest entries and write it."""
        self.manifest.update(entries)
        write_atomic(self.manifest_path, json.dumps(self.manifest, indent=2, default=str) + "\n")

    def record_export(self, quant: str, report: dict[str, Any]) -> None:
        """Set the manifest's entry for the GGUF file of that type."""
        self.update(export=self.manifest.get("export", {}) | {quant: report})

    def append_metrics(self, entry: dict[str, Any]) -> None:
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line; a line torn by a crash is left out."""
        entries = []
        if self.metrics_path.exists():
            for line in self.metrics_path.read_text(
                encoding="utf-8", errors="replace"
            ).splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    continue
        return entries

    def rewind_metrics(self, step: int, owes_evaluation: bool = False) -> None:
        """Forget what was logged after `step`, or by the evaluation at it if that is owed: a resumed run
        logs it again."""
        kept = [
            entry
            for entry in self.read_metrics()
            if (entry.get("step", 0), owes_evaluation and "eval_loss" in entry) <= (step, False)
        ]
        write_atomic(self.metrics_path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of each checkpoint that was written to its end, oldest first."""
        found = []
        for path in self.checkpoints.glob("checkpoint-*"):
            step = path.name.rpartition("-")[2]
            if step.isdecimal() and (path / COMPLETE).exists():
                found.append((int(step), path))
        return sorted(found)

    def mark_complete(self, checkpoint: Path) -> None:
        """Flush every file of the checkpoint to the disk, then say so in it."""
        sync_tree(checkpoint)
        write_atomic(checkpoint / COMPLETE, "")

    def drop_incomplete_checkpoints(self) -> list[Path]:
        """Remove what a crash left half-written; returns what was removed."""
        whole = {path for _, path in self.complete_checkpoints()}
        torn = [path for path in self.checkpoints.glob("checkpoint-*") if path not in whole]
        for path in torn:
            shutil.rmtree(path, ignore_errors=True)
        return torn

    def rotate(self, keep: int, best_step: int | None) -> None:
        """Remove all but the newest `keep` complete checkpoints and the best one."""
        complete = self.complete_checkpoints()
        for step, path in complete[:-keep]:
            if step != best_step:
                (path / COMPLETE).unlink(
                    missing_ok=True
                )  # first: a crash must not leave half a checkpoint marked whole
                shutil.rmtree(path, ignore_errors=True)


def _runs(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from (path for path in parent.iterdir() if path.name.isdecimal() and path.is_dir())
