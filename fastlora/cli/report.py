from __future__ import annotations

import json

import click

from fastlora.cli.options import json_option
from fastlora.errors import RunDirError


@click.command("report")
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Write report.html in the folder of RUN from what it holds now. RUN is a run's folder, such as runs/tiny/1, or a
    recipe, for its newest finished run.

    A run writes it when it ends. This does it again: after a merge, or while the run goes on.
    """
    from fastlora.rundir.find import find_run
    from fastlora.rundir.report import write_report

    try:
        page = write_report(find_run(run))
    except OSError as error:
        raise RunDirError(
            f"{run}: the report cannot be written: {error.strerror or error}"
        ) from None
    click.echo(json.dumps({"report": str(page)}) if as_json else f"report    {page}")
