"""What to change where a recipe does not fit: first what leaves the training as it is, by its speed; then the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from fastlora.errors import RecipeError
from fastlora.plan.predict import Prediction
from fastlora.plan.setup import why_embedding_stays
from fastlora.recipe.schema import Recipe

Again = Callable[[Recipe], Prediction]
"""The prediction for another recipe, all else as it was."""

_SHORTEST_TOKENS = 256
_SMALLEST_RANK = 8


@dataclass(frozen=True, slots=True)
class Change:
    settings: dict[str, Any]
    """Keys and values, as for --set."""
    same_training: bool
    """Up to rounding: the same samples, losses and updates."""


@dataclass(frozen=True, slots=True)
class Advice:
    change: Change
    result: Prediction

    def document(self) -> dict[str, Any]:
        mem, speed = self.result.memory, self.result.speed
        return {
            "settings": self.change.settings,
            "same_training": self.change.same_training,
            "verdict": self.result.verdict,
            "needed_gib": round(mem.needed_gib, 3),
            "reserved_gib": round(mem.reserved_gib, 3),
            "host_gib": round(mem.host_gib, 3),
            "tokens_per_s": speed and round(speed.tokens_per_s, 1),
        }


def batches(recipe: Recipe, size: int, effective: int) -> dict[str, Any]:
    """Micro-batches of `size` rows and `effective` rows a step, in the key that the recipe counts them with."""
    if recipe.train.accumulation is not None:
        return {"train.micro_batch": size, "train.accumulation": effective // size}
    return {"train.micro_batch": size, "train.effective_batch": effective}


def possible(again: Again, recipe: Recipe) -> Prediction | None:
    """None: the engine cannot train so."""
    try:
        return again(recipe)
    except RecipeError:
        return None


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if not section:
            recipe = recipe.model_copy(update={name: value})
            continue
        part = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def advise(now: Prediction, again: Again) -> tuple[Advice | None, list[Advice]]:
    """(the cheapest change that makes it fit, each single change that needs less memory). Cheapest: the same training
    before another one, then the fastest, then the fewest keys. None where nothing here is enough."""

    def tried(settings: dict[str, Any], same_training: bool) -> Advice | None:
        found = possible(again, with_settings(now.recipe, settings))
        return Advice(Change(settings, same_training), found) if found else None

    same = [
        _same_engine(now), _same_loss(now), _same_policy(now), _same_batch(now), _same_weights(now),
    ]  # fmt: skip
    other = [_other_optimizer(now), _other_base(now), _other_length(now), _other_rank(now)]
    singles = [
        advice
        for levels, keeps in [(level, True) for level in same] + [(level, False) for level in other]
        for settings in levels
        if (advice := tried(settings, keeps)) and _less(advice, now)
    ]
    for whether_same, levers in ((True, same), (False, [*same, *other])):
        found = [
            advice
            for settings in _combinations(levers)
            if (advice := tried(settings, whether_same)) and advice.result.verdict != "no"
        ]
        if found:
            return min(found, key=_cost), singles
    return None, singles


def _less(advice: Advice, now: Prediction) -> bool:
    """Of the card's memory, or of the host's if that is what does not suffice."""
    before, after, limit = now.memory, advice.result.memory, now.card.host_gib
    if limit is not None and before.host_gib > limit:
        return after.host_gib < 0.995 * before.host_gib
    return after.needed_gib < 0.995 * before.needed_gib


def _combinations(levers: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Every choice of at most one level of each lever, but none at all."""
    for chosen in itertools.product(*([{}, *levels] for levels in levers)):
        merged = {key: value for settings in chosen for key, value in settings.items()}
        if merged:
            yield merged


def _cost(advice: Advice) -> tuple[float, float, float]:
    """Shortened rows first of all where the training changes: what is cut is lost. Then time, to 1 %, and keys."""
    settings, result = advice.change.settings, advice.result
    lost = 1 - result.setup.row_tokens / max(
        result.setup.row_tokens, settings.get("model.seq_len_tokens", 0), 1
    )
    speed = result.speed.tokens_per_s if result.speed else 0.0
    changed = sum(key in _CHANGES_TRAINING for key in settings)
    return changed + lost, -float(f"{speed:.2g}"), len(settings)


_CHANGES_TRAINING = ("train.optimizer", "model.quantization", "model.seq_len_tokens", "lora.rank")


def _same_engine(now: Prediction) -> list[dict[str, Any]]:
    return [{"engine": "unsloth"}] if now.recipe.engine == "peft" else []


def _same_loss(now: Prediction) -> list[dict[str, Any]]:
    return [{"train.chunked_loss": True}] if now.setup.loss == "logits" else []


def _same_policy(now: Prediction) -> list[dict[str, Any]]:
    """Those that keep less on the GPU, the fastest first; with fewer layers kept, where some are."""
    order = ["none", "full", "unsloth" if now.setup.engine == "unsloth" else "offload"]
    policy = now.setup.policy
    tighter = order[order.index(policy) + 1 :] if policy in order else []
    levels: list[dict[str, Any]] = [{"train.checkpointing": name} for name in tighter]
    if policy in ("unsloth", "offload"):  # for a host that is too small
        levels.append({"train.checkpointing": "full"})
    memory = now.recipe.memory
    nothing: dict[str, Any] = {}
    if memory.keep_layers or memory.keep_attention_layers:
        nothing = {"memory.keep_layers": 0, "memory.keep_attention_layers": 0}
    if memory.keep_dequantized:
        nothing["memory.keep_dequantized"] = False
    if memory.dense_layers:
        nothing["memory.dense_layers"] = 0
    if nothing:
        levels = [nothing, *(level | nothing for level in levels)]
    return levels


def _same_weights(now: Prediction) -> list[dict[str, Any]]:
    """More of the frozen weights in host memory: the embedding, of which a step reads little, then a quarter of the
    layers at a time."""
    layers, already = now.shape.layers, now.setup.stream_layers
    stays = now.setup.host_embedding or why_embedding_stays(now.shape, now.setup)
    first: dict[str, Any] = {} if stays else {"memory.embedding": "host"}
    levels = [first] if first else []
    if now.setup.engine != "unsloth" or now.setup.policy == "none":
        return levels
    counts = dict.fromkeys(min(ceil(layers * part / 4), layers - 1) for part in range(1, 5))
    more = ({"memory.stream_layers": count} for count in counts if count > already)
    return levels + [first | one for one in more]


def _same_batch(now: Prediction) -> list[dict[str, Any]]:
    """Halved, and again, at the same effective batch."""
    effective = now.setup.micro_batch * now.setup.accumulation
    sizes, size = [], now.setup.micro_batch
    while size > 1:
        size = max(s for s in range(1, size // 2 + 1) if effective % s == 0)
        sizes.append(size)
    return [batches(now.recipe, size, effective) for size in sizes]


def _other_optimizer(now: Prediction) -> list[dict[str, Any]]:
    return [{"train.optimizer": "adamw_8bit"}] if now.setup.optimizer == "adamw" else []


def _other_base(now: Prediction) -> list[dict[str, Any]]:
    below = {"none": ["int8", "nf4"], "int8": ["nf4"], "nf4": []}[now.setup.quantization]
    if now.setup.engine == "unsloth" and "int8" in below:
        below.remove("int8")  # which its fused kernels do not have
    return [{"model.quantization": name} for name in below]


def _other_length(now: Prediction) -> list[dict[str, Any]]:
    lengths, length = [], now.setup.row_tokens // 2
    while length >= _SHORTEST_TOKENS:
        lengths.append(length)
        length //= 2
    return [{"model.seq_len_tokens": length} for length in lengths]


def _other_rank(now: Prediction) -> list[dict[str, Any]]:
    half = now.setup.rank // 2
    return [{"lora.rank": half}] if half >= _SMALLEST_RANK else []
