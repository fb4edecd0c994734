from __future__ import annotations

import json
import sys

import click

from fastlora.cli.options import json_option

_COLOURS = {"ok": "green", "warn": "yellow", "wrong": "red"}


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Check this machine: versions, GPU, a kernel, folders, and the models in the cache.

    The last line names the first thing to mend, and how. Exit code 1: something is wrong.
    """
    from dataclasses import asdict

    from fastlora.doctor import examine, first_to_mend

    checks = examine()
    first = first_to_mend(checks)
    if as_json:
        document = {
            "checks": [asdict(check) for check in checks],
            "first_to_mend": None if first is None else asdict(first),
        }
        click.echo(json.dumps(document))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            status = click.style(f"{check.status:<5}", fg=_COLOURS[check.status])
            click.echo(f"{status}  {check.name:<{width}}  {check.found}")
        if first is None:
            click.echo("\nall is well")
        else:
            click.echo(f"\nfirst mend {first.name}: {first.found}\n  {first.remedy}")
    sys.exit(any(check.status == "wrong" for check in checks))
