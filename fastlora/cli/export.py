from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fastlora.cli.options import json_option
from fastlora.errors import UsageError

QUANTS = ("f16", "bf16", "q8_0", "q4_k_m")


@click.command("export")
@click.argument("run")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["gguf", "16bit"]),
    required=True,
    help="GGUF for llama.cpp and Ollama, or safetensors as `fastlora merge` writes them.",
)
@click.option(
    "--quant",
    type=click.Choice(QUANTS),
    help="Type of the weights [default: q8_0; 16bit: the base's own].",
)
@json_option
def command(run: str, kind: str, quant: str | None, as_json: bool) -> None:
    """Write the adapter of RUN, with its base, in a format for others. RUN is a run's folder, such as runs/tiny/1, or
    a recipe, for its newest finished run.

    What was written is read back and compared with the adapter before it gets its name. Exit code 3: it does
    not agree; it is kept under a name that says so.
    """
    if kind == "16bit" and quant in ("q8_0", "q4_k_m"):
        raise UsageError(
            f"--quant {quant}: --format 16bit has f16 and bf16; {quant} is a type of --format gguf"
        )
    export(run, kind, quant if kind == "16bit" else quant or "q8_0", as_json)


def export(run: str, kind: str, quant: str | None, as_json: bool) -> None:
    from fastlora.train.stop import Interrupted, StopSignals

    try:
        with StopSignals():
            report, path = _export(run, kind, quant)
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    if as_json:
        click.echo(json.dumps({"path": str(path), **report}))
        return
    click.echo(f"{'merged' if kind == '16bit' else 'gguf':<9} {path} ({agreement(report)})")
    for note in report.get("notes", []):
        click.echo(f"note      {note}", err=True)


def _export(run: str, kind: str, quant: str | None) -> tuple[dict[str, Any], Path]:
    from fastlora.export.gated import target_of
    from fastlora.export.process import export_in_new_process, is_complete, refuse_unfinished
    from fastlora.rundir.find import find_run
    from fastlora.rundir.report import keep_report
    from fastlora.rundir.store import RunDir

    opened = RunDir.open(find_run(run).path)
    try:
        refuse_unfinished(opened)
        report = export_in_new_process(opened, kind, quant)
        if kind == "16bit":
            opened.update(merge=report)
        else:
            opened.record_export(str(quant), report)
        if is_complete(opened):  # also where the run itself had failed in its exports
            opened.update(status="finished")
        keep_report(opened, lambda said: click.echo(said, err=True))
    finally:
        opened.close()
    return report, target_of(opened, kind, quant) / report.get("file", "")


def agreement(report: dict[str, Any]) -> str:
    """One line of what the gate measured."""
    said = f"logits within {report['logit_error']:.2%}, KL {report['kl']:.2g} nats"
    if "answers" in report:
        said += f"; {report['answers_same']} of {report['answers']} answers as the adapter's"
    return said
