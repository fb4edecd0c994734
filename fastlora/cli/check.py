from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastlora.errors import EngineError
from fastlora.recipe import library

if TYPE_CHECKING:
    from fastlora.check.check import Report


@click.command("check")
@click.argument("recipe")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key, e.g. --set check.near_similarity=0.9.",
)
@click.option(
    "--write-clean",
    "clean",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PATH",
    help="Write the rows without an error to PATH (.jsonl), and the others, each with why, to PATH.removed.jsonl.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(recipe: str, settings: tuple[str, ...], clean: Path | None, as_json: bool) -> None:
    """Say what is wrong with the data of RECIPE, a bundled name or a .toml file, before anything is trained.

    Needs the tokenizer of the model, not its weights; without one, what needs no tokens is checked all the same.
    Exits with 3 when a gate of the recipe's [check] is not met. The sources are never changed.
    """
    with contextlib.redirect_stdout(sys.stderr):  # libraries print banners there
        report, written = _check(recipe, settings, clean)
    if as_json:
        document = {"recipe": recipe, **report.document(), "clean": written}
        click.echo(json.dumps(document))
    else:
        _print(report, recipe, written)
    if not report.passed:
        sys.exit(3)


def _check(
    name: str, settings: tuple[str, ...], clean: Path | None
) -> tuple[Report, dict[str, Any] | None]:
    from fastlora.recipe.load import load_recipe

    recipe = load_recipe(library.find(name), settings)

    from fastlora.check.check import check_data
    from fastlora.check.clean import plan_files, write_clean
    from fastlora.engines.base import load_tokenizer

    files = plan_files(clean, recipe) if clean else {}
    tokenizer, missing = None, ""
    try:
        tokenizer = load_tokenizer(recipe.model)
    except EngineError as error:
        missing = str(error)
    report = check_data(recipe, tokenizer, no_tokenizer=missing)
    return report, write_clean(report, clean, files, recipe) if clean else None


def _print(report: Report, name: str, written: dict[str, Any] | None) -> None:
    from rich.console import Console

    from fastlora.check.show import show

    show(report, Console())
    if written:
        click.echo(
            f"\n{written['rows_kept']:,} rows written to {', '.join(written['files'])}\n"
            f"{written['rows_removed']:,} rows removed, with the reasons: {written['removed']}"
        )
        typed = [part for setting in written["settings"] for part in ("--set", setting)]
        click.echo(f"train on them with:\n  {shlex.join(['fastlora', 'run', name, *typed])}")
