from __future__ import annotations

import json

import click

from fastlora.recipe import library


@click.command("recipes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(name: str | None, as_json: bool) -> None:
    """List the bundled recipes, or show the recipe NAME.

    Save one to a file and change it: fastlora recipes llama31 > mine.toml
    """
    if name is not None:
        text = library.text(library.find(name))
        click.echo(json.dumps({"name": name, "toml": text}) if as_json else text, nl=as_json)
        return
    described = {name: library.describe(path) for name, path in library.bundled().items()}
    if as_json:
        click.echo(
            json.dumps([{"name": name, "about": about} for name, about in described.items()])
        )
        return
    width = max(map(len, described))
    for name, about in described.items():
        click.echo(f"{name:<{width}}  {about[0] if about else ''}")
