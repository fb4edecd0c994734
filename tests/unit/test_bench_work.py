"""Rows: what is drawn, what is packed, what the digest sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastlora.bench import work as works
from fastlora.bench.schema import Work
from fastlora.data.mask import IGNORED
from fastlora.engines.base import new_position_ids
from fastlora.train.collate import Collator


class PlainEngine:
    def packed_inputs(self, lengths: list[int]) -> dict[str, torch.Tensor]:
        return {"position_ids": new_position_ids(lengths)}


def draw(**changes: object) -> list[works.Row]:
    work = Work(**{"steps": 6, **changes})
    return works.random_rows(work, vocabulary=100, seq_len_tokens=512, rows_per_step=4)


def test_full_rows_are_full_and_all_supervised() -> None:
    rows = draw()
    assert len(rows) == 24
    assert {len(row["input_ids"]) for row in rows} == {512}
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert all(0 <= token < 100 for row in rows for token in row["input_ids"])


def test_padding_is_not_drawn() -> None:
    for lengths in ("full", "real"):
        rows = works.random_rows(
            Work(steps=50, lengths=lengths), vocabulary=50, seq_len_tokens=512, rows_per_step=4,
            padding=1,
        )  # fmt: skip
        drawn = {token for row in rows for token in row["input_ids"]}
        assert drawn == set(range(50)) - {1}


def test_the_seed_decides() -> None:
    assert draw() == draw()
    assert draw() != draw(seed=1)


def test_tokens_follow_zipfs_law() -> None:
    tokens = np.concatenate([row["input_ids"] for row in draw()])
    share = np.bincount(tokens, minlength=100) / len(tokens)
    weights = 1 / (np.arange(100) + 3)
    assert np.abs(share - weights / weights.sum()).max() < 0.01


def test_real_lengths_have_the_stated_distribution() -> None:
    rows = works.random_rows(
        Work(steps=200, lengths="real"), vocabulary=50, seq_len_tokens=4096, rows_per_step=4
    )
    lengths = np.array([len(row["input_ids"]) for row in rows])
    assert lengths.sum() >= 200 * 4 * 4096
    assert lengths.sum() < 200 * 4 * 4096 + 4096
    assert np.median(lengths) == pytest.approx(np.exp(works.LOG_MEAN), rel=0.05)
    assert np.log(lengths).std() == pytest.approx(works.LOG_DEVIATION, rel=0.05)
    prompts = np.array([row["labels"].count(IGNORED) for row in rows]) / lengths
    assert prompts.min() > 0.1
    assert prompts.max() < 0.7
    assert lengths.min() >= works.SHORTEST


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    works.save(draw(lengths="real"), tmp_path / "rows.json")
    assert works.load(tmp_path / "rows.json") == draw(lengths="real")


def test_steps_hold_every_row_once() -> None:
    rows = draw()[:23]
    steps = works.steps(rows, micro_batch=2, accumulation=4)
    assert [[len(batch) for batch in step] for step in steps] == [[2] * 4, [2] * 4, [2, 2, 2, 1]]
    assert [row for step in steps for batch in step for row in batch] == rows


def test_the_digest_sees_what_padding_and_packing_feed_as_the_same() -> None:
    rows = draw(lengths="real")
    collate = Collator(0, PlainEngine())  # type: ignore[arg-type]
    found = {}
    for name, fed in (("padded", rows), ("packed", works.pack(rows, 512))):
        digest = works.Digest()
        for place in range(0, len(fed), 2):
            digest.add(collate(fed[place : place + 2]))
        found[name] = digest
    padded, packed = found["padded"], found["packed"]
    assert padded.value() == packed.value()
    assert padded.tokens == packed.tokens == sum(len(row["input_ids"]) for row in rows)
    assert padded.squared_lengths == packed.squared_lengths
    assert packed.fed == packed.tokens < padded.fed
    assert padded.ordered() != packed.ordered()


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_expected_is_what_feeding_gives(packed: bool) -> None:
    rows = draw(lengths="real")
    rows = works.pack(rows, 512) if packed else rows
    collate = Collator(0, PlainEngine())  # type: ignore[arg-type]
    digest = works.Digest()
    for place in range(0, len(rows), 2):
        digest.add(collate(rows[place : place + 2]))
    assert works.expected(rows) == (digest.value(), digest.ordered())
    assert works.expected(rows[::-1]) != (digest.value(), digest.ordered())


def test_the_digest_sees_one_changed_token_or_label() -> None:
    rows = draw()[:2]
    collate = Collator(0, PlainEngine())  # type: ignore[arg-type]

    def value(changed: list[works.Row]) -> str:
        digest = works.Digest()
        digest.add(collate(changed))
        return digest.value()

    other = [dict(row) for row in rows]
    other[1]["labels"] = [*rows[1]["labels"][:-1], IGNORED]
    assert value(rows) != value(other)
    other[1] = {**rows[1], "input_ids": [*rows[1]["input_ids"][:-1], 1 + rows[1]["input_ids"][-1]]}
    assert value(rows) != value(other)
