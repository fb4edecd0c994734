"""Which rows are the longest, and that a run teaches the next prediction once."""

from __future__ import annotations

import random

import pytest
from datasets import Dataset, concatenate_datasets

from fastlora.train.probe import longest, most_labelled


def rows(labelled: list[list[bool]]) -> Dataset:
    labels = [[7 if one else -100 for one in row] for row in labelled]
    return Dataset.from_dict({"input_ids": [[7] * len(row) for row in labels], "labels": labels})


def in_two_chunks(labelled: list[list[bool]]) -> Dataset:
    """As Arrow may have them."""
    half = len(labelled) // 2
    return concatenate_datasets([rows(labelled[:half]), rows(labelled[half:])])


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_rows_and_of_equally_long_ones_those_with_more_labels(seed: int) -> None:
    draw = random.Random(seed)
    labelled = [[draw.random() < 0.5 for _ in range(draw.choice([3, 8, 9, 20]))] for _ in range(40)]
    made = in_two_chunks(labelled)
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


@pytest.mark.parametrize("seed", range(20))
def test_rows_with_the_most_tokens_and_labels(seed: int) -> None:
    draw = random.Random(seed)
    labelled = []
    for _ in range(40):
        share = draw.random()
        labelled.append([draw.random() < share for _ in range(draw.choice([12, 20, 21, 24]))])
    made = in_two_chunks(labelled)
    labels = [sum(row[1:]) for row in labelled]
    both = sorted((len(row) + more for row, more in zip(labelled, labels, strict=True)))
    for count in (1, 3, 40):
        places, those = most_labelled(made, count), longest(made, count)
        more = sum(labels[at] for at in places) - sum(labels[at] for at in those)
        if places:
            assert more > 0
            assert len(set(places)) == count
            assert sorted(len(labelled[at]) + labels[at] for at in places) == both[-count:]
        else:
            assert sorted(len(labelled[at]) + labels[at] for at in those) == both[-count:]


def test_rows_with_more_labels_than_the_longest_are_found() -> None:
    few, many, short = [False] * 19 + [True], [True] * 18, [True] * 9
    assert most_labelled(rows([short, few, many]), 1) == [2]
    assert most_labelled(rows([few, short]), 1) == []
