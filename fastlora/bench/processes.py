"""A process for each arm: engines patch their libraries for the whole process, and an arm may die."""

from __future__ import annotations

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


class Failed(Exception):
    """The process brought no result. `status`: oom, timeout or failed; `told`: what it could still say."""

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
    with (
        log.open("a", encoding="utf-8") as errors,
        subprocess.Popen(
            [*command, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the group
        ) as process,
    ):
        try:
            out, _ = process.communicate(task, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise Failed("timeout", f"no answer within {timeout_s:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = out.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        answer = {"status": "failed", "detail": _last_words(log, process.returncode)}
    if answer.get("status") != "ok":
        raise Failed(answer["status"], answer["detail"], answer)
    return answer


def _last_words(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    said = f": {lines[-1]}" if lines else ""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    if code == -signal.SIGKILL:
        how += " (out of host memory?)"
    return f"the process ended with {how}{said}; see {log}"
