"""Which run is meant by what was typed."""

from __future__ import annotations

import shlex
from pathlib import Path

from fastlora.errors import RunDirError, UsageError
from fastlora.recipe import library
from fastlora.rundir.store import RunDir


def find_run(name: str) -> RunDir:
    """A run's folder; or the newest finished run in a folder of runs, or of a recipe, bundled or a .toml file.

    To be read only: no lock is taken. Raises UsageError: it is none of these. RunDirError: no run has finished.
    RecipeError: as the recipe's loading does.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "manifest.json").exists() or not any(
            place.name.isdecimal() for place in path.iterdir()
        ):
            return RunDir.look(path)
        return RunDir.newest_finished(path)
    from fastlora.recipe.load import load_recipe

    try:
        recipe = library.find(name)
    except UsageError as error:
        raise UsageError(f"{name}: no folder of a run; as a recipe: {error}") from None
    parent = Path(load_recipe(recipe).output.dir)
    try:
        return RunDir.newest_finished(parent)
    except RunDirError:
        raise RunDirError(
            f"{name}: no finished run in {parent.absolute()}; name the run's folder, or train first: "
            f"{shlex.join(['fastlora', 'run', name])}"
        ) from None
