"""The fastest way to train a recipe within so much memory: what `memory.vram` chooses.

Every choice leaves what is learnt as it is. Tried are micro-batches at the recipe's effective batch, checkpoint
policies, with and without dequantized weights kept until backward, or where micro-batches are recorded from step to
step, and, for each, every number of layers that are kept whole, with as many more that keep their attention as there is
then room for; each with the input embedding on the GPU, and in host memory, which is taken where it makes for more than
its time. Where nothing of it fits, as few layers as need be have their frozen weights there as well.
The same recipe, budget, card and host memory choose the same, until a run on this GPU has corrected the predictions.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastlora.plan.advise import Again, batches, possible, with_settings
from fastlora.plan.gpus import GUESSED
from fastlora.plan.predict import Prediction
from fastlora.plan.setup import why_embedding_stays
from fastlora.plan.speed import Speed, speed
from fastlora.plan.stored import host_embedding_bytes
from fastlora.plan.working import GIB, dense_weights, keeps_projections
from fastlora.recipe.advice import Filled
from fastlora.recipe.schema import Recipe

_COUNTS = ("memory.keep_layers", "memory.keep_attention_layers", "memory.stream_layers")
_DEQUANTIZED, _DENSE = "memory.keep_dequantized", "memory.dense_layers"
_EMBEDDING = "memory.embedding"
OPEN = ("train.micro_batch", "train.checkpointing", *_COUNTS, _DEQUANTIZED, _EMBEDDING, _DENSE)
"""What may be chosen, where the recipe does not say it."""

_OURS = ("none", "offload", "full")
POLICIES = {"unsloth": ("none", "unsloth", "offload", "full"), "peft": _OURS, "liger": _OURS}
_MOST_TOKENS = 16_384
"""Of a micro-batch; a GPU does not become faster beyond, and the loss of one row too many costs more time."""
_ALIKE = 0.01
"""Speeds that differ by less are taken for the same."""
_NEAR = 0.05
"""Memory that differs by less: then fewer keys are better, such as nothing computed again instead of one layer."""


@dataclass(frozen=True, slots=True)
class Choice:
    filled: tuple[Filled, ...]
    result: Prediction
    plainest: Prediction
    """All computed again, nothing kept, in the recipe's own micro-batch: what the choice is compared with."""

    @property
    def settings(self) -> dict[str, Any]:
        return {one.key: one.value for one in self.filled}

    def document(self) -> dict[str, Any]:
        """As JSON; memory in GiB."""

        def figures(of: Prediction) -> dict[str, float]:
            assert of.speed is not None
            return {
                "comfortable_gib": round(of.memory.comfortable_gib, 3),
                "host_gib": round(of.memory.host_gib, 3),
                "tokens_per_s": round(of.speed.tokens_per_s, 1),
            }

        return {
            "budget_gib": self.result.card.vram_gib,
            "filled": [asdict(one) for one in self.filled],
            **figures(self.result),
            "plainest": figures(self.plainest),
        }

    def lines(self) -> Iterator[str]:
        """What was chosen and why, as for the console."""
        took, plain = figures_said(self.result), figures_said(self.plainest)
        asked = self.result.recipe.memory.vram is not None
        within = "memory.vram = {:.2f} GiB" if asked else "memory: of {:.2f} GiB that it may take"
        said = within.format(self.result.card.vram_gib)
        less = "" if asked else "; memory.vram sets a limit"
        gpu = self.result.card.gpu
        guess = f"; {gpu.name} is {gpu.source}" if gpu and gpu.source == GUESSED else ""
        yield f"{said}: {took}; with nothing kept or streamed {plain}{guess}{less}"
        for one in self.filled:
            yield f"  {setting_said(one)}: {one.why}"


NONE_FITS = "with what the recipe leaves open nothing fits into"


RowTokens = Callable[[Recipe], float]
"""Of a micro-batch as that recipe has it, the tokens that a row of it takes: of its longest, on average."""


def choose(now: Prediction, again: Again, row_tokens: RowTokens | None = None) -> Choice | None:
    """What the open keys of a recipe become on the card of `now`, whose size is the budget. None: nothing fits.

    now: the recipe as it stands, with the card's speed. row_tokens: what time is reckoned by, since rows of one
    micro-batch are padded to the longest and more of them need more padding; None: all rows are full.
    """
    recipe, engine = now.recipe, now.setup.engine
    starts = list(_starts(now))
    found = [one for start in starts for one in _kept(now, start, again)]
    if not found and engine == "unsloth" and _given(recipe, "memory.stream_layers") is None:
        # After the embedding, of which less crosses the bus.
        first = [start for start in starts if _EMBEDDING in start]
        found = [one for start in first for one in _streamed(now, start, again)]
        found = found or [one for start in starts for one in _streamed(now, start, again)]
    if not found:
        return None
    if recipe.memory.cuda_graphs:  # policies that can be recorded, if there is one
        found = [one for one in found if one[1].setup.graphs] or found
    # The host's speed is a guess, so among those that it holds back alike the GPU's own decides.
    alike = _within(found, lambda one: row_seconds(one[1], row_tokens))
    alike = _within(alike, lambda one: row_seconds(one[1], row_tokens, host=False))
    # Host memory is left to others where it is worth nothing, and the GPU's.
    alike = [one for one in alike if not one[1].setup.host_embedding] or alike
    alike = [one for one in alike if not one[1].setup.dense_layers] or alike
    # What crosses the bus twice in each micro-batch, it does for memory that is otherwise spare.
    fewest = min(one[1].setup.stream_layers for one in alike)
    alike = [one for one in alike if one[1].setup.stream_layers == fewest]
    least = min(one[1].memory.comfortable_gib for one in alike)
    near = [one for one in alike if one[1].memory.comfortable_gib <= least * (1 + _NEAR)]
    settings, result = min(near, key=lambda one: (len(one[0]), one[1].memory.comfortable_gib))
    filled = tuple(
        Filled(key, value, _why(key, result))
        for key, value in settings.items()
        if not _stated(recipe, key, value)
    )
    nothing = {**dict.fromkeys((*_COUNTS, _DENSE), 0), _DEQUANTIZED: False}
    plain = with_settings(recipe, {"train.checkpointing": POLICIES[engine][1], **nothing})
    return Choice(filled, result, again(plain))


Found = tuple[dict[str, Any], Prediction]


def _stated(recipe: Recipe, key: str, value: Any) -> bool:
    """Whether the recipe means that already. A micro-batch by default does not count: resumed, it may not change."""
    section, _, name = key.partition(".")
    part = getattr(recipe, section)
    asked = recipe.memory.vram is not None
    if asked and name == "micro_batch" and name not in part.model_fields_set:
        return False
    return bool(getattr(part, name) == value or (value == 0 and not getattr(part, name)))


def _given(recipe: Recipe, key: str) -> Any:
    """What the recipe says itself; None where it leaves it open."""
    section, _, name = key.partition(".")
    part = getattr(recipe, section)
    value = getattr(part, name) if name in part.model_fields_set else None
    return None if value == "auto" else value


def _starts(now: Prediction) -> Iterator[dict[str, Any]]:
    """Micro-batch, policy, place of the embedding and, where it may help, how long dequantized weights stay."""
    recipe, setup = now.recipe, now.setup
    places: list[dict[str, Any]] = [{}]
    if _given(recipe, _EMBEDDING) is None and not why_embedding_stays(now.shape, setup):
        places.append({_EMBEDDING: "host"})
    effective = setup.micro_batch * setup.accumulation
    sizes = [_given(recipe, "train.micro_batch")]
    if sizes == [None]:
        most = max(1, min(effective, _MOST_TOKENS // setup.row_tokens))
        sizes = [size for size in range(1, most + 1) if effective % size == 0]
    # Products of fewer tokens than usual have never been timed; they are tried for want of memory alone.
    usual = recipe.train.micro_batch
    if recipe.memory.vram is None:
        sizes = [size for size in sizes if size >= usual] or [usual]  # of rows however long
    given = _given(recipe, "train.checkpointing")
    helps = setup.kernels and setup.quantization == "nf4" and not setup.dora
    stays = helps and _given(recipe, _DEQUANTIZED) is None
    dense = helps and _given(recipe, _DENSE) is None and bool(recipe.memory.cuda_graphs)
    for size in sizes:
        for policy in [given] if given else POLICIES[setup.engine]:
            rows = batches(recipe, size, effective) if size != usual else {}
            for place in places:
                start = {"train.micro_batch": size, **rows, "train.checkpointing": policy, **place}
                yield start
                if stays and policy in ("full", "offload"):
                    yield start | {_DEQUANTIZED: True}
                if dense and size >= usual and policy != "unsloth":  # which is not recorded
                    yield start | {_DENSE: now.shape.layers}


def _kept(now: Prediction, start: dict[str, Any], again: Again) -> Iterator[Found]:
    """What fits with so many layers kept whole and, of the others, none or as many as there is room for that keep their
    attention; between these two the time goes from one to the other."""
    policy, layers = start["train.checkpointing"], now.shape.layers
    free = layers - now.setup.stream_layers
    keys = ("memory.keep_layers", "memory.keep_attention_layers")
    open_keys = [key for key in keys if policy != "none" and _given(now.recipe, key) is None]

    def tried(*counts: int) -> Found | None:
        kept = dict(zip(keys, counts, strict=True))
        return _tried(now, start | {key: kept[key] for key in open_keys}, again)

    most = layers if keys[1] in open_keys and policy != "unsloth" else 0
    for whole in range(free + 1) if keys[0] in open_keys else [0]:
        # The more are kept whole, the fewer more in part.
        for parts in range(min(most, layers - whole), -1, -1):
            if (found := tried(whole, parts)) and _fits(found):
                yield found
                most = parts
                break
        else:
            return
        if most and (found := tried(whole, 0)) and _fits(found):
            yield found


def _streamed(now: Prediction, start: dict[str, Any], again: Again) -> Iterator[Found]:
    """With as few layers streamed as fit, all computed again, or all but their attention."""
    if _given(now.recipe, "memory.keep_layers"):
        return
    layers, key = now.shape.layers, "memory.keep_attention_layers"
    ours = start["train.checkpointing"] in ("full", "offload")
    choices: list[dict[str, Any]] = [{}]
    if ours and _given(now.recipe, key) is None:
        choices = [{key: 0}, {key: layers}]
    for kept in choices:
        for_n: dict[int, Found] = {}

        def fits(streamed: int, kept: dict[str, Any] = kept, for_n: Any = for_n) -> bool:
            found = _tried(now, start | kept | {"memory.stream_layers": streamed}, again)
            if found:
                for_n[streamed] = found
            return found is not None and _fits(found)

        fewest = bisect_left(range(layers), True, key=fits)  # one at least stays
        if fewest in for_n:
            yield for_n[fewest]


def _tried(now: Prediction, settings: dict[str, Any], again: Again) -> Found | None:
    """None: the engine cannot train so."""
    result = possible(again, with_settings(now.recipe, settings))
    return (settings, result) if result else None


def _fits(found: Found) -> bool:
    return found[1].verdict == "fits"


def row_seconds(
    found: Prediction, row_tokens: RowTokens | None = None, *, host: bool = True
) -> float:
    """Of training on one row. `host`: where the host takes longer than the GPU, its time."""
    took = speed_of(found, row_tokens)
    gpu_s = took.gpu_s + took.waits_s
    return (max(gpu_s, took.host_s) if host else gpu_s) / found.setup.micro_batch


def speed_of(found: Prediction, row_tokens: RowTokens | None = None) -> Speed:
    """With rows of so many tokens."""
    assert found.speed is not None
    assert found.card.gpu is not None
    if row_tokens is None:
        return found.speed
    setup = replace(found.setup, row_tokens=max(1, round(row_tokens(found.recipe))))
    return speed(found.shape, setup, found.card.gpu)


def setting_said(one: Filled) -> str:
    """As a recipe has it."""
    return f"{one.key} = {json.dumps(one.value)}"  # of what can be chosen, TOML's as well


def figures_said(found: Prediction) -> str:
    assert found.speed is not None
    rate = f"about {found.speed.tokens_per_s:,.0f} tokens/s (bound by the {found.speed.bound_by})"
    return f"{found.memory.comfortable_gib:.2f} GiB, {rate}"


def _within(found: list[Found], time: Callable[[Found], float]) -> list[Found]:
    most = min(map(time, found)) * (1 + _ALIKE)
    return [one for one in found if time(one) <= most]


def _why(key: str, result: Prediction) -> str:
    setup, shape = result.setup, result.shape
    if key == "train.micro_batch":
        return f"{setup.tokens:,} tokens at once, {setup.accumulation} times a step"
    if key in ("train.effective_batch", "train.accumulation"):
        return "the same rows a step as before"
    if key == "train.checkpointing":
        return {
            "none": "there is room for all that is computed",
            "full": "what layers keep stays on the GPU",
            "offload": "what layers keep waits in host memory",
            "unsloth": "the inputs of layers wait in host memory",
        }[setup.policy]
    if key == "memory.keep_layers":
        return f"of {shape.layers} layers, nothing of them is computed again"
    if key == _DEQUANTIZED:
        return "what a layer that is computed again dequantizes stays for its backward"
    if key == _DENSE:
        size = result.setup.dense_layers * dense_weights(shape, setup) * setup.item / GIB
        return f"{size:.2f} GiB, for which weights are dequantized once a step and not in each micro-batch"
    if key == "memory.keep_attention_layers":
        if keeps_projections(setup):
            return "of these q, k, v, o and attention are not computed again"
        return "of these attention is not computed again"
    if key == _EMBEDDING:
        size = host_embedding_bytes(shape, setup) / GIB
        return f"{size:.2f} GiB, of which the GPU reads the rows that it needs over the bus"
    return f"of {shape.layers} layers; their frozen weights come from host memory"
