"""HTML pages that hold everything they show: one file, opened anywhere, also without a network."""

from __future__ import annotations

from typing import Any


def render(template: str, **context: Any) -> str:
    """`template`: its path inside the package fastlora. Every string of the context is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastlora", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)
