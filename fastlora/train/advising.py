"""Advice in a run: told on stderr, kept in its manifest, applied only by `--auto` and then only where a key is open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastlora.data.prepare import prepare_data
from fastlora.data.prepared import Prepared
from fastlora.recipe.advice import Advice, Facts, Filled, advise, apply, fill, fill_eval
from fastlora.recipe.curves import advise_after
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir
from fastlora.train.notes import Notes

_TOLD = 4  # lines; the manifest has all of it


def facts_of(data: Prepared, engine: str) -> Facts:
    train = data.stats.train
    return Facts(
        examples=_examples(data),
        rows=train.rows,
        held_out=data.stats.eval.rows if data.stats.eval else 0,
        sequences=train.sequences,
        supervised_tokens=train.supervised_tokens,
        longest_row_tokens=train.longest_row_tokens,
        common_openings=data.stats.common_openings,
        engine=engine,
    )


def _examples(data: Prepared) -> int:
    return sum(source["rows"] for source in data.stats.sources if source["role"] == "train")


def fill_open_keys(
    recipe: Recipe, engine: str, tokenizer: Any, notes: Notes
) -> tuple[Recipe, Prepared, list[Filled]]:
    """What `--auto` does: the recipe with its open keys filled, its data, and what was filled and why."""
    filled: list[Filled] = []
    if fill_eval(recipe, examples=1 << 30):  # open, so that the rows have to be counted first
        counted = _examples(prepare_data(recipe, tokenizer, lambda _: None))
        filled += fill_eval(recipe, counted)
        recipe = apply(recipe, filled)
    data = prepare_data(recipe, tokenizer, notes)
    rest = fill(recipe, facts_of(data, engine))
    filled += rest
    for one in filled:
        notes(f"auto: {one.key} = {one.value}: {one.why}")
    if not filled:
        notes("auto: the recipe leaves open none of the keys that --auto fills")
    return apply(recipe, rest), data, filled


def filled_from(manifest: dict[str, Any], recipe: Recipe) -> list[Filled]:
    """What --auto filled when the run of a manifest began, and of what was chosen for its GPU the batches, and what
    rounds otherwise (padding, kernels): resumed, it takes the same, whatever the rules are now. What else was chosen
    may be chosen anew, for another GPU. `recipe`: as it is now; what it says of graphs and kernels stays."""
    chosen = [Filled(**one) for one in manifest.get("memory", {}).get("filled", [])]
    open_keys = {"train.micro_batch", "train.effective_batch", "train.accumulation"}
    if recipe.memory.cuda_graphs is None:
        open_keys.add("memory.cuda_graphs")
    if recipe.kernels.mode == "auto":
        open_keys.add("kernels.mode")
    filled = [Filled(**one) for one in manifest.get("auto", [])]
    return filled + [one for one in chosen if one.key in open_keys]


def advise_before(
    recipe: Recipe, data: Prepared, engine: str, notes: Notes
) -> list[dict[str, Any]]:
    return _tell(advise(recipe, facts_of(data, engine)), notes, "before")


def advise_on_curves(
    run: RunDir, recipe: Recipe, adapter_step: int, notes: Notes
) -> list[dict[str, Any]]:
    """Told when training is over; returns all advice of the run."""
    before = run.manifest.get("eval_before", {}).get("by_source", {})
    found = advise_after(recipe, run.read_metrics(), adapter_step=adapter_step, before=before)
    kept = [one for one in run.manifest.get("advice", []) if one["when"] == "before"]
    return kept + _tell(found, notes, "after")


def _tell(advice: Sequence[Advice], notes: Notes, when: str) -> list[dict[str, Any]]:
    for one in advice[:_TOLD]:
        notes.say(f"advice: {one}")
    if more := advice[_TOLD:]:
        notes.say(f"advice: also on {', '.join(one.key for one in more)} (--json shows it)")
    if advice:
        keys = ", ".join(f'"{one.key}"' for one in advice[:1])
        notes.say(f'advice is never applied; advice.ignore = [{keys}] silences a key, ["all"] all')
    return [{**asdict(one), "when": when} for one in advice]
