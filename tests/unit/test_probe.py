"""Which rows are the longest, and that a run teaches the next prediction once."""

from __future__ import annotations

import random

import pytest
from datasets import Dataset, concatenate_datasets

from fastlora.train.probe import longest


def rows(labelled: list[list[bool]]) -> Dataset:
    labels = [[7 if one else -100 for one in row] for row in labelled]
    return Dataset.from_dict({"input_ids": [[7] * len(row) for row in labels], "labels": labels})


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_rows_and_of_equally_long_ones_those_with_more_labels(seed: int) -> None:
    draw = random.Random(seed)
    labelled = [[draw.random() < 0.5 for _ in range(draw.choice([3, 8, 9, 20]))] for _ in range(40)]
    half = len(labelled) // 2
    parts = [rows(labelled[:half]), rows(labelled[half:])]  # Arrow has them in two chunks
    made = concatenate_datasets(parts)
    # The first of a row is never predicted.
    sizes = sorted(((len(row), sum(row[1:])) for row in labelled), reverse=True)
    for count in (1, 2, 13, 40):
        places = longest(made, count)
        assert len(set(places)) == count
        taken = [(len(labelled[at]), sum(labelled[at][1:])) for at in places]
        assert taken == sizes[:count]
    # As trained on: taken from others, in another order.
    order = draw.sample(range(40), 30)
    (place,) = longest(made.select(order), 1)
    assert len(labelled[order[place]]) == max(len(labelled[at]) for at in order)
