"""A process for each arm: engines patch their libraries for the whole process, and an arm may die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-P", "-m", "fastlora.bench.worker")
"""-P: in a checkout, the folder kernels/ must not pass for a module."""


_READ_S = 10.0
"""For what a process that was killed had said: another's that it started may hold the pipe open."""

SWITCHES = frozenset({"UNSLOTH_BLOCK_CUDAGRAPHS", "UNSLOTH_RETURN_LOGITS"})
"""Set in the user's shell they would make every arm another one."""


class Failed(Exception):
    """The process brought no result. `status`: oom, timeout or failed; `told`: what it could still say, or had said by
    then."""

    def __init__(self, status: str, detail: str, told: Mapping[str, Any] | None = None) -> None:
        self.status, self.detail, self.told = status, detail, dict(told or {})
        super().__init__(detail)


def run_worker(
    kind: str,
    task: str,
    *,
    log: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = COMMAND,
) -> dict[str, Any]:
    """Run `worker.py kind` on a task (JSON) and return what it answers.

    Its stderr, with that of the libraries, goes to `log`. Raises Failed; whatever else is raised meanwhile,
    the process is ended first.
    """
    began = log.stat().st_size if log.exists() else 0
    inherited = {key: value for key, value in os.environ.items() if key not in SWITCHES}
    with (
        log.open("a", encoding="utf-8") as errors,  # an arm's frontier goes on in its log
        subprocess.Popen(
            [*command, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**inherited, **(environment or {})},
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the group
        ) as process,
    ):
        try:
            out, _ = process.communicate(task, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            out = _rest(process)
            said = _answer(out)
            if said is None or said["status"] != "ok":  # else it only could not end
                detail = f"no answer within {timeout_s:.0f} s"
                raise Failed("timeout", detail, said) from None
        finally:
            _end(process)
    answer = _answer(out)
    if answer is None or answer["status"] == "partial":
        raise Failed("failed", _last_words(log, began, process.returncode), answer)
    if answer["status"] != "ok":
        raise Failed(answer["status"], answer["detail"], answer)
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    """With all that it started in its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _rest(process: subprocess.Popen[str]) -> str:
    """What it had said by its end."""
    try:
        return process.communicate(timeout=_READ_S)[0]
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""  # bytes, whatever the pipe's mode
        return said.decode(errors="replace") if isinstance(said, bytes) else said


def _answer(out: str) -> dict[str, Any] | None:
    """Of all lines that are one, the later over the earlier, which were partial; a library may write between them."""
    said: dict[str, Any] = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "status" in found:
                said |= found
    return said or None


def _last_words(log: Path, began: int, code: int) -> str:
    written = log.read_bytes()[began:].decode("utf-8", errors="replace")
    lines = [line for line in written.splitlines() if line.strip()]
    said = f": {lines[-1]}" if lines else ""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    if code == -signal.SIGKILL:
        how += " (out of host memory?)"
    return f"the process ended with {how}{said}; see {log}"
