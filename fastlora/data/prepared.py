"""What a run is given of its data, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastlora.data.blend import describe
from fastlora.data.prompts import Question
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

Announce = Callable[[str], None]


@dataclass(slots=True)
class SplitStats:
    rows: int = 0
    """Rows trained on, before packing."""
    sequences: int = 0
    """What the trainer sees: rows, or packed groups of rows."""
    tokens: int = 0
    supervised_tokens: int = 0
    longest_row_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    truncated_supervised_tokens: int = 0
    unsupervised_rows: int = 0
    """Dropped: truncation left them no supervised token."""


@dataclass(slots=True)
class DataStats:
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Per source: name, label (short), role (train, rehearsal or eval), format, fingerprint, unread (columns), rows,
    bad_rows as [number, reason], and of its rows: train and eval (rows and supervised_tokens of each), held_out,
    dropped."""
    train: SplitStats = field(default_factory=SplitStats)
    eval: SplitStats | None = None
    stop_token: str = ""
    preview: list[tuple[str, bool]] = field(default_factory=list)
    """The first row trained on, as cut, in pieces of text, each with whether it is supervised."""
    key: str = ""
    common_openings: float = 0.0
    """The part of the answers, rehearsal aside, that begin in one of the ten commonest ways."""

    @property
    def bad_rows(self) -> int:
        return sum(len(source["bad_rows"]) for source in self.sources)


@dataclass(frozen=True, slots=True)
class Prepared:
    train: Dataset
    """Columns input_ids and labels (lists of ints); when packed, seq_lengths too."""
    eval: Dataset | None
    """Never packed: held-out loss is per row, and answers are read from its rows."""
    stats: DataStats
    prompts: tuple[Question, ...] = ()
    """Those of eval.prompts."""

    def eval_by_source(self) -> dict[str, Dataset]:
        """The held-out rows of each source that has any, by its label. Together, and in order, they are `eval`."""
        parts: dict[str, Dataset] = {}
        start = 0
        for source in self.stats.sources:
            if (rows := source["eval"]["rows"]) and self.eval is not None:
                parts[source["label"]] = self.eval.select(range(start, start + rows))
                start += rows
        return parts


_SHOWN_COLUMNS = 6


def announce_stats(stats: DataStats, recipe: Recipe, announce: Announce) -> None:
    for source in stats.sources:
        how = "detected" if source["detected"] else "as the recipe says"
        bad, unread = len(source["bad_rows"]), source["unread"]
        skipped = f", {bad} bad row{'s' if bad > 1 else ''} skipped" if bad else ""
        if unread:
            more = f" and {len(unread) - _SHOWN_COLUMNS} more" if unread[_SHOWN_COLUMNS:] else ""
            skipped += f"; not read: {', '.join(unread[:_SHOWN_COLUMNS])}{more}"
        announce(
            f"data: {source['name']}: {source['rows']:,} rows, format {source['format']} ({how}){skipped}"
        )
    for line in describe(stats.sources, recipe.data):
        announce(line)
    for name, split in (("train", stats.train), ("eval", stats.eval)):
        if split is None:
            continue
        share = split.supervised_tokens / max(1, split.tokens)
        announce(
            f"data: {name}: {split.rows:,} rows, {split.sequences:,} sequences, {split.tokens:,} tokens, "
            f"{split.supervised_tokens:,} supervised ({share:.0%})"
        )
        held_out = [source for source in stats.sources if source["eval"]["rows"]]
        if split is stats.eval and len(held_out) > 1:
            parts = [f"{source['label']} {source['eval']['rows']:,}" for source in held_out]
            announce(f"data: eval: rows by source: {', '.join(parts)}")
        if split.truncated_rows:
            announce(
                f"data: {name}: {split.truncated_rows:,} rows cut at {recipe.model.seq_len_tokens} tokens, "
                f"{split.truncated_tokens:,} tokens lost ({split.truncated_supervised_tokens:,} supervised); "
                f"the longest row has {split.longest_row_tokens:,}"
            )
        if split.unsupervised_rows:
            announce(
                f"data: {name}: {split.unsupervised_rows:,} rows dropped: no supervised token is left in them"
            )
