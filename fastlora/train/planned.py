"""What a run was predicted to need, said before its model loads; and what it needed, kept for the next prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from fastlora.engines.memory import GIB, host_free_bytes, memory_now
from fastlora.errors import EngineError, FastloraError, RecipeError
from fastlora.plan.budget import NONE_FITS, OPEN
from fastlora.plan.gpus import gpu_named, like_a_3090
from fastlora.plan.measured import Peak, ceilings, kind, remember
from fastlora.plan.predict import Card, Prediction, predict
from fastlora.plan.settle import FREE_SHARE, MicroBatches, settle, without_budget
from fastlora.plan.setup import EngineName
from fastlora.plan.shape import Shape, read_config, shape_of
from fastlora.plan.show import time_said
from fastlora.plan.working import CONTEXT
from fastlora.recipe.advice import apply
from fastlora.recipe.schema import Recipe
from fastlora.train.shapes import shapes_and_mean
from fastlora.train.steps import count_steps

if TYPE_CHECKING:
    from fastlora.data.prepared import Prepared
    from fastlora.engines.base import Announce
    from fastlora.train.job import Job


def fit_memory(
    recipe: Recipe,
    engine: str,
    row_tokens: int | None,
    announce: Announce,
    micro_batches: Callable[[Recipe], MicroBatches] | None = None,
) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with what it leaves open chosen so that it fits into memory.vram, or without one into what is free
    (plan/settle.py), and the choice, for the manifest. None: there is no GPU, or without memory.vram nothing fits.

    row_tokens: of the longest row; None: model.seq_len_tokens. micro_batches: what rows of the data take in them; None:
    graphs are not chosen, nor without memory.vram micro-batches.
    Raises EngineError: memory.vram is given, and nothing fits, or the model's shape is not known.
    """
    import torch

    asked = recipe.memory.vram is not None
    if not torch.cuda.is_available():
        if asked:
            announce("memory.vram: no GPU here, so nothing is chosen")
        return recipe, None
    card = _card(recipe, engine, announce)
    try:
        shape = _shape(recipe)
    except EngineError as error:
        if not asked:
            return recipe, None  # it is not predicted either, which is said then
        raise EngineError(
            f"memory.vram: what a step takes cannot be counted ({error}); leave it out, and set [memory] by hand"
        ) from error

    def again(other: Recipe) -> Prediction:
        return predict(other, shape, card, engine=cast(EngineName, engine), row_tokens=row_tokens)

    try:
        batches = micro_batches is not None
        now = again(recipe if asked else without_budget(recipe, batches=batches))
    except RecipeError:
        if asked:
            raise
        return recipe, None
    choice = settle(now, again, micro_batches)
    if choice is None:
        if not asked:
            return recipe, None  # the prediction says whether it fits tightly, or not at all
        raise EngineError(
            f"memory.vram: {NONE_FITS} {card.vram_gib:.2f} GiB, and {card.host_gib:.1f} of the host; as "
            f"it stands it needs {now.memory.comfortable_gib:.2f} and "
            f"{now.memory.host_gib:.1f}. Leave more keys open ({', '.join(OPEN)}), or see what to change: "
            f"fastlora plan RECIPE --vram {card.vram_gib:.2f}GiB"
        )
    for line in choice.lines() if asked or choice.filled else ():
        announce(line)
    return apply(recipe, choice.filled), choice.document()


def _card(recipe: Recipe, engine: str, announce: Announce) -> Card:
    """This machine's, with as much memory as the run may plan for."""
    name, whole = _this_gpu()
    share = FREE_SHARE if recipe.memory.vram is None else 1.0
    free, host = _free_gib(engine), share * host_free_bytes() / GIB
    asked = recipe.memory.vram_gib or share * free
    if (budget := min(asked, free)) < asked:
        announce(
            f"memory.vram: {asked:.2f} GiB are not free on this GPU; chosen is for {budget:.2f}"
        )
    gpu = gpu_named(name, ceilings(name)) or like_a_3090(name, budget)
    return Card(gpu=gpu, vram_gib=budget, host_gib=host, whole_gib=whole)


def micro_batches_of(data: Prepared, recipe: Recipe) -> MicroBatches:
    """What recording those of `recipe` would be worth."""
    from fastlora.train.graphs import WARM_UPS

    size, longest = recipe.train.micro_batch, recipe.model.seq_len_tokens
    shapes, tokens = shapes_and_mean(data.train, size, longest)
    steps, _ = count_steps(recipe, data)
    rows, most = len(data.train), min(size, len(data.train))
    full = 1.0 if recipe.data.packing else rows / (most * math.ceil(rows / most))
    return MicroBatches(
        tokens=tokens,
        padding=1 - (1 - shapes.padding) * full,
        count=steps * recipe.train.accumulation_steps,
        rehearsed=(WARM_UPS + 1) * len(shapes.lengths),
    )


def _this_gpu() -> tuple[str, float]:
    """(name, GiB)."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / 2**30


def _shape(recipe: Recipe) -> Shape:
    """By now the model's files are here."""
    return shape_of(read_config(recipe.model.name, recipe.model.revision, local=True))


def _free_gib(engine: str) -> float:
    """What this process may come to hold, its CUDA context with it: of a card that nothing else uses all, if PyTorch is
    allowed as much."""
    figures, context = memory_now(), CONTEXT[engine] / GIB
    free = figures["card_gib"] - max(0.0, figures["others_gib"] - context)
    return min(free, figures.get("allowed_gib", free) + context)


def longest_row(recipe: Recipe, data: Prepared) -> int | None:
    """In tokens; None where rows are packed, which are always full."""
    return None if recipe.data.packing else data.stats.train.longest_row_tokens


def predict_run(job: Job) -> Prediction | None:
    """None without a GPU, and where the model cannot be predicted, which is said."""
    import torch

    if not torch.cuda.is_available():
        return None
    recipe, (name, whole) = job.recipe, _this_gpu()
    card = Card(gpu=gpu_named(name, ceilings(name)), vram_gib=whole)
    try:
        found = predict(
            recipe, _shape(recipe), card, engine=cast(EngineName, job.engine.name),
            row_tokens=longest_row(recipe, job.data),
        )  # fmt: skip
    except FastloraError as error:
        job.notes(f"plan: not predicted ({error})")
        return None
    job.notes(_said(found, job))
    return found


def _said(found: Prediction, job: Job) -> str:
    memory, fixed = found.memory, found.correction
    parts = [
        f"plan: {memory.reserved_gib:.2f} GiB and {memory.context / 2**30:.2f} of CUDA context, of "
        f"{found.card.vram_gib:.1f} (the most: {memory.peak})"
    ]
    if fixed.error is not None:
        parts.append(f"within {fixed.error:.1%} over {fixed.runs} runs like it")
    if found.speed:
        _, epochs = count_steps(job.recipe, job.data)
        seconds = found.speed.seconds(job.data.stats.train.tokens * epochs)
        parts.append(f"about {found.speed.tokens_per_s:,.0f} tokens/s, {time_said(seconds)} in all")
    if found.verdict == "no":
        parts.append(
            f"it needs {memory.needed_gib:.2f} GiB at least and may run out of it; fastlora plan says what to change"
        )
    return "; ".join(parts)


def compare_with_plan(
    found: Prediction | None,
    measured_gib: float | None,
    announce: Announce,
    *,
    run: str = "",
    ran_out: bool = False,
) -> dict[str, Any] | None:
    """For the manifest; the next prediction on this GPU is corrected by it. measured_gib: peak reserved. run: its
    folder. ran_out: of memory, and went on with less than was predicted for; nothing is learnt then."""
    if found is None:
        return None
    document = found.document()
    if not measured_gib:
        return document
    predicted = found.memory.reserved_gib
    if ran_out:
        announce(
            f"plan: {predicted:.2f} GiB were predicted for the recipe as it stands; it ran out of memory, and held "
            f"{measured_gib:.2f} at the most"
        )
        return document | {"measured_reserved_gib": measured_gib}
    error = predicted / measured_gib - 1
    announce(
        f"plan: {predicted:.2f} GiB were predicted and {measured_gib:.2f} needed ({error:+.1%})"
    )
    learn_from(found, measured_gib, run)
    return document | {"measured_reserved_gib": measured_gib, "error": round(error, 4)}


def learn_from(found: Prediction, measured_gib: float, run: str) -> None:
    """Keep for the next prediction on this GPU what was needed. run: its folder, which teaches once; "": none."""
    memory, gpu = found.memory, found.card.gpu
    if gpu is None:
        return
    peak = Peak(
        like=kind(found.setup),
        always_gib=memory.always_gib,
        predicted_gib=memory.uncorrected_gib,
        shown_gib=memory.reserved_gib,
        measured_gib=measured_gib,
        model=found.shape.model_type,
        tokens=found.setup.tokens,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run,
    )
    remember(gpu.name, peak)
