"""Which run `--resume` goes on with."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

from fastlora.plan.advise import with_settings
from fastlora.recipe.advice import apply
from fastlora.recipe.schema import MemorySection, Recipe
from fastlora.rundir.store import RunDir
from fastlora.train.advising import filled_from

MEMORY_KEYS = frozenset(
    {"train.checkpointing", *(f"memory.{key}" for key in MemorySection.model_fields)}
)
"""What may be other on --resume: it changes how much memory a step takes, and not what the step does."""


def open_for_resume(recipe: Recipe, *, auto: bool = False) -> RunDir:
    """The newest unfinished run of this recipe, locked; one with a checkpoint before one without. `auto`: as filled
    when the run began.

    Raises RunDirError: there is none; of other unfinished runs it says why not.
    """

    def unlike(manifest: dict[str, Any]) -> list[str]:
        if "recipe" in manifest and ("auto" in manifest) is not auto:
            return ["it was begun without --auto" if auto else "it was begun with --auto"]
        filled = filled_from(manifest, recipe)
        now = apply(recipe, filled)
        given = recipe.train.micro_batch if "micro_batch" in recipe.train.model_fields_set else None
        for one in filled:
            if one.key == "train.micro_batch" and given not in (None, one.value):
                return [f"{one.key}: the run chose {one.value}, now {given}"]
        return changed_keys(manifest.get("recipe"), now.model_dump(mode="json"), but=MEMORY_KEYS)

    return RunDir.open_unfinished(Path(recipe.output.dir), unlike)


def as_begun(recipe: Recipe, manifest: dict[str, Any]) -> Recipe:
    """The recipe with what was filled when the run of `manifest` began. Its micro-batch, by default or not, is stated,
    so that a memory.vram that it did not have then chooses no other."""
    recipe = apply(recipe, filled_from(manifest, recipe))
    return with_settings(recipe, {"train.micro_batch": recipe.train.micro_batch})


def changed_keys(
    then: dict[str, Any] | None, now: dict[str, Any], but: Set[str] = frozenset()
) -> list[str]:
    """A line for each key in which two recipes, as in a manifest, differ; `but` these."""
    if then is None:
        return ["it ended before it had begun"]
    before, after = _flat(then), _flat(now)
    # Two ways to write output.dir (runs, ./runs) lead to the same runs.
    return [
        f"{key}: was {before.get(key)!r}, now {value!r}"
        for key, value in after.items()
        if key != "output.dir" and key not in but and before.get(key) != value
    ]


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in recipe.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat
