"""The work that every arm does: the same rows in the same order, made once and saved.

Tokens follow Zipf's law (the k-th of them with weight 1 / (k + 3)), because a model can learn that: on
uniform noise the loss could not fall, and a frozen adapter would look like a trained one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.bench.schema import Work
from fastlora.data.mask import IGNORED
from fastlora.data.pack import pack_rows

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

Row = dict[str, list[int]]
"""input_ids, labels and, when packed, seq_lengths."""
Steps = list[list[list[Row]]]
"""Optimizer steps of micro-batches of rows."""

# Real lengths: total tokens exp(N(5.3, 0.9)) in [16, seq_len_tokens], of which a share of U(0.2, 0.6) is
# prompt. Median 200, mean about 290, 1 row in 20 over 880: the long tail of instruction sets.
LOG_MEAN, LOG_DEVIATION, SHORTEST = 5.3, 0.9, 16
PROMPT_SHARE = (0.2, 0.6)


def random_rows(
    work: Work,
    *,
    vocabulary: int,
    seq_len_tokens: int,
    rows_per_step: int,
    padding: int | None = None,
) -> list[Row]:
    """Rows for `work.steps` optimizer steps. `padding`: the tokenizer's, which no text has and which is not drawn:
    unsloth embeds it as zeros.

    full: rows of seq_len_tokens, all supervised. real: rows of long-tailed lengths with their prompts
    unsupervised, as many as have the tokens of the same number of full rows.
    """
    import numpy as np

    draw = np.random.default_rng(work.seed)
    full = work.steps * rows_per_step
    if work.lengths == "full":
        ids = _zipf(draw, vocabulary, full * seq_len_tokens, padding)
        ids = ids.reshape(full, seq_len_tokens)
        return [{"input_ids": row, "labels": row} for row in ids.tolist()]
    rows: list[Row] = []
    tokens = 0
    while tokens < full * seq_len_tokens:
        length = int(
            np.clip(round(draw.lognormal(LOG_MEAN, LOG_DEVIATION)), SHORTEST, seq_len_tokens)
        )
        prompt = round(length * draw.uniform(*PROMPT_SHARE))
        ids = _zipf(draw, vocabulary, length, padding).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
        tokens += length
    return rows


def _zipf(
    draw: np.random.Generator, vocabulary: int, count: int, padding: int | None
) -> np.ndarray:
    import numpy as np

    weights = 1 / (np.arange(vocabulary) + 3.0)
    if padding is not None and padding < vocabulary:
        weights[padding] = 0
    return np.searchsorted(np.cumsum(weights / weights.sum()), draw.random(count)).clip(
        0, vocabulary - 1
    )


def dataset_rows(
    dataset: Dataset, work: Work, *, rows_per_step: int, pack_tokens: int | None
) -> list[Row]:
    """Rows of a user's data in an order drawn with work.seed; again from the start if they are too few.

    For work.steps optimizer steps of `rows_per_step` rows; if arms pack, of so many packs of
    `pack_tokens`, so that they have enough steps too.
    """
    import numpy as np

    order = np.random.default_rng(work.seed).permutation(len(dataset)).tolist()
    count, tokens = work.steps * rows_per_step, 0
    rows: list[Row] = []
    while len(rows) < count or tokens < count * (pack_tokens or 0):
        row = dataset[order[len(rows) % len(order)]]
        rows.append({name: row[name] for name in ("input_ids", "labels")})
        tokens += len(row["input_ids"])
    return rows


def pack(rows: Sequence[Row], seq_len_tokens: int) -> list[Row]:
    return pack_rows(
        [row["input_ids"] for row in rows], [row["labels"] for row in rows], seq_len_tokens
    )


def steps(rows: Sequence[Row], micro_batch: int, accumulation: int) -> Steps:
    """Whole optimizer steps; rows that fill none are put into the last one's micro-batches, so that
    padded and packed arms train on the same rows."""
    size = micro_batch * accumulation
    groups = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [
        [group[start : start + micro_batch] for start in range(0, len(group), micro_batch)]
        for group in groups
    ]


def save(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps(list(rows)), encoding="utf-8")


def load(path: Path) -> list[Row]:
    loaded: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def expected(rows: Sequence[Row]) -> tuple[str, str]:
    """(digest, order) that Digest gives when these rows, packed or not, are fed in this order."""
    digest = Digest()
    for row in rows:
        start = 0
        for length in row.get("seq_lengths", [len(row["input_ids"])]):
            end = start + length
            digest.add_row(row["input_ids"][start:end], row["labels"][start:end])
            start = end
    return digest.value(), digest.ordered()


class Digest:
    """What was really fed, told apart from what was asked for: the tokens and labels of each row that
    reached the model, whatever batch it came in."""

    def __init__(self) -> None:
        self._rows: list[str] = []
        self.tokens = self.fed = self.squared_lengths = 0

    def add(self, inputs: dict[str, Any]) -> None:
        """`inputs`: one micro-batch, on any device: input_ids and labels (batch, tokens), and either an
        attention_mask or, when packed, position_ids that start again at each row."""
        self.fed += inputs["input_ids"].numel()
        for ids, labels in _rows_of(inputs):
            self.add_row(ids, labels)

    def add_row(self, ids: list[int], labels: list[int]) -> None:
        told = json.dumps([ids, [IGNORED, *labels[1:]]])  # the first is never predicted
        self.tokens += len(ids)
        self.squared_lengths += len(ids) ** 2
        self._rows.append(hashlib.sha256(told.encode()).hexdigest())

    def value(self) -> str:
        """Of the rows as a set with repetitions: padded and packed arms feed them in other orders."""
        return hashlib.sha256("".join(sorted(self._rows)).encode()).hexdigest()[:16]

    def ordered(self) -> str:
        return hashlib.sha256("".join(self._rows).encode()).hexdigest()[:16]


def _rows_of(inputs: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        for ids, labels, length in zip(inputs["input_ids"], inputs["labels"], lengths, strict=True):
            yield ids[:length].tolist(), labels[:length].tolist()
        return
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], inputs["input_ids"].shape[1]]
    for start, end in zip(starts, ends, strict=True):
        yield inputs["input_ids"][0, start:end].tolist(), inputs["labels"][0, start:end].tolist()
