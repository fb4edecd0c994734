"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fastlora.recipe.units import gib_of


def settings_option(example: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Change a key, e.g. --set {example}.",
    )


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
)


def gib(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """An option's amount of memory, e.g. 24GiB."""
    found = None if value is None else gib_of(value)
    if value is not None and found is None:
        raise click.BadParameter(f"{value!r} is not an amount of memory; write 24GiB")
    return found
