from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command("merge")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(run: Path, as_json: bool) -> None:
    """Merge the adapter of RUN (a run's folder, such as runs/tiny/1) into 16-bit weights.

    The merged model is read back and compared with the adapter before it takes its place in RUN/merged.
    """
    from fastlora.train.stop import Interrupted, StopSignals

    try:
        with StopSignals():
            _merge(run, as_json)
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)


def _merge(run: Path, as_json: bool) -> None:
    from fastlora.export.merge import merge_in_new_process, refuse_unfinished
    from fastlora.rundir.store import RunDir

    opened = RunDir.open(run)
    try:
        refuse_unfinished(opened)
        report = merge_in_new_process(opened)
        opened.update(merge=report, status="finished")
    finally:
        opened.close()
    if as_json:
        click.echo(json.dumps(report))
    else:
        click.echo(f"merged    {opened.merged} (logits within {report['logit_error']:.2%})")
