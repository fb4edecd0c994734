"""From a run to its merged model, behind the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.export.gated import gate, notes_of, open_plan, peak_rss_gib, reference_of
from fastlora.rundir.store import RunDir, whole_folder

if TYPE_CHECKING:
    from fastlora.export.parity import Reference
    from fastlora.export.plan import Part, Plan
    from fastlora.export.stream import Checkpoint

_DTYPES = {"f16": "float16", "bf16": "bfloat16"}


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
