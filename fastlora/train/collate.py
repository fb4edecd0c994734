"""Batches of token ids and labels; rows packed together are kept apart the engine's way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastlora.data.mask import IGNORED

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
