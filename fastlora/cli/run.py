from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from fastlora.cli.export import agreement
from fastlora.cli.options import json_option, settings_option
from fastlora.errors import UsageError
from fastlora.recipe import library


@click.command("run")
@click.argument("recipe")
@settings_option("lora.rank=32")
@click.option("--resume", is_flag=True, help="Go on with the newest unfinished run of this recipe.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Go as far as the first step: data, a row, counts, model and kernels; leave nothing behind.",
)
@click.option(
    "--auto",
    is_flag=True,
    help="Fill what the recipe leaves open by rules on its data; every value and reason is recorded.",
)
@json_option
def command(
    recipe: str,
    settings: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    auto: bool,
    as_json: bool,
) -> None:
    """Train an adapter as RECIPE says: a bundled name (see `fastlora recipes`) or a .toml file.

    File paths in a recipe are taken from its own folder; those in --set, and output.dir, from here.
    """
    from fastlora.train.stop import Interrupted, StopSignals

    if dry_run and resume:
        raise UsageError("--dry-run and --resume: give one of them; a dry run trains nothing")
    try:
        # Libraries print banners to stdout, which is for results.
        with StopSignals(), contextlib.redirect_stdout(sys.stderr):
            document = _run(recipe, settings, resume, dry_run, auto)
    except Interrupted as stopped:
        if not stopped.told:
            click.echo(f"stopped by {stopped} before the first step; nothing was changed", err=True)
        sys.exit(stopped.exit_code)
    if as_json:
        click.echo(json.dumps(document, default=str))
    elif not dry_run:
        _print_result(document)


def _run(
    recipe: str, settings: tuple[str, ...], resume: bool, dry_run: bool, auto: bool
) -> dict[str, Any]:
    from fastlora.recipe.load import load_recipe

    path = library.find(recipe)
    loaded = load_recipe(path, settings)

    from rich.console import Console

    from fastlora.train.session import Request, train_run
    from fastlora.train.session import dry_run as rehearse

    # A bundled recipe's path may lie deep in an environment; its name resumes it as well.
    name = recipe if recipe in library.bundled() else str(path)
    request = Request(loaded, name, settings, resume, auto)
    console = Console(stderr=True)
    return rehearse(request, console) if dry_run else train_run(request, console)


def _print_result(manifest: dict[str, Any]) -> None:
    from fastlora.rundir.sections import exports, held_out_losses

    result = manifest["result"]
    click.echo(f"run       {manifest['path']}")
    click.echo(
        f"loss      {result['first_loss']:.4f} -> {result['last_loss']:.4f} in {result['steps']} steps"
    )
    began = manifest.get("eval_before", {})
    if result["eval_losses"]:
        said = held_out_losses(result["eval_losses"], began.get("loss"), " -> ")
        click.echo(f"held out  {said}")
    before = began.get("by_source", {})
    for label, losses in result["eval_losses_by_source"].items():
        from_base = f"{before[label]:.4f} before training -> " if label in before else ""
        click.echo(f"  {label}: {from_base}{losses[-1]:.4f} at the end")
    memory = f", peak {result['peak_reserved_gib']:.2f} GiB" if result["peak_reserved_gib"] else ""
    click.echo(
        f"speed     {result['tokens_per_s_median']:,.0f} tokens/s{memory}, {result['seconds']:.0f} s"
    )
    if answers := manifest.get("answers"):
        _print_answers(answers, Path(manifest["path"]) / "comparison.json")
    click.echo(f"adapter   {manifest['path']}/adapter")
    for folder, report in exports(manifest).items():
        click.echo(f"{folder:<9} {manifest['path']}/{folder} ({agreement(report)})")
    click.echo(f"report    {manifest['path']}/report.html")


_SHOWN_ANSWERS = 3


def _print_answers(answers: dict[str, Any], compared: Path) -> None:
    """The scores, and the first prompts with their answers, a line each."""
    from fastlora.rundir.sections import shown_score

    for metric, before in answers["before"].items():
        rows = answers["rows"] if metric == "json_valid" else answers["expected"]
        name, after = metric.partition("_")[0], answers["after"].get(metric)
        now = "" if after is None else f" -> {shown_score(metric, after)}"
        click.echo(f"{name:<8}  {shown_score(metric, before)}{now} of {rows} prompts")
    click.echo(f"answers   {compared} ({answers['rows']} prompts, before and after)")
    whole = [row for row in json.loads(compared.read_text(encoding="utf-8")) if "after" in row]
    for row in whole[:_SHOWN_ANSWERS]:
        click.echo(f"  {_brief(row['prompt'], from_end=True)}")
        for name in ("before", "after", "expected"):
            if name in row:
                click.echo(f"    {name:<8}  {_brief(row[name])}")


def _brief(text: str, *, from_end: bool = False) -> str:
    """One line of it."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    if len(line) <= 90:
        return line
    return "..." + line[-87:] if from_end else line[:87] + "..."
