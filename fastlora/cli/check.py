from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastlora.cli.options import json_option, settings_option
from fastlora.errors import EngineError
from fastlora.recipe import library

if TYPE_CHECKING:
    from fastlora.check.check import Report


@click.command("check")
@click.argument("recipe")
@settings_option("check.near_similarity=0.9")
@click.option(
    "--write-clean",
    "clean",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PATH",
    help="Write the rows without an error to PATH (.jsonl), and the others, each with why, to PATH.removed.jsonl.",
)
@json_option
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
        _print(report, recipe, settings, written)
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


def _print(
    report: Report, name: str, settings: tuple[str, ...], written: dict[str, Any] | None
) -> None:
    from rich.console import Console

    from fastlora.check.show import show

    show(report, Console())
    if report.refused and not written:
        clean = _typed("check", name, settings)
        click.echo(f"\nfor the rows without an error:\n  {clean} --write-clean clean.jsonl")
    if written:
        click.echo(
            f"\n{written['rows_kept']:,} rows written to {', '.join(written['files'])}\n"
            f"{written['rows_removed']:,} rows removed, with the reasons: {written['removed']}"
        )
        given = {setting.partition("=")[0] for setting in written["settings"]}
        kept = [one for one in settings if one.partition("=")[0].strip() not in given]
        click.echo(f"train on them with:\n  {_typed('run', name, [*kept, *written['settings']])}")


def _typed(command: str, name: str, settings: Sequence[str]) -> str:
    parts = [part for setting in settings for part in ("--set", setting)]
    return shlex.join(["fastlora", command, name, *parts])
