"""Batches of token ids and labels; rows packed together are kept apart the engine's way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastlora.data.mask import IGNORED

ROW_LENGTHS = "row_lengths"
"""In a batch, beside its tensors: the tokens of each row, of each of its sequences where rows are packed. No input of a
model; `split` takes it out."""
ROW_LABELS = "row_labels"
"""As ROW_LENGTHS: the tokens of each row, or pack of rows, that have a label and are predicted. Counted here, on the
CPU, since to ask a GPU is to wait for it."""

if TYPE_CHECKING:
    import torch

    from fastlora.engines import Engine


class Collator:
    """Rows -> input_ids, labels and attention_mask, each (rows, longest row), padded on the right.

    Packed rows come as one flat sequence, (1, all tokens), with the engine's inputs in the mask's place.
    """

    def __init__(self, pad_token_id: int, engine: Engine) -> None:
        self.pad_token_id, self.engine = pad_token_id, engine

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        if "seq_lengths" in rows[0]:
            lengths = [int(length) for row in rows for length in row["seq_lengths"]]
            flat = {
                name: torch.cat([torch.as_tensor(row[name]) for row in rows]).unsqueeze(0)
                for name in ("input_ids", "labels")
            }
            return {**flat, **self.engine.packed_inputs(lengths)}
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for place, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][place, :length] = torch.as_tensor(row["input_ids"])
            batch["labels"][place, :length] = torch.as_tensor(row["labels"])
            batch["attention_mask"][place, :length] = 1
        return batch


class SplittableCollator(Collator):
    """Batches for `split`, with ROW_LENGTHS and ROW_LABELS."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        packed = "seq_lengths" in rows[0]
        lengths = [
            [int(length) for length in row["seq_lengths"]] if packed else len(row["input_ids"])
            for row in rows
        ]
        # The first token of a row is never predicted; those of packed rows have no label.
        predicted = slice(0 if packed else 1, None)
        labels = [int((torch.as_tensor(row["labels"])[predicted] != IGNORED).sum()) for row in rows]
        return {**super().__call__(rows), ROW_LENGTHS: lengths, ROW_LABELS: labels}


def split(batch: dict[str, Any], most_rows: int, engine: Engine) -> list[dict[str, torch.Tensor]]:
    """The model's inputs for so many rows at a time: what the collator makes of those rows alone."""
    inputs = {name: value for name, value in batch.items() if name not in (ROW_LENGTHS, ROW_LABELS)}
    rows = batch[ROW_LENGTHS]
    if len(rows) <= most_rows:
        return [inputs]
    parts = []
    for first in range(0, len(rows), most_rows):
        some = rows[first : first + most_rows]
        if isinstance(some[0], list):
            begins = sum(sum(row) for row in rows[:first])
            lengths = [length for row in some for length in row]
            place = (slice(None), slice(begins, begins + sum(lengths)))
            cut = {name: inputs[name][place].contiguous() for name in ("input_ids", "labels")}
            parts.append(cut | engine.packed_inputs(lengths))
        else:
            place = (slice(first, first + len(some)), slice(max(some)))
            parts.append({name: value[place].contiguous() for name, value in inputs.items()})
    return parts


def split_labels(batch: dict[str, Any], most_rows: int) -> list[int]:
    """The tokens with a label in each part of `split`."""
    rows = batch[ROW_LABELS]
    return [sum(rows[first : first + most_rows]) for first in range(0, len(rows), most_rows)]


def shares(
    parts: list[dict[str, Any]], counts: list[int], means: bool
) -> Iterator[tuple[dict[str, Any], int, float | None]]:
    """Parts, the tokens of each with a label, and how much more or less than an equal share of the micro-batch's mean
    each one's mean is: as its tokens are. A part without any has no mean."""
    weighed = means and len(parts) > 1
    for part, count in zip(parts, counts, strict=True):
        if not weighed:
            yield part, count, None
        elif count or not any(counts):
            yield part, count, count * len(parts) / max(1, sum(counts))
