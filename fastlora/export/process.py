"""Exporting a run's adapter, behind a gate: what was written must answer as the adapter does.

Runs in a process of its own (`python -m fastlora.export.process RUN KIND [QUANT]`): unsloth patches transformers
for the whole process that trained, and an export must be right for those who load it without.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.engines.peft import PeftEngine
from fastlora.errors import FastloraError, GateError, RunDirError
from fastlora.rundir.store import RunDir, drop_scratch, sync_tree, whole_folder

if TYPE_CHECKING:
    from fastlora.export.parity import Reference
    from fastlora.export.plan import Part, Plan
    from fastlora.export.stream import Checkpoint

HELD_OUT = "held_out.json"
_HELD_OUT_ROWS, _HELD_OUT_TOKENS = 8, 512
_DTYPES = {"f16": "float16", "bf16": "bfloat16"}


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


def target_of(run: RunDir, kind: str, quant: str | None) -> Path:
    """Where an export goes: RUN/merged, or RUN/gguf-QUANT."""
    return run.merged if kind == "16bit" else run.path / f"gguf-{quant}"


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


def merge_run(run: RunDir, quant: str | None = None) -> dict[str, Any]:
    """Write run.merged: base + adapter in 16 bits, with the tokenizer, read back and compared.

    Report: dtype; what `Reference.compare` measures; peak_rss_gib of this process.

    Raises GateError: it does not agree with the adapter. RunDirError: the run has no adapter.
    """
    from fastlora.export.merge import merged_dtype, write_merged
    from fastlora.export.names import Named, empty_model
    from fastlora.export.parity import SIXTEEN_BITS, load_whole, problems, streamed
    from fastlora.export.rounding import wrong_weights

    plan = open_plan(run)
    dtype = merged_dtype(plan, _DTYPES[quant] if quant else None)
    reference = reference_of(run, plan)
    with whole_folder(run.merged) as folder:
        write_merged(plan, folder, dtype, run.manifest["stop_token_ids"])
        if plan.fused:
            whole = load_whole(folder, plan.trust_remote_code, reference.device)
            report = reference.compare(_of_whole(whole, reference))
        else:
            again = empty_model(folder, plan.trust_remote_code)
            report = reference.compare(streamed(again, Named(folder, again).weight))
        found = [*wrong_weights(plan, _written(plan, folder)), *problems(report, SIXTEEN_BITS)]
        gate(folder, run.merged, found, "merged model")
    return {"dtype": dtype, **report, **notes_of(plan), "peak_rss_gib": peak_rss_gib()}


def _written(plan: Plan, folder: Path) -> Iterator[tuple[Part, str, Callable[[], Any]]]:
    from fastlora.export.stream import Checkpoint, row_blocks

    read = Checkpoint(folder)
    for name, part in plan.parts.items():
        kind = {"bfloat16": "BF16", "float16": "F16"}.get(read.stored[name].dtype, "F32")
        whole = part.edit is not None and part.edit.needs_all_rows
        blocks = [(0, None)] if whole else list(row_blocks(plan.shape(part)))
        yield part, kind, partial(_rows, read, name, blocks)


def _rows(read: Checkpoint, name: str, blocks: list[Any]) -> Iterator[Any]:
    return (read.rows(name, start, stop) for start, stop in blocks)


def _of_whole(model: Any, reference: Reference) -> Callable[[Any], Any]:
    from fastlora.export.forward import logits_of

    return lambda batch: logits_of(model, batch, reference.device)


def open_plan(run: RunDir) -> Plan:
    """Raises RunDirError: the run has no adapter. EngineError: base and adapter do not fit."""
    from fastlora.export.plan import Plan
    from fastlora.export.stream import base_folder

    run.require_adapter()
    model = run.manifest["recipe"]["model"]
    folder = base_folder(model["name"], model["revision"])
    return Plan(folder, run.adapter, model["trust_remote_code"])


def notes_of(plan: Plan, *others: str) -> dict[str, Any]:
    """The entry of a report that holds what its reader is to be told, if there is anything."""
    notes = [note for note in others if note]
    if plan.checkpoint.is_quantized:
        notes.append(
            f"{plan.base} is quantized on disk: its weights were dequantized, and carry that quantization's error "
            "into the export; name the 16-bit original as model.name to avoid it"
        )
    return {"notes": notes} if notes else {}


def reference_of(run: RunDir, plan: Plan) -> Reference:
    from fastlora.export.answers import read_answers
    from fastlora.export.parity import Reference, choose_rows

    answers, held_out = [], []
    if (run.path / "answers.json").exists():
        asked, given, _ = read_answers(run.path / "answers.json")
        answers = [(question.prompt_ids, ids) for question, ids in zip(asked, given, strict=True)]
    if (run.path / HELD_OUT).exists():
        held_out = json.loads((run.path / HELD_OUT).read_text(encoding="utf-8"))
    vocabulary = int(plan.model.config.get_text_config(decoder=True).vocab_size)
    rows = choose_rows(run.manifest["probe_ids"], answers, held_out, vocabulary)
    return Reference(plan, rows)


def save_held_out(run: RunDir, rows: Any) -> None:
    """Keep some of the held-out rows' tokens, for the exports of the run to be compared on."""
    kept = rows.select(range(min(_HELD_OUT_ROWS, len(rows))))["input_ids"]
    text = json.dumps([list(ids)[:_HELD_OUT_TOKENS] for ids in kept])
    (run.path / HELD_OUT).write_text(text + "\n", encoding="utf-8")


def gate(folder: Path, target: Path, found: list[str], what: str) -> None:
    """Raises GateError where anything was found, with what was written kept as TARGET.diverged."""
    if not found:
        return
    kept = target.with_name(f"{target.name}.diverged")
    for file in folder.glob("*.gguf"):
        file.rename(file.with_suffix(".diverged.gguf"))
    sync_tree(folder)
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    raise GateError(
        f"the {what} does not agree with the adapter: {'; '.join(found)}. It was kept as {kept}"
    )


def peak_rss_gib() -> float:
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main(run_path: str, kind: str, quant: str | None = None) -> int:
    """Prints the report, or {"error": ...}, as one line of JSON; progress goes to stderr."""
    results, sys.stdout = sys.stdout, sys.stderr
    PeftEngine().prepare()
    run = RunDir(Path(run_path))
    run.manifest = json.loads(run.manifest_path.read_text(encoding="utf-8"))
    try:
        if kind == "16bit":
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
