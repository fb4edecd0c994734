"""Advice: where a recipe leaves what the guides agree on, said with the numbers of its own data.

Advice is printed and kept in the manifest, never applied. `fill` gives a value to keys that a recipe leaves open, by
the same rules; that is `fastlora run --auto`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastlora.recipe.schema import Recipe

LR_RANGE = (1e-4, 3e-4)
BATCH_RANGE = (16, 32)
ALPHA_RANGE = (0.5, 2.0)  # alpha / rank
_FEW_EXAMPLES = 50
_LARGE_DATA = 5_000
_SHORT_ANSWER_TOKENS = 16
_FEW_HELD_OUT = 20
_EVALUATIONS = 5  # a curve


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules ask of the data, as prepared for a recipe, and of the engine."""

    examples: int
    """Rows of data.sources, held-out ones too."""
    rows: int
    """Rows trained on, rehearsal too."""
    held_out: int
    sequences: int
    supervised_tokens: int
    longest_row_tokens: int
    common_openings: float
    """The part of the answers that begin in one of the ten commonest ways."""
    engine: str

    @property
    def answer_tokens(self) -> float:
        return self.supervised_tokens / max(1, self.rows)

    @property
    def rows_per_sequence(self) -> float:
        return self.rows / max(1, self.sequences)


@dataclass(frozen=True, slots=True)
class Advice:
    key: str
    """Where in the recipe; also what advice.ignore silences it by."""
    what: str
    why: str
    set: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. {self.set}"


@dataclass(frozen=True, slots=True)
class Filled:
    """A key that the recipe left open, and the value it was given."""

    key: str
    value: Any
    why: str


def default_epochs(rows: int) -> int:
    """Passes over the data when a recipe names neither epochs nor steps: 3 under 1,000 rows, 2 to
    10,000, 1 above. More passes over small sets, since LoRA overfits large ones first."""
    return 3 if rows < 1_000 else 2 if rows <= 10_000 else 1


def wanted(recipe: Recipe, advice: Iterable[Advice]) -> list[Advice]:
    """Without what advice.ignore names."""
    ignored = recipe.advice.ignore
    return [one for one in advice if "all" not in ignored and one.key not in ignored]


def advise(recipe: Recipe, facts: Facts) -> list[Advice]:
    """What there is to say before training, the most important first."""
    found = (rule(recipe, facts) for rule in _RULES)
    return wanted(recipe, [one for one in found if one])


def _prompting_first(recipe: Recipe, facts: Facts) -> Advice | None:
    if facts.examples >= _FEW_EXAMPLES:
        return None
    return Advice(
        "data.sources",
        f"data.sources: only {facts.examples} examples",
        "so few rather teach their own words than the task, and the model may do it already when it is told how",
        "Try prompting first, with some of them as examples in the prompt; for training collect a few hundred",
    )


def _learning_rate(recipe: Recipe, facts: Facts) -> Advice | None:
    lr, (low, high) = recipe.train.lr, LR_RANGE
    if low <= lr <= high:
        return None
    how = (
        f"{lr / high:.3g} times the {high:g} above which LoRA training tends to diverge or forget"
        if lr > high
        else f"{low / lr:.3g} times below the {low:g} under which an adapter, which starts at zero, barely learns"
    )
    return Advice("train.lr", f"train.lr = {lr:g}", f"it is {how}", "Set train.lr = 2e-4")


def _counted(epochs: float) -> str:
    return f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"


def _epochs_range(rows: int) -> tuple[float, float]:
    return (3, 5) if rows < 1_000 else (1, 3) if rows <= 10_000 else (1, 1)


def epochs_of(recipe: Recipe, facts: Facts) -> float:
    train = recipe.train
    if train.steps is not None:
        return train.steps * _batch(recipe) / max(1, facts.sequences)
    return train.epochs or default_epochs(facts.rows)


def _epochs(recipe: Recipe, facts: Facts) -> Advice | None:
    train, epochs = recipe.train, epochs_of(recipe, facts)
    low, high = _epochs_range(facts.rows)
    good = f"{low:g} to {high:g}" if low != high else f"{low:g}"
    # Early stopping makes a high number a limit and no plan; a low number of steps is a trial.
    # The last step of an epoch is seldom full, so counting by steps may be a little over.
    if epochs > high * 1.05 and not train.early_stopping_patience:
        why = f"{facts.rows:,} rows seen {epochs:.3g} times are learnt by heart; {good} is usual for so many"
        better = high
    elif epochs < low and train.steps is None:
        why = (
            f"{facts.rows:,} rows make few steps in {_counted(epochs)}; {good} is usual for so few"
        )
        better = low
    else:
        return None
    given = f"train.steps = {train.steps}" if train.steps else f"train.epochs = {epochs:g}"
    return Advice("train.epochs", given, why, f"Set train.epochs = {better:g}")


def _good_eval_split(examples: int) -> float | int:
    return 0.1 if examples < 1_000 else 0.05 if examples <= 10_000 else 500


def _no_eval(recipe: Recipe, facts: Facts) -> Advice | None:
    if recipe.data.has_eval or facts.examples < _FEW_EXAMPLES:
        return None
    split = _good_eval_split(facts.examples)
    rows = split if split >= 1 else round(facts.examples * split)
    return Advice(
        "data.eval_split",
        "data.eval_split: nothing is held out",
        f"training loss on {facts.rows:,} rows falls whether the model learns the task or the rows",
        f"Set data.eval_split = {split} ({rows:,} rows)",
    )


def _held_out(recipe: Recipe, facts: Facts) -> Advice | None:
    split, held_out = recipe.data.eval_split, facts.held_out
    if not split or facts.examples < _FEW_EXAMPLES:
        return None
    good = _good_eval_split(facts.examples)
    rows = round(facts.examples * good) if good < 1 else int(good)
    if held_out < _FEW_HELD_OUT and rows >= 2 * held_out:
        why = f"the loss on {held_out} row{'s' * (held_out != 1)} is mostly luck, and {_judges(recipe)} by it"
    elif held_out > facts.rows / 2:
        why = f"{held_out:,} of {held_out + facts.rows:,} rows are not learnt from"
    else:
        return None
    key = "data.eval_split"
    return Advice(key, f"{key} = {split:g}", why, f"Set {key} = {good} ({rows:,} rows)")


def _judges(recipe: Recipe) -> str:
    train = recipe.train
    judges = ["best checkpoint"] * train.keep_best
    judges += ["early stopping"] * bool(train.early_stopping_patience)
    return f"{' and '.join(judges)} {'go' if len(judges) > 1 else 'goes'}" if judges else "you go"


def _evaluations(recipe: Recipe, facts: Facts) -> Advice | None:
    train = recipe.train
    if not (train.keep_best or train.early_stopping_patience):
        return None
    epoch = math.ceil(facts.sequences / _batch(recipe))
    steps = train.steps or math.ceil(epochs_of(recipe, facts) * epoch)
    count = math.ceil(steps / (train.eval_every_steps or epoch))
    # A run is cut short after patience + 1 of them at the soonest, which must not be the last.
    needed = (train.early_stopping_patience or 0) + 2
    every = steps // max(needed, _EVALUATIONS)
    if count >= needed or not every:
        return None
    what = "early stopping never comes" if train.early_stopping_patience else "none can be better"
    key = "train.eval_every_steps"
    times = "once" if count == 1 else f"{count} times"
    return Advice(
        key,
        f"{key} = {train.eval_every_steps}" if train.eval_every_steps else f"{key}: not set",
        f"{steps:,} steps are evaluated {times}, so {what}",
        f"Set {key} = {every}",
    )


def _batch(recipe: Recipe) -> int:
    return recipe.train.micro_batch * recipe.train.accumulation_steps


def _good_batch(recipe: Recipe, facts: Facts) -> int:
    """In sequences: the multiple of micro_batch that first reaches 16 rows."""
    sequences = BATCH_RANGE[0] / facts.rows_per_sequence
    return recipe.train.micro_batch * max(1, math.ceil(sequences / recipe.train.micro_batch))


def _effective_batch(recipe: Recipe, facts: Facts) -> Advice | None:
    batch, (low, high) = _batch(recipe), BATCH_RANGE
    rows = batch * facts.rows_per_sequence
    good = _good_batch(recipe, facts)
    if low <= rows <= high or good == batch:
        return None
    packed = f" x {facts.rows_per_sequence:.3g} rows packed in each" if recipe.data.packing else ""
    steps = math.ceil(facts.sequences / batch)
    why = (
        f"a step averages the gradient of {rows:.0f} rows, which is noisy"
        if rows < low
        else f"{rows:.0f} rows a step leave {steps:,} steps an epoch of {facts.rows:,} rows"
    )
    return Advice(
        "train.effective_batch",
        f"an effective batch of {batch}{packed}",
        f"{why}; {low} to {high} rows are usual",
        f"Set train.effective_batch = {good}",
    )


def _alpha(recipe: Recipe, facts: Facts) -> Advice | None:
    lora = recipe.lora
    ratio, (low, high) = lora.alpha / lora.rank, ALPHA_RANGE
    if lora.rslora or low <= ratio <= high:
        return None
    how = "faint, as a lower train.lr is" if ratio < low else "loud, as a higher train.lr is"
    return Advice(
        "lora.alpha",
        f"lora.alpha = {lora.alpha:g} with lora.rank = {lora.rank}",
        f"alpha / rank = {ratio:.3g} makes the adapter {how}; 1 to 2 is usual",
        f"Set lora.alpha = {lora.rank}",
    )


def good_rank(facts: Facts) -> int:
    short = facts.answer_tokens <= _SHORT_ANSWER_TOKENS
    by_rows = (4, 8, 16) if short else (8, 16, 64)
    return by_rows[0 if facts.rows < 1_000 else 1 if facts.rows <= 50_000 else 2]


def _rank_reason(facts: Facts) -> str:
    return f"{facts.rows:,} rows with {facts.answer_tokens:.0f} answer tokens each"


def _rank(recipe: Recipe, facts: Facts) -> Advice | None:
    rank, good = recipe.lora.rank, good_rank(facts)
    if good / 4 < rank < good * 4:
        return None
    why = (
        "are learnt with less, and more learns the rows by heart"
        if rank > good
        else "hold more than so small an adapter takes up"
    )
    return Advice(
        "lora.rank",
        f"lora.rank = {rank}",
        f"{_rank_reason(facts)} {why}",
        f"Set lora.rank = {good} and lora.alpha = {good}",
    )


def _rehearsal(recipe: Recipe, facts: Facts) -> Advice | None:
    narrow = facts.common_openings >= 0.5
    mixed = recipe.data.rehearsal or len(recipe.data.sources) > 1
    if mixed or facts.rows < _LARGE_DATA or not narrow:
        return None
    return Advice(
        "data.rehearsal",
        "data.rehearsal: none",
        f"{facts.common_openings:.0%} of the answers in {facts.rows:,} rows begin in one of ten ways, and a model that "
        "sees nothing else forgets what it could do before",
        'Set data.rehearsal = { source = "general.jsonl", share = 0.15 }',
    )


def _dropout(recipe: Recipe, facts: Facts) -> Advice | None:
    dropout = recipe.lora.dropout
    if facts.engine != "unsloth" or not dropout:
        return None
    return Advice(
        "lora.dropout",
        f"lora.dropout = {dropout:g} with unsloth",
        "its fused kernels are made for 0; dropout costs masks that are drawn for every layer and step",
        f"Set lora.dropout = 0, unless the held-out loss of your {facts.rows:,} rows says otherwise",
    )


def _seq_len(recipe: Recipe, facts: Facts) -> Advice | None:
    limit, longest = recipe.model.seq_len_tokens, facts.longest_row_tokens
    if limit <= 2048 or limit < 4 * longest:
        return None
    good = math.ceil(longest / 64) * 64
    why = (
        f"packed sequences are filled to it and take VRAM for it, though the longest row has {longest:,} tokens"
        if recipe.data.packing
        else f"the longest row has {longest:,} tokens; a longer one that comes in later would take up to "
        f"{limit / longest:.0f} times its VRAM"
    )
    good = max(good, 2048) if recipe.data.packing else good
    key = "model.seq_len_tokens"
    return Advice(key, f"{key} = {limit}", why, f"Set {key} = {good}")


_RULES: tuple[Callable[[Recipe, Facts], Advice | None], ...] = (
    _prompting_first, _learning_rate, _epochs, _no_eval, _held_out, _evaluations,
    _effective_batch, _alpha, _rank, _rehearsal, _dropout, _seq_len,
)  # fmt: skip


def fill_eval(recipe: Recipe, examples: int) -> list[Filled]:
    """data.eval_split, where nothing is said of held-out rows. Apart from `fill`, whose rules count the rows left."""
    said = recipe.data.model_fields_set & {"eval_split", "eval_sources"}
    if said or examples < _FEW_EXAMPLES:
        return []
    why = f"{examples:,} examples; without held-out rows nothing tells learning from memorising"
    return [Filled("data.eval_split", _good_eval_split(examples), why)]


def fill(recipe: Recipe, facts: Facts) -> list[Filled]:
    """A value and a reason for every key that the rules know and the recipe leaves open."""
    return list(_fill(recipe, facts))


def _fill(recipe: Recipe, facts: Facts) -> Iterator[Filled]:
    train, lora = recipe.train.model_fields_set, recipe.lora.model_fields_set
    rank = recipe.lora.rank
    if "rank" not in lora:
        rank = good_rank(facts)
        yield Filled("lora.rank", rank, _rank_reason(facts))
    if "alpha" not in lora:
        yield Filled("lora.alpha", rank, f"alpha / rank = 1, with lora.rank = {rank}")
    if "dropout" not in lora:
        yield Filled("lora.dropout", 0.0, "the fused kernels are made for it")
    if "lr" not in train:
        yield Filled("train.lr", 2e-4, "the middle of 1e-4 to 3e-4, which suits LoRA")
    if not train & {"epochs", "steps"}:
        epochs = float(default_epochs(facts.rows))
        yield Filled("train.epochs", epochs, f"{facts.rows:,} rows")
    if not train & {"accumulation", "effective_batch"}:
        batch = _good_batch(recipe, facts)
        rows = batch * facts.rows_per_sequence
        yield Filled("train.effective_batch", batch, f"{rows:.0f} rows a step; 16 to 32 are usual")


def apply(recipe: Recipe, filled: Iterable[Filled]) -> Recipe:
    """The recipe with the keys filled, validated again."""
    table = recipe.model_dump(exclude_unset=True)
    for one in filled:
        section, _, name = one.key.partition(".")
        table.setdefault(section, {})[name] = one.value
    return Recipe.model_validate(table)
