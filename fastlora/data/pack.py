"""Packing: several rows in one sequence, so that no step is spent on padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from fastlora.data.mask import IGNORED


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group row indices so that each group's summed length stays within `capacity`.

    Longest first, each into the fullest group that still holds it (best-fit decreasing, at most
    11/9 of the optimum plus one: Johnson 1974). `lengths` in tokens, each <= capacity. Deterministic:
    equal lengths keep their order. Groups come back in the order of their first row.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if lengths[row] > capacity:
            raise ValueError(
                f"row {row} has {lengths[row]} tokens, more than the capacity of {capacity}"
            )
        fit = bisect.bisect_left(room, (lengths[row], -1))
        if fit == len(room):
            left, group = capacity, len(groups)
            groups.append([])
        else:
            left, group = room.pop(fit)
        groups[group].append(row)
        bisect.insort(room, (left - lengths[row], group))
    return sorted(groups, key=min)


def pack_rows(
    input_ids: Sequence[list[int]], labels: Sequence[list[int]], capacity: int
) -> list[dict[str, list[int]]]:
    """Rows put together to `capacity` tokens at most: input_ids, labels and seq_lengths of each pack.

    Across a boundary a row's first token would be predicted from another row: it is not supervised.
    """
    packs = []
    for group in best_fit_decreasing([len(ids) for ids in input_ids], capacity):
        packs.append(
            {
                "input_ids": [token for row in group for token in input_ids[row]],
                "labels": [label for row in group for label in (IGNORED, *labels[row][1:])],
                "seq_lengths": [len(input_ids[row]) for row in group],
            }
        )
    return packs
