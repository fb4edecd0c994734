"""Static shapes: the lengths with the least padding, and micro-batches padded to them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fastlora.data.pack import pack_rows
from fastlora.engines.peft import PeftEngine
from fastlora.train.collate import Collator
from fastlora.train.shapes import (
    Shapes,
    choose_lengths,
    choose_shapes,
    cut,
    pad,
    row_sizes,
    some_labels,
)


def cost(histogram: dict[int, int], lengths: tuple[int, ...]) -> int:
    return sum(
        times * min(length for length in lengths if length >= width)
        for width, times in histogram.items()
    )


@given(
    st.dictionaries(st.integers(1, 60), st.integers(0, 9), min_size=1, max_size=7),
    st.integers(1, 4),
    st.sampled_from([1, 4, 8]),
)
def test_no_choice_of_lengths_pads_less(
    histogram: dict[int, int], most: int, multiple: int
) -> None:
    longest = max(histogram)
    found = choose_lengths(histogram, most, multiple, longest)
    assert found == sorted(set(found))
    assert len(found) <= most
    assert found[-1] == longest
    assert all(length % multiple == 0 for length in found[:-1])
    allowed = [*range(multiple, longest, multiple), longest]
    best = min(
        cost(histogram, (*some, longest))
        for count in range(most)
        for some in combinations(allowed[:-1], min(count, len(allowed) - 1))
    )
    assert cost(histogram, tuple(found)) == best


def dataset(lengths: list[int], *, pack: int | None = None) -> Dataset:
    """Rows whose second half has labels."""
    ids = [[1 + (place + at) % 90 for at in range(n)] for place, n in enumerate(lengths)]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    columns: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if pack is not None:
        packs = pack_rows(ids, labels, pack)
        columns = {name: [one[name] for one in packs] for name in packs[0]}
    return Dataset.from_dict(columns)


def test_sizes_of_rows() -> None:
    rows = dataset([1, 2, 7, 8]).select([3, 0, 2, 1])
    tokens, labels = row_sizes(rows)
    assert tokens.tolist() == [8, 1, 7, 2]
    assert labels.tolist() == [4, 0, 4, 1]  # the first of a row is never predicted


@pytest.mark.parametrize("packed", [False, True])
def test_the_shapes_of_a_data_set(packed: bool) -> None:
    lengths = [10 + 7 * n % 230 for n in range(300)]
    rows = dataset(lengths, pack=256 if packed else None)
    shapes = choose_shapes(rows, 3, 256)
    assert shapes == choose_shapes(rows, 3, 256)
    assert 1 <= len(shapes.lengths) <= 8
    # Always held: the longest row, and every micro-batch of another order, whatever comes together.
    tokens, labels = row_sizes(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7))
    grid = order[: len(rows) // 3 * 3].reshape(-1, 3).numpy()
    width = tokens[grid].sum(1) if packed else tokens[grid].max(1)
    assert packed or shapes.lengths[-1] >= tokens.max()
    assert shapes.lengths[-1] <= 256 * (3 if packed else 1)
    fits = [shapes.fit(int(each)) for each in width]
    assert all(length >= each for (length, _), each in zip(fits, width, strict=True))
    provided = [n <= most for (_, most), n in zip(fits, labels[grid].sum(1), strict=True)]
    assert sum(provided) > 0.9 * len(provided)
    added = 1 - width.sum() / sum(length for length, _ in fits)
    if packed:
        there = torch.tensor([len(row) for row in rows["seq_lengths"]])[torch.from_numpy(grid)]
        # As many rows as nearly all have, and those of the padding; no more, since each costs a little.
        assert (there.sum(1) + 3 <= shapes.rows).float().mean() > 0.9
        assert shapes.rows < there.sum(1).max() + 3 + 8
        assert shapes.rows % 8 == 0
    else:
        assert shapes.rows == 0
    assert added == pytest.approx(shapes.padding, abs=0.03)
    assert 0 < shapes.padding < 0.1


def test_fewer_rows_than_a_micro_batch() -> None:
    shapes = choose_shapes(dataset([9, 30]), 8, 30)
    assert shapes.lengths == (30,)
    assert shapes.labels == (24,)
    assert str(shapes) == "one length, 0.0% padding"


def test_what_is_longer_than_all_is_its_own_length() -> None:
    shapes = Shapes((8, 16), (5, 9))
    assert [shapes.fit(n) for n in (1, 8, 9, 16)] == [(8, 5), (8, 5), (16, 9), (16, 9)]
    assert shapes.fit(17)[0] == 17


def test_padding_is_what_the_collator_pads_with() -> None:
    rows = dataset([3, 7, 12])
    short, long = (
        Collator(5, PeftEngine())(rows.select(some).to_list()) for some in ((0, 1), (0, 1, 2))
    )
    padded = pad(short, 12, 5)
    assert padded.keys() == long.keys()
    for name, tensor in padded.items():
        assert torch.equal(tensor, long[name][:2]), name
    assert pad(short, 7, 5)["labels"] is short["labels"]


def test_rows_that_are_missing_are_padding() -> None:
    (batch,) = [Collator(5, PeftEngine())(dataset([3, 7]).to_list())]
    padded = pad(batch, 8, 5, rows=4)
    assert all(tensor.shape == (4, 8) for tensor in padded.values())
    assert torch.equal(padded["input_ids"][:2, :7], batch["input_ids"])
    assert (padded["input_ids"][2:] == 5).all()
    assert (padded["labels"][2:] == -100).all()
    assert padded["attention_mask"].sum(dim=1).tolist() == [3, 7, 8, 8]
    assert pad(batch, 7, 5, rows=1)["labels"] is batch["labels"]


def test_labels_in_turns_are_each_once() -> None:
    labels = torch.tensor([[9, -100, 1, 2], [8, 3, -100, 4]])
    turns = [some_labels(labels, first, 3) for first in (0, 3)]
    assert turns[0].tolist() == [[-100, -100, 1, 2], [-100, 3, -100, -100]]
    assert turns[1].tolist() == [[-100] * 4, [-100, -100, -100, 4]]


def test_stand_ins_have_the_length_that_is_asked_for() -> None:
    rows = list(dataset([12, 7]).with_format("torch"))
    short = cut(rows, 9)
    assert [len(row["input_ids"]) for row in short] == [9, 7]
    assert [(row["labels"] != -100).nonzero().flatten().tolist() for row in short] == [[8], [6]]
    packed = list(dataset([3, 7, 12], pack=12).with_format("torch"))
    assert [row["seq_lengths"].tolist() for row in packed] == [[7, 3], [12]]
    for tokens, wanted in ((2, [[2]]), (9, [[7, 2]]), (10, [[7, 3]]), (15, [[7, 3], [5]])):
        found = cut(packed, tokens)
        assert [row["seq_lengths"].tolist() for row in found] == wanted
        assert sum(len(row["input_ids"]) for row in found) == tokens


def test_padding_of_packed_rows_is_a_row_of_its_own() -> None:
    rows = dataset([3, 7, 12], pack=12).to_list()
    batch = Collator(5, PeftEngine())(rows)
    padded = pad(batch, 32, 5)
    assert all(tensor.shape == (1, 32) for tensor in padded.values())
    assert all(torch.equal(padded[name][:, :22], batch[name]) for name in batch)
    assert padded["position_ids"][0, 22:].tolist() == list(range(10))
    assert padded["labels"][0, 22:].tolist() == [-100] * 10
    assert padded["input_ids"][0, 22:].tolist() == [5] * 10
