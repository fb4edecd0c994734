"""Static shapes: few lengths, to one of which every micro-batch is padded, and how many of its tokens may have a label.

What is recorded for one shape serves no other, so the fewer there are the better. Padding stands on the right, where
no token of a row looks, or is a packed row of its own: it has no label, and losses and gradients stay what they were.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from fastlora.data.mask import IGNORED
from fastlora.engines.base import CUMULATIVE_LENGTHS, PACKED_LENGTHS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset

MOST_LENGTHS = 8
MULTIPLE = 64
"""What lengths are multiples of, for the sake of matrix products; less, but at least 8, where rows are so short that
there would be fewer lengths."""
_DRAWN = 4096
"""Micro-batches that the choice is made for, at least."""
_FITTING = 0.99
"""Of the micro-batches of a length, so many have labels enough, and of all, packed rows; others are not recorded. At 1B
the output layer is a fifth of a step if all tokens have labels, and without this it would take as long where a third
of them has."""


@dataclass(frozen=True, slots=True)
class Shapes:
    lengths: tuple[int, ...]
    """Ascending, in tokens: of the longest row, where rows are packed of all together."""
    labels: tuple[int, ...]
    """For each length, the most tokens with a label that a micro-batch of it may have."""
    padding: float = 0.0
    """The part of all tokens that is there only for these lengths' sake, in micro-batches of a random order."""
    rows: int = 0
    """Packed rows that a micro-batch may have, those of its padding among them; 0: rows are not packed."""

    def fit(self, tokens: int) -> tuple[int, int]:
        """(length, most labels) for so many tokens; none shorter than they are."""
        place = bisect.bisect_left(self.lengths, tokens)
        if place == len(self.lengths):
            return tokens, tokens
        return self.lengths[place], self.labels[place]

    def __str__(self) -> str:
        many = "one length" if len(self.lengths) == 1 else f"{len(self.lengths)} lengths"
        return f"{many}, {self.padding:.1%} padding"


def choose_shapes(rows: Dataset, micro_batch: int, most_tokens: int) -> Shapes:
    """For micro-batches of so many of these rows in a random order. Deterministic: the same rows, the same shapes.

    `rows`: as Prepared.train. `most_tokens`: of a row, or of a packed one.
    """
    return shapes_and_mean(rows, micro_batch, most_tokens)[0]


def shapes_and_mean(rows: Dataset, micro_batch: int, most_tokens: int) -> tuple[Shapes, int]:
    """choose_shapes, and the tokens of a micro-batch's longest row on average; of a packed row, where they are."""
    import numpy as np

    packed = "seq_lengths" in rows.column_names
    rows_each = min(micro_batch, len(rows))
    tokens, labels = row_sizes(rows)
    grid = _order(len(rows), rows_each)
    widths = tokens[grid].sum(axis=1) if packed else tokens[grid].max(axis=1)
    counts = labels[grid].sum(axis=1)
    longest = int(widths.max() if packed else tokens.max())
    most_tokens *= rows_each if packed else 1
    histogram = Counter(
        {
            int(width): int(n)
            for width, n in zip(*np.unique(widths, return_counts=True), strict=True)
        }
    )
    histogram[longest] += 0  # to be held, though never drawn
    multiple = MULTIPLE
    while multiple > 8 and max(histogram) < MOST_LENGTHS * multiple:
        multiple //= 2
    lengths = choose_lengths(histogram, MOST_LENGTHS, multiple, most_tokens)
    of_length = np.searchsorted(lengths, widths)
    rows_high = 1 if packed else rows_each
    bounds = []
    for place, length in enumerate(lengths):
        here = counts[of_length == place]
        enough = int(np.quantile(here, _FITTING, method="higher")) if len(here) else 0
        bounds.append(min(_up(max(enough, 1), multiple), length * rows_high))
    padded = np.asarray(lengths)[of_length].sum()
    padding = round(1 - float(widths.sum() / padded), 4)
    most_rows = 0
    if packed:
        column = rows.select_columns(["seq_lengths"]).with_format("arrow")[:].column("seq_lengths")
        there = column.combine_chunks().value_lengths().to_numpy()[grid].sum(axis=1)
        # Padding that is longer than a row can be is several rows.
        most_rows = _up(int(np.quantile(there, _FITTING, method="higher")) + rows_each, 8)
    mean = float(widths.mean()) / (rows_each if packed else 1)
    return Shapes(tuple(lengths), tuple(bounds), padding, most_rows), round(mean)


def _order(rows: int, rows_each: int) -> np.ndarray:
    """Places of each micro-batch's rows in a random order, (micro-batches, rows_each); the same at every call."""
    import numpy as np

    complete = rows // rows_each
    draw = np.random.default_rng(0)
    orders = [draw.permutation(rows) for _ in range(math.ceil(_DRAWN / complete))]
    drawn = np.concatenate([order[: complete * rows_each] for order in orders])
    return drawn.reshape(-1, rows_each)


def choose_lengths(
    histogram: Mapping[int, int], most: int, multiple: int, longest: int
) -> list[int]:
    """At most so many lengths, multiples of `multiple` or `longest`, that hold every width with the fewest padded
    tokens in all; ascending. `histogram`: width in tokens -> how often it comes; none above `longest`.

    By dynamic programming over the widths, rounded up, as cuts of a sorted line into groups that each are as long as
    their last: O(most x widths^2).
    """
    rounded: Counter[int] = Counter()
    for width, times in histogram.items():
        rounded[min(_up(width, multiple), longest)] += times
    sizes = sorted(rounded)
    upto = [0, *accumulate(rounded[size] for size in sizes)]
    # best[j]: (tokens, lengths) of the first j sizes, in the groups so far.
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    best += [(sizes[j - 1] * upto[j], (sizes[j - 1],)) for j in range(1, len(sizes) + 1)]
    for _ in range(min(most, len(sizes)) - 1):
        best = [
            min(
                [best[j]]
                + [
                    (best[i][0] + sizes[j - 1] * (upto[j] - upto[i]), (*best[i][1], sizes[j - 1]))
                    for i in range(1, j)
                ],
                key=lambda found: (found[0], len(found[1])),
            )
            for j in range(len(sizes) + 1)
        ]
    return list(best[-1][1])


def row_sizes(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, tokens with a label) of each row. The first of a row is never predicted."""
    import numpy as np

    table = rows.select_columns(["labels"]).with_format("arrow")[:]
    column = table.column("labels").combine_chunks()
    ends = np.cumsum(column.value_lengths().to_numpy())
    starts = np.concatenate([[0], ends[:-1]])
    labelled = column.flatten().to_numpy() != IGNORED
    labelled[starts] = False
    return ends - starts, np.add.reduceat(labelled.astype(np.int64), starts)


def pad(
    batch: Mapping[str, torch.Tensor],
    length: int,
    pad_token_id: int,
    *,
    rows: int = 0,
    longest: int = 0,
) -> dict[str, torch.Tensor]:
    """A micro-batch as Collator makes it, on any device, with so many tokens in each row or in all packed ones, and so
    many rows, if there are not more.

    Rows that are added are of `pad_token_id` alone. Where packed ones come with CUMULATIVE_LENGTHS, the padding is rows
    of at most `longest` tokens, and what is added behind them is rows of none.
    """
    import torch

    missing = length - batch["input_ids"].shape[1]
    absent = max(0, rows - len(batch["input_ids"])) if "attention_mask" in batch else 0
    ends = batch.get(CUMULATIVE_LENGTHS)
    if ends is not None:
        more = max(rows + 1 - len(ends), -(-missing // longest))
        steps = torch.arange(1, more + 1, device=ends.device, dtype=ends.dtype) * longest
        ends = torch.cat([ends, (ends[-1:] + steps).clamp(max=length)])
        lengths = {PACKED_LENGTHS: ends.diff()} if PACKED_LENGTHS in batch else {}
        batch = {**batch, CUMULATIVE_LENGTHS: ends, **lengths}
    if not (missing or absent):
        return dict(batch)
    fills = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
    # A row that is padding alone would be one without a token to look at.
    below = {**fills, "attention_mask": 1}
    padded = {}
    for name, tensor in batch.items():
        if name == "position_ids":
            added = torch.arange(missing, device=tensor.device, dtype=tensor.dtype)
            padded[name] = torch.cat([tensor, added.expand(len(tensor), -1)], dim=1)
        elif name in fills:
            wide = torch.nn.functional.pad(tensor, (0, missing), value=fills[name])
            padded[name] = torch.nn.functional.pad(wide, (0, 0, 0, absent), value=below[name])
        else:
            padded[name] = tensor
    return padded


def some_labels(labels: torch.Tensor, first: int, most: int) -> torch.Tensor:
    """(rows, tokens) with at most so many of those that are predicted, the `first` ones passed over."""
    known = labels != IGNORED
    known[:, 0] = False  # never predicted; of packed rows it has none
    place = known.flatten().cumsum(0).view(known.shape)
    return labels.where(known & (place > first) & (place <= first + most), IGNORED)


def cut(rows: Sequence[Mapping[str, torch.Tensor]], tokens: int) -> list[dict[str, torch.Tensor]]:
    """Stand-ins for a micro-batch of a length: the beginnings of these rows, of at most so many tokens in each, or in
    all packed ones. Of each the last token has a label, so that no length has too many of them."""
    import torch

    found = []
    for row in rows:
        packed = "seq_lengths" in row
        ids = row["input_ids"][:tokens]
        if not len(ids):
            break
        labels = torch.full_like(ids, IGNORED)
        labels[-1] = ids[-1]
        short = {"input_ids": ids, "labels": labels}
        if packed:
            ends = row["seq_lengths"].cumsum(0).clamp(max=len(ids))
            lengths = ends.diff(prepend=ends.new_zeros(1))
            short["seq_lengths"] = lengths[lengths > 0]
            tokens -= len(ids)
        found.append(short)
    return found


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
