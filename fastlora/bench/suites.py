"""What to measure: a bundled suite, or a user's recipe."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastlora.bench.schema import NUMBERED, OPTIONS, Arm, Suite, Work, kind_of
from fastlora.errors import RecipeError, UsageError
from fastlora.recipe import library
from fastlora.recipe.load import explain, load_recipe
from fastlora.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    recipe: Recipe
    arms: list[Arm]
    work: Work
    parity_layers: int
    shape: dict[str, Any] | None = field(default=None)
    """Of the random weights; None: recipe.model.name is a real model."""
    own_data: bool = False
    """The rows are the recipe's, and not drawn."""


def bundled() -> dict[str, Path]:
    """Suite name -> file."""
    folder = library.bundled_folder("bundled_suites", "benchmarks/suites")
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_suite(path: Path) -> Suite:
    """The suite in that file. `like = "NAME"` takes over the bundled suite of that name, but for what is given.

    Raises RecipeError: every key and type that is wrong.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    if (like := content.pop("like", None)) is not None:
        others = bundled()
        if like not in others:
            raise RecipeError(path.name, [f"like: no suite {like!r}; known: {', '.join(others)}"])
        content = _over(tomllib.loads(others[like].read_text(encoding="utf-8")), content)
    try:
        suite = Suite.model_validate(content)
    except ValidationError as error:
        raise RecipeError(path.name, list(explain(error))) from None
    problems = []
    for arm in suite.arms:
        try:
            Arm.parse(arm)
        except UsageError as error:  # it speaks of the command line
            problems.append(f"arms: {str(error).removeprefix('--arms ')}")
    if problems:
        raise RecipeError(path.name, problems)
    return suite


def _over(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`base` with what is given in its place, section by section."""
    merged = dict(base)
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _over(base[key], value) if both else value
    return merged


def plan_for(target: str | None, vram_gib: float) -> Plan:
    """The suite or recipe of that name or path; without one, the suite that fits the GPU best.

    vram_gib: of the GPU, or the cap set on it; 0 without one.
    Raises UsageError: no suite, recipe or file of that name.
    """
    suites = bundled()
    if target is None:
        target = fitting(vram_gib)
    if target in suites:
        return _suite_plan(target, load_suite(suites[target]))
    if target not in library.bundled() and not target.endswith(".toml"):
        known = [*suites, *library.bundled()]
        near = difflib.get_close_matches(target, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{target}: no suite or recipe of that name; {hint}Suites: {', '.join(suites)}"
        )
    path = library.find(target)
    if _top_level(path).keys() & {"shape", "like"}:
        return _suite_plan(path.stem, load_suite(path))
    recipe = load_recipe(path)
    names = ["peft", "liger", "unsloth"] if vram_gib else ["peft", "peft+fastlora"]
    packing = "+packing" if recipe.data.packing else ""
    arms = [Arm.parse(name + packing) for name in names]
    return Plan(path.stem, recipe, arms, Work(), parity_layers=2, own_data=True)


def _suite_plan(name: str, suite: Suite) -> Plan:
    arms = [Arm.parse(arm) for arm in suite.arms]
    return Plan(
        name,
        suite.recipe("made by the benchmark"),
        arms,
        suite.work,
        suite.parity_layers,
        suite.shape,
    )


def _top_level(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}  # load_recipe says what is wrong


def fitting(vram_gib: float) -> str:
    """The most demanding bundled suite that fits into vram_gib, among those that are for the choice."""
    suites = {name: load_suite(path) for name, path in bundled().items()}
    needs = {name: suite.vram_gib for name, suite in suites.items() if suite.chosen_by_vram}
    return max((name for name in needs if needs[name] <= vram_gib), key=lambda name: needs[name])


def ingredients(arm: Arm, recipe: Recipe, *, gpu: bool) -> list[Arm]:
    """The arm without each of its ingredients, and with each that it could have and has not; none that
    would change nothing."""
    others = []
    for option, (engines, _) in OPTIONS.items():
        # What has no one value, needs another option, or is asked for.
        left_out = {
            *NUMBERED, "+dequantized", "+hostembed", "+budget", "+record", "+packing", "+fastlora",
        }  # fmt: skip
        if arm.engine not in engines or option in {*arm.options, *left_out}:
            continue
        checkpoints = {"-checkpointing", "-offload", "+offload"}
        if option in checkpoints and (not gpu or checkpoints & arm.options):
            continue  # a CPU keeps everything
        if {(option, other) for other in arm.options} & {
            ("+graphs", "+record"), ("-checkpointing", "+dequantized"),
        }:  # fmt: skip
            continue  # they exclude each other
        other = Arm.parse(arm.name + option)
        if not does_nothing(other, option, recipe, gpu=gpu):
            others.append(other)
    return others


_NOT_IN_RECIPE = frozenset({"+fastlora", "+graphs", "-kernels", "-loss"})
_OF_A_GPU = frozenset({"+record", "+graphs", "+budget", "-optimizer"})


def does_nothing(arm: Arm, option: str, recipe: Recipe, *, gpu: bool) -> str:
    """Why `arm` is the same as without that option of it; "": it may be another."""
    kind, bare = kind_of(option), arm.model_copy(update={"options": arm.options - {option}})
    if kind in _OF_A_GPU and not gpu:
        return "there is no CUDA GPU here"
    its, without = (one.recipe(recipe).model_dump() for one in (arm, bare))
    for one in (its["train"], without["train"]):
        if one["checkpointing"] == "auto" and not gpu:
            one["checkpointing"] = "none"  # a CPU keeps every layer
    if kind in ("+keep", "+attention", "+dequantized") and its["train"]["checkpointing"] == "none":
        return "no layer is computed again"
    same = kind not in _NOT_IN_RECIPE and its == without
    same = same or (arm.micro_batch == recipe.train.micro_batch and kind == "+batch")
    return "it is so without it" if same or option == f"{kind}0" else ""


def renamed(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another model, to which the revision of the old one means nothing."""
    model = recipe.model.model_copy(update={"name": name, "revision": None})
    return recipe.model_copy(update={"model": model})
