"""The scores of answers, against values worked out by hand."""

from __future__ import annotations

import pytest

from fastlora.export.score import score
from fastlora.rundir.sections import shown_score


def test_exact_match_is_of_rows_with_an_expected_answer() -> None:
    answers = ["4", " 4\n", "5", "anything"]
    assert score(["exact_match"], answers, ["4", "4", "4", None]) == {"exact_match": 2 / 3}


@pytest.mark.parametrize(
    ("answer", "valid"),
    [('{"a": [1]}', True), (" [] \n", True), ("3", True), ("'a'", False), ("NaN", False), ("", False),
     ('{"a": 1} so', False), ("[" * 100_000, False)],
)  # fmt: skip
def test_json_valid(answer: str, valid: bool) -> None:
    assert score(["json_valid"], [answer], [None]) == {"json_valid": float(valid)}


def test_rouge_l_in_any_script() -> None:
    # The cat sat / the cat: the longest common subsequence has 2 words, recall 2/2, precision 2/3, F 0.8.
    assert score(["rouge_l"], ["The cat sat!"], ["the cat"])["rouge_l"] == pytest.approx(0.8)
    # Two rows, of which one shares nothing; the Greek one is the same but for its case.
    found = score(["rouge_l"], ["ΚΑΛΗΜΕΡΑ κόσμε", "no"], ["καλημερα κόσμε", "yes"])
    assert found["rouge_l"] == pytest.approx(0.5)


def test_chrf() -> None:
    # abc against abd. 1-grams: 2 of 3 match, 2-grams: 1 of 2, 3-grams: 0 of 1, longer ones there are none of;
    # precision and recall are alike, so F is their mean: (2/3 + 1/2 + 0) / 3.
    assert score(["chrf"], ["abc"], ["abd"])["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)


def test_what_cannot_be_taken_is_left_out() -> None:
    assert score(["exact_match", "chrf", "rouge_l", "json_valid"], ["{}"], [None]) == {
        "json_valid": 1.0
    }
    assert score(["exact_match", "json_valid"], [], []) == {}


def test_how_they_are_shown() -> None:
    assert (shown_score("chrf", 38.888), shown_score("rouge_l", 0.5)) == ("38.9", "50.0%")
