from __future__ import annotations

import json
from pathlib import Path

import click

from fastlora.errors import RunDirError


@click.command("report")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(run: Path, as_json: bool) -> None:
    """Write RUN/report.html (RUN is a run's folder, such as runs/tiny/1) from what the run holds now.

    A run writes it when it ends. This does it again: after a merge, or while the run goes on.
    """
    from fastlora.rundir.report import write_report
    from fastlora.rundir.store import RunDir

    try:
        page = write_report(RunDir.look(run))
    except OSError as error:
        raise RunDirError(f"{run}: the report cannot be written: {error}") from None
    click.echo(json.dumps({"report": str(page)}) if as_json else f"report    {page}")
