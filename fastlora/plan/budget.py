"""The fastest way to train a recipe within so much memory: what `memory.vram` chooses.

Every choice leaves what is learnt as it is. Tried are micro-batches at the recipe's effective batch, checkpoint
policies and, for each, every number of layers that are kept whole, with as many more that keep their attention as
there is then room for. Where nothing of it fits, as few layers as need be have their frozen weights in host memory.
The same recipe, card and budget always choose the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fastlora.plan.advise import with_settings
from fastlora.plan.predict import Prediction
from fastlora.recipe.advice import Filled
from fastlora.recipe.schema import Recipe

Again = Callable[[Recipe], Prediction]
"""The prediction for another recipe, all else as it was."""

OPEN = (
    "train.micro_batch", "train.checkpointing", "memory.keep_layers", "memory.keep_attention_layers",
    "memory.stream_layers",
)  # fmt: skip
"""What may be chosen, where the recipe does not say it."""

POLICIES = {"unsloth": ("none", "unsloth", "offload", "full"), "peft": ("none", "offload", "full")}
_MOST_TOKENS = 16_384
"""Of a micro-batch; a GPU does not become faster beyond, and the loss of one row too many costs more time."""
_ALIKE = 0.01
"""Speeds that differ by less are taken for the same."""


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
                "needed_gib": round(of.memory.comfortable_gib, 3),
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
        yield f"memory.vram = {self.result.card.vram_gib:.2f} GiB: {took}; with nothing kept or streamed {plain}"
        for one in self.filled:
            yield f"  {one.key} = {one.value}: {one.why}"


def choose(now: Prediction, again: Again) -> Choice | None:
    """What the open keys of a recipe become on the card of `now`, whose size is the budget. None: nothing fits.

    now: the recipe as it stands, with the card's speed.
    """
    recipe, engine = now.recipe, now.setup.engine
    starts = list(_starts(now))
    found = [one for start in starts for one in _kept(now, start, again)]
    if not found and engine == "unsloth" and _given(recipe, "memory.stream_layers") is None:
        found = [one for start in starts for one in _streamed(now, start, again)]
    if not found:
        return None
    # The host's speed is a guess, so among those that it holds back alike the GPU's own decides.
    alike = _within(_within(found, _time), _gpu_time)
    settings, result = min(alike, key=lambda one: (one[1].memory.comfortable_gib, len(one[0])))
    filled = tuple(
        Filled(key, value, _why(key, result))
        for key, value in settings.items()
        if not _stated(recipe, key, value)
    )
    plain = with_settings(recipe, {"train.checkpointing": POLICIES[engine][1]})
    return Choice(filled, result, again(plain))


Found = tuple[dict[str, Any], Prediction]


def _stated(recipe: Recipe, key: str, value: Any) -> bool:
    """Whether the recipe means that already."""
    section, _, name = key.partition(".")
    return bool(getattr(getattr(recipe, section), name) == value or value == 0)


def _given(recipe: Recipe, key: str) -> Any:
    """What the recipe says itself; None where it leaves it open."""
    section, _, name = key.partition(".")
    part = getattr(recipe, section)
    value = getattr(part, name) if name in part.model_fields_set else None
    return None if value == "auto" else value


def _starts(now: Prediction) -> Iterator[dict[str, Any]]:
    """Micro-batch and policy."""
    recipe, setup = now.recipe, now.setup
    effective = setup.micro_batch * setup.accumulation
    sizes = [_given(recipe, "train.micro_batch")]
    if sizes == [None]:
        sizes = [
            size
            for size in range(1, effective + 1)
            if effective % size == 0 and (size == 1 or size * setup.row_tokens <= _MOST_TOKENS)
        ]
    given = _given(recipe, "train.checkpointing")
    for size in sizes:
        for policy in [given] if given else POLICIES[setup.engine]:
            yield {
                "train.micro_batch": size, "train.effective_batch": effective, "train.checkpointing": policy,
            }  # fmt: skip


def _kept(now: Prediction, start: dict[str, Any], again: Again) -> Iterator[Found]:
    """What fits with nothing kept, and with so many layers kept whole and as many more in part as there is room for."""
    recipe, layers, policy = now.recipe, now.shape.layers, start["train.checkpointing"]

    def tried(whole: int, parts: int) -> Found:
        kept = {"memory.keep_layers": whole, "memory.keep_attention_layers": parts}
        settings = start if policy == "none" else start | kept
        return settings, again(with_settings(recipe, settings))

    given, given_parts = (
        _given(recipe, f"memory.{key}") for key in ("keep_layers", "keep_attention_layers")
    )
    wholes = (
        [0] if policy == "none" else range(layers + 1) if given is None else [min(given, layers)]
    )
    most = layers if given_parts is None else given_parts
    if policy in ("none", "unsloth"):
        most = 0
    for whole in wholes:
        # The more are kept whole, the fewer more in part.
        for parts in range(min(most, layers - whole), -1, -1):
            found = tried(whole, parts)
            if _fits(found[1]):
                yield found
                most = parts
                break
            if given_parts is not None:
                return
        else:
            return


def _streamed(now: Prediction, start: dict[str, Any], again: Again) -> Iterator[Found]:
    """With as few layers streamed as fit, all computed again."""
    if start["train.checkpointing"] == "none" or _given(now.recipe, "memory.keep_layers"):
        return
    for_n: dict[int, Found] = {}

    def fits(streamed: int) -> bool:
        settings = start | {"memory.stream_layers": streamed}
        for_n[streamed] = settings, again(with_settings(now.recipe, settings))
        return _fits(for_n[streamed][1])

    fewest = bisect_left(range(now.shape.layers + 1), True, key=fits)
    if fewest in for_n:
        yield for_n[fewest]


def _fits(found: Prediction) -> bool:
    return found.verdict == "fits"


def _time(found: Found) -> float:
    """Seconds a token."""
    speed = found[1].speed
    assert speed is not None
    return 1 / speed.tokens_per_s


def _gpu_time(found: Found) -> float:
    speed = found[1].speed
    assert speed is not None
    return (speed.gpu_s + speed.waits_s) / found[1].setup.tokens


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
            "full": "the inputs of layers stay on the GPU",
            "offload": "the inputs of layers wait in host memory",
            "unsloth": "the inputs of layers wait in host memory",
        }[setup.policy]
    if key == "memory.keep_layers":
        return f"of {shape.layers} layers, nothing of them is computed again"
    if key == "memory.keep_attention_layers":
        return "of these the MLP alone is computed again"
    return f"of {shape.layers} layers; their frozen weights come from host memory"
