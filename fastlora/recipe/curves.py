"""What the loss curves of a run tell: where overfitting began, and what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastlora.recipe.advice import Advice, wanted
from fastlora.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Overfitting:
    began: int
    """The step with the lowest held-out loss: after it, it rose while the training loss fell on."""
    epoch: float
    lowest: float
    last_step: int
    last: float


def overfitting(entries: Sequence[Mapping[str, Any]]) -> Overfitting | None:
    """Where it began, from the lines of metrics.jsonl; None where the held-out loss has not risen for good.

    For good: two evaluations 2% above the lowest, or one 5% above it. A rise of both losses is no overfitting.
    """
    held_out = [entry for entry in entries if "eval_loss" in entry]
    if len(held_out) < 2:
        return None
    place = min(range(len(held_out)), key=lambda n: held_out[n]["eval_loss"])
    lowest, after = held_out[place], held_out[place + 1 :]
    rises = [entry["eval_loss"] - lowest["eval_loss"] for entry in after]
    # Below some hundredths of a nat a rise is noise, however large a part of the loss.
    slight = max(0.02 * lowest["eval_loss"], 0.01)
    clear = max(0.05 * lowest["eval_loss"], 0.02)
    for_good = len(rises) >= 2 and min(rises[-2:]) > slight
    if not for_good and not (rises and rises[-1] > clear):
        return None
    before = _training_loss(entries, held_out[place - 1]["step"] if place else 0, lowest["step"])
    since = _training_loss(entries, held_out[-2]["step"], held_out[-1]["step"])
    if before is None or since is None or since >= before:
        return None
    return Overfitting(
        lowest["step"],
        lowest["epoch"],
        lowest["eval_loss"],
        held_out[-1]["step"],
        held_out[-1]["eval_loss"],
    )


def _training_loss(
    entries: Sequence[Mapping[str, Any]], after_step: int, to_step: int
) -> float | None:
    losses = [
        entry["loss"]
        for entry in entries
        if "loss" in entry and after_step < entry["step"] <= to_step
    ]
    return fmean(losses) if losses else None


def advise_after(
    recipe: Recipe,
    entries: Sequence[Mapping[str, Any]],
    *,
    adapter_step: int,
    before: Mapping[str, float],
) -> list[Advice]:
    """What the curves say. `adapter_step`: the step that the adapter is of. `before`: the held-out loss of each
    source before training."""
    advice = [*_forgotten(recipe, entries, adapter_step, before)]
    if found := overfitting(entries):
        advice.insert(0, _overfitted(recipe, found, adapter_step))
    return wanted(recipe, advice)


def _overfitted(recipe: Recipe, found: Overfitting, adapter_step: int) -> Advice:
    epochs = f"train.epochs = {max(found.epoch, 0.01):.3g}"
    if adapter_step == found.began:
        remedy = f"The adapter is the one of step {found.began}; {epochs} saves the rest"
    else:
        remedy = f"Set train.keep_best = true, or {epochs}"
    return Advice(
        "train.epochs",
        f"overfitting began after step {found.began} (epoch {found.epoch:.3g})",
        f"the held-out loss rose from {found.lowest:.4f} to {found.last:.4f} at step {found.last_step} while the "
        "training loss fell",
        remedy,
    )


def _forgotten(
    recipe: Recipe,
    entries: Sequence[Mapping[str, Any]],
    adapter_step: int,
    before: Mapping[str, float],
) -> Iterator[Advice]:
    at = [e for e in entries if "eval_loss_by_source" in e and e["step"] <= adapter_step]
    after = at[-1]["eval_loss_by_source"] if at else {}
    for label, loss in before.items():
        now = after.get(label, loss)
        if now - loss > max(0.02 * loss, 0.01):
            share = recipe.data.rehearsal.share if recipe.data.rehearsal else None
            remedy = (
                f"Raise data.rehearsal.share above {share:g}, or lower train.lr"
                if share
                else "Mix general rows in with data.rehearsal, or lower train.lr"
            )
            yield Advice(
                "data.rehearsal",
                f"{label} is forgotten",
                f"its held-out loss was {loss:.4f} before training and is {now:.4f} with the adapter",
                remedy,
            )
