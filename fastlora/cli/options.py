"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


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
