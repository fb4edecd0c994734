"""Exporting a run's adapter, behind a gate: what was written must answer as the adapter does.

Runs in a process of its own (`python -m fastlora.export.process RUN KIND [QUANT]`): unsloth patches transformers
for the whole process that trained, and an export must be right for those who load it without.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastlora.engines.peft import PeftEngine
from fastlora.errors import FastloraError, GateError, RunDirError
from fastlora.export.gated import target_of
from fastlora.rundir.store import RunDir, drop_scratch


def refuse_unfinished(run: RunDir) -> None:
    """Raises RunDirError: the run has no adapter yet, or has not yet answered with it."""
    run.require_adapter()
    if "after" not in run.manifest.get("answers", ["after"]):
        raise RunDirError(
            f"{run.path}: the run has not finished; go on with:\n  {run.manifest.get('resume_command')}"
        )


def is_complete(run: RunDir) -> bool:
    """Whether a run that was trained holds every export that its recipe asks for."""
    output, made = run.manifest["recipe"]["output"], run.manifest
    merged = output["merge"] == "none" or "merge" in made
    return merged and set(output.get("export", ())) <= set(made.get("export", {}))


def command_of(run: RunDir, kind: str, quant: str | None) -> str:
    if kind == "16bit" and quant is None:
        return shlex.join(["fastlora", "merge", str(run.path)])
    typed = ["fastlora", "export", str(run.path), "--format", kind]
    return shlex.join([*typed, *(["--quant", quant] if quant else [])])


def export_in_new_process(run: RunDir, kind: str, quant: str | None = None) -> dict[str, Any]:
    """Export the run's adapter; returns the report of `merge_run` or `gguf_run`.

    Raises GateError: what was written does not agree with the adapter; it is kept under a name that says so.
    FastloraError: anything else.
    """
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("UNSLOTH_")
    }
    # -P: in a checkout, the folder kernels/ must not pass for a module. A session of its own: Ctrl-C is for
    # this process, which then ends that one.
    arguments = [str(run.path), kind, *([quant] if quant else [])]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fastlora.export.process", *arguments],
            stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
    finally:
        # Of a process that was killed, by us or for want of memory.
        drop_scratch(target_of(run, kind, quant))
    lines = done.stdout.strip().splitlines()
    try:
        document = json.loads(lines[-1]) if lines else {}
    except ValueError:
        document = {}
    if done.returncode == 0:
        return dict(document)
    message = document.get("error", f"the exporting process ended with status {done.returncode}")
    again = f"the adapter is safe in {run.adapter}; try again with: {command_of(run, kind, quant)}"
    error = GateError if done.returncode == GateError.exit_code else FastloraError
    raise error(f"{'merge' if kind == '16bit' else 'export'}: {message}\n{again}")


def main(run_path: str, kind: str, quant: str | None = None) -> int:
    """Prints the report, or {"error": ...}, as one line of JSON; progress goes to stderr."""
    results, sys.stdout = sys.stdout, sys.stderr
    PeftEngine().prepare()
    run = RunDir(Path(run_path))
    run.manifest = json.loads(run.manifest_path.read_text(encoding="utf-8"))
    try:
        if kind == "16bit":
            from fastlora.export.merge_run import merge_run

            document, code = merge_run(run, quant), 0
        else:
            from fastlora.export.gguf_run import gguf_run

            document, code = gguf_run(run, quant or "q8_0"), 0
    except FastloraError as error:
        document, code = {"error": str(error)}, error.exit_code
    except Exception as error:
        document, code = {"error": f"{type(error).__name__}: {error}"}, 1
    print(json.dumps(document), file=results)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
