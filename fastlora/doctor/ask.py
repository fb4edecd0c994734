"""Asks fastlora.doctor.probe, and survives what it does not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.doctor.probe import BEGINS

SECONDS = 180.0
"""For all steps of one process. trl and unsloth take a good part of a minute on a slow disk."""

Answers = dict[str, dict[str, Any]]
"""step -> its result, or {"error": why there is none, "absent": whether the package is not there}."""


def ask(
    steps: Sequence[str], seconds: float = SECONDS, environment: Mapping[str, str] | None = None
) -> Answers:
    """What came of each step. One that ends its process, or does not end, costs itself alone."""
    answers: Answers = {}
    left = list(steps)
    while left:
        found, why = _one_process(left, seconds, environment or {})
        answers |= found
        left = [step for step in left if step not in found]
        if left:  # they come in turn, so the first of them was at work
            answers[left[0]] = {"error": why, "absent": False}
            left = left[1:]
    return answers


def _one_process(
    steps: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[Answers, str]:
    """The answers it came to, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="fastlora-doctor-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fastlora.doctor.probe", *steps],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **environment},
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
                why = _ended(code)
            except subprocess.TimeoutExpired:
                why = f"no answer within {seconds:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = err.read_text(encoding="utf-8", errors="replace").rpartition(BEGINS)[2].splitlines()
        lines = out.read_text(encoding="utf-8", errors="replace").splitlines()
    answers: Answers = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # cut off
            answer = json.loads(line)
            if "result" in answer or "error" in answer:
                answers[answer["step"]] = answer.get("result", answer)
    return answers, why + (f" ({said[-1][:200]})" if said[1:] else "")


def _ended(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"it ended its process with code {code}"
