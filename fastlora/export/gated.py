"""What exports of every kind begin with and end with: a run's plan and reference, and the gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import GateError
from fastlora.rundir.store import RunDir, sync_tree

if TYPE_CHECKING:
    from fastlora.export.parity import Reference
    from fastlora.export.plan import Plan

HELD_OUT = "held_out.json"
_HELD_OUT_ROWS, _HELD_OUT_TOKENS = 8, 512


def target_of(run: RunDir, kind: str, quant: str | None) -> Path:
    """Where an export goes: RUN/merged, or RUN/gguf-QUANT."""
    return run.merged if kind == "16bit" else run.path / f"gguf-{quant}"


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
    if plan.untied:
        notes.append(
            f"{plan.base} has one weight for embedding and output layer; the adapter changes them differently, and the "
            "export holds both"
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
