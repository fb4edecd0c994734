"""Packing: several rows in one sequence, so that no step is spent on padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


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
