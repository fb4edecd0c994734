"""What a run on a GPU becomes where its recipe leaves it open: `budget.choose`, once with micro-batches as CUDA graphs
and once without, and of the two the one that trains the same data in less time.

Recorded, a micro-batch takes what the GPU computes; otherwise the host's time, where that is longer. Against it stand
the padding to few lengths, and the micro-batches of each length that are computed to record it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastlora.plan.advise import Again, with_settings
from fastlora.plan.budget import Choice, RowTokens, choose, row_seconds, speed_of
from fastlora.plan.predict import Prediction
from fastlora.plan.setup import FUSED
from fastlora.plan.working import fused_by_unsloth
from fastlora.recipe.advice import Filled
from fastlora.recipe.schema import Recipe

FREE_SHARE = 0.9
"""Of the memory that is free, what a run plans for that was given no budget: others may want some in the meantime."""
_WORTH = 0.02
"""Time that graphs must save to be chosen: they hold memory, and a prediction is no better than that."""
_MOST_RANK = 256
"""Beyond it fastlora's kernels leave a layer to PEFT, so that unsloth's stay (a test holds it to theirs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """Those of a run, of so many rows as its recipe says."""

    tokens: int
    """Of the longest row of one, on average; where rows are packed, of a packed one."""
    padding: float
    """Of all tokens, those that padding to few lengths, and to full micro-batches, adds."""
    count: int
    """0: not known, but many."""
    rehearsed: int
    """Computed as usual before them, to be recorded."""

    @property
    def padded(self) -> float:
        """Of the longest row, with its part of what is added."""
        return self.tokens / (1 - self.padding)

    @property
    def more(self) -> float:
        """Those that are rehearsed, for each of the run."""
        return self.rehearsed / max(1, self.count)


def without_budget(recipe: Recipe, *, batches: bool = True) -> Recipe:
    """The recipe of a run without memory.vram, in which the rest is to be chosen: whether layers are computed again,
    unless train.checkpointing says it, and with `batches` train.micro_batch, unless it is stated. Weights are in host
    memory only as asked."""
    memory = recipe.memory
    stated: dict[str, Any] = {
        "memory.stream_layers": memory.stream_layers or 0,
        "memory.embedding": memory.embedding or "gpu",
    }
    if not batches:
        stated["train.micro_batch"] = recipe.train.micro_batch
    if recipe.train.checkpointing != "auto":
        for key in ("keep_layers", "keep_attention_layers", "dense_layers"):
            stated[f"memory.{key}"] = getattr(memory, key) or 0
        stated["memory.keep_dequantized"] = bool(memory.keep_dequantized)
    return with_settings(recipe, stated)


def full_rows(recipe: Recipe) -> MicroBatches:
    """Where there are no data: rows that need no padding, in a run that is long."""
    return MicroBatches(tokens=recipe.model.seq_len_tokens, padding=0.0, count=0, rehearsed=0)


def settle(
    now: Prediction, again: Again, micro_batches: Callable[[Recipe], MicroBatches] | None
) -> Choice | None:
    """What the open keys become on the card of `now`; memory.cuda_graphs and with it kernels.mode among them, where
    `micro_batches` says what graphs are worth there. None: nothing fits."""
    if micro_batches is None:
        return choose(now, again)
    of_size: dict[int, MicroBatches] = {}

    def of(recipe: Recipe) -> MicroBatches:
        size = recipe.train.micro_batch
        if size not in of_size:
            of_size[size] = micro_batches(recipe)
        return of_size[size]

    choice = _settle(now, again, of)
    mode = choice and _pefts(choice.result, lambda recipe: of(recipe).tokens)
    return replace(choice, filled=(*choice.filled, mode)) if choice and mode else choice


def _settle(now: Prediction, again: Again, of: Callable[[Recipe], MicroBatches]) -> Choice | None:
    asked = now.recipe.memory.cuda_graphs
    plain = choose(now, again, lambda recipe: of(recipe).tokens)
    if asked is False:
        return plain
    refused = _refused(now, again)
    recorded = None if refused else _recorded(now, again, lambda recipe: of(recipe).padded)
    if asked and recorded:
        return recorded
    if asked:
        return plain
    if plain is None:
        return recorded and _with(recorded, Filled(_KEY, True, "without them nothing fits"))
    if recorded is None:
        return _with(plain, Filled(_KEY, False, refused or "they need more memory"))
    share, said = _compared(plain.result, recorded.result, of)
    chosen = Filled(_KEY, share < 1 - _WORTH, said)
    return _with(replace(recorded, plainest=plain.plainest) if chosen.value else plain, chosen)


def _pefts(result: Prediction, row_tokens: RowTokens) -> Filled | None:
    """PEFT's layers where unsloth fuses none but compiled all around them, if the GPU waits for Python with rows as
    long as they are: launched one by one, ours keep Python as long or longer. On an H200 Gemma 3 4B had 0.99 of the
    tokens with them (a fifth of the steps at 0.90), Phi 4's shape, where Python waits for the GPU, 1.05. Not with DoRA,
    of which PEFT's launches more (3.11), and not in 8 bits, which was not measured."""
    setup, recipe = result.setup, result.recipe
    is_open = recipe.kernels.mode == "auto" and not recipe.kernels.require_fast
    measured = setup.engine == "unsloth" and not setup.dora and setup.quantization != "int8"
    if not is_open or not measured or fused_by_unsloth(result.shape, setup):
        return None
    took = speed_of(result, row_tokens)
    if took.bound_by != "host":  # which a recorded micro-batch never is
        return None
    gpu_ms, host_ms = 1e3 * took.gpu_s, 1e3 * took.host_s
    return Filled(
        "kernels.mode",
        "off",
        f"the GPU waits for Python ({gpu_ms:.0f} ms of its own in {host_ms:.0f}), which launches PEFT's layers sooner, "
        "compiled together with unsloth's",
    )


_KEY = "memory.cuda_graphs"


def _refused(now: Prediction, again: Again) -> str:
    """Why graphs are not chosen, whatever they would be worth."""
    if reason := _why_not(now.recipe, again):
        return f"not possible: {reason}"
    kind = now.shape.model_type
    if now.recipe.memory.cuda_graphs is None and now.setup.engine == "unsloth":
        if now.setup.packed:
            return "packed rows on unsloth need it set to true, not measured yet"
        in_window = kind == "phi3" and 0 < now.shape.window < now.recipe.model.seq_len_tokens
        if in_window or kind not in FUSED | {"phi3", "gemma3_text"}:
            # Whether its forward gives hidden states, which our loss takes, is known once it is loaded: without them a
            # run goes on unrecorded. These two were recorded in runs and in the benchmark's gates (docs/log.md).
            rows = f" with a window of {now.shape.window:,} tokens" if in_window else ""
            return f"{kind} on unsloth{rows} needs it set to true, not measured yet"
    return ""


def _why_not(recipe: Recipe, again: Again) -> str:
    """Why no micro-batch could be recorded, whatever is chosen."""
    settings: dict[str, Any] = {_KEY: True}
    if recipe.train.checkpointing == "auto":
        settings["train.checkpointing"] = "full"
    return again(with_settings(recipe, settings)).setup.not_recorded


def _recorded(now: Prediction, again: Again, row_tokens: RowTokens) -> Choice | None:
    """With fastlora's kernels in place of unsloth's, where kernels.mode is open: as calls they keep the host longer,
    which does not count here, and on the GPU they took 0.92 of the time (1B and 8B). None: nothing fits."""
    settings: dict[str, Any] = {_KEY: True}
    more: tuple[Filled, ...] = ()
    ours = now.setup.engine == "unsloth" and now.setup.rank <= _MOST_RANK
    if ours and now.recipe.kernels.mode == "auto":
        settings["kernels.mode"] = "all"
        why = "recorded, fastlora's kernels take less of the GPU's time than unsloth's"
        more = (Filled("kernels.mode", "all", why),)
    choice = choose(again(with_settings(now.recipe, settings)), again, row_tokens)
    if choice is None or not choice.result.setup.graphs:
        return None
    return replace(choice, filled=(*more, *choice.filled))


def _with(choice: Choice, one: Filled) -> Choice:
    return replace(choice, filled=(one, *choice.filled))


def _compared(
    plain: Prediction, recorded: Prediction, micro_batches: Callable[[Recipe], MicroBatches]
) -> tuple[float, str]:
    """(the time with graphs over that without, a line that says why)."""
    of, size = micro_batches(recorded.recipe), recorded.setup.micro_batch

    def tokens(recipe: Recipe) -> float:
        return micro_batches(recipe).tokens

    calls_s, replay_s = (size * row_seconds(one, tokens) for one in (plain, recorded))
    share = (replay_s + of.more * calls_s) / (1 - of.padding) / calls_s
    rehearsed = f" and {of.rehearsed} of them to record before the {of.count:,}" if of.count else ""
    return share, (
        f"{size} x {of.tokens:,} tokens take {1e3 * replay_s:.0f} ms instead of {1e3 * calls_s:.0f} (bound by the "
        f"{speed_of(plain, tokens).bound_by}); with {of.padding:.1%} padding{rehearsed}, {share:.2f} of the time"
    )
