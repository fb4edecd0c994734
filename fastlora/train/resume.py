"""Which run `--resume` goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir


def open_for_resume(recipe: Recipe) -> RunDir:
    """The newest unfinished run of this recipe, locked; one with a checkpoint before one without.

    Raises RunDirError: there is none; of other unfinished runs it says why not.
    """
    now = recipe.model_dump(mode="json")
    return RunDir.open_unfinished(
        Path(recipe.output.dir), lambda manifest: changed_keys(manifest.get("recipe"), now)
    )


def changed_keys(then: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """A line for each key in which two recipes, as in a manifest, differ."""
    if then is None:
        return ["it ended before it had begun"]
    before, after = _flat(then), _flat(now)
    # Two ways to write output.dir (runs, ./runs) lead to the same runs.
    return [
        f"{key}: was {before.get(key)!r}, now {value!r}"
        for key, value in after.items()
        if key != "output.dir" and before.get(key) != value
    ]


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in recipe.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat
