from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.data.pack import best_fit_decreasing


def test_by_hand() -> None:
    # 7 opens a group, 6 another; 3 fits the first exactly, 4 the second exactly; 2 opens a third.
    assert best_fit_decreasing([3, 7, 4, 6, 2], 10) == [[1, 0], [3, 2], [4]]


@given(st.lists(st.integers(1, 64), max_size=80))
def test_every_row_once_and_no_group_too_full(lengths: list[int]) -> None:
    groups = best_fit_decreasing(lengths, 64)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in group) <= 64 for group in groups)
    # No two groups would have fitted into one.
    fullness = sorted(sum(lengths[row] for row in group) for group in groups)
    assert len(fullness) < 2 or fullness[0] + fullness[1] > 64


def test_too_long_a_row() -> None:
    with pytest.raises(ValueError, match="row 1 has 11 tokens"):
        best_fit_decreasing([1, 11], 10)
