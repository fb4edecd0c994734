"""How good answers are, by the measures that eval.metrics names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

PACKAGES = {"chrf": ("sacrebleu", "sacrebleu"), "rouge_l": ("rouge_score", "rouge-score")}
"""metric -> (module, package) that it needs: `pip install 'fastlora[metrics]'`."""


def score(
    metrics: Sequence[str], answers: Sequence[str], expected: Sequence[str | None]
) -> dict[str, float]:
    """Each metric over the rows that it can be taken of; left out where there is none.

    exact_match   share of answers equal to the expected one, space around them aside
    json_valid    share of answers, those without an expected one too, that are one JSON value
    chrf          sacreBLEU's chrF2 of all answers together, 0 to 100
    rouge_l       mean F-measure of rouge-score's ROUGE-L, 0 to 1, over words of any script in lower case
    """
    pairs = [
        (answer, wanted)
        for answer, wanted in zip(answers, expected, strict=True)
        if wanted is not None
    ]
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "json_valid" and answers:
            found[metric] = sum(map(_is_json, answers)) / len(answers)
        elif metric != "json_valid" and pairs:
            found[metric] = _AGAINST_EXPECTED[metric](pairs)
    return found


Pairs = Sequence[tuple[str, str]]


def _exact_match(pairs: Pairs) -> float:
    return sum(answer.strip() == wanted.strip() for answer, wanted in pairs) / len(pairs)


def _is_json(answer: str) -> bool:
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON's")


def _chrf(pairs: Pairs) -> float:
    from sacrebleu.metrics import CHRF

    answers, wanted = zip(*pairs, strict=True)
    return float(CHRF().corpus_score(list(answers), [list(wanted)]).score)


class _Words:
    """rouge-score's own tokenizer knows a to z alone: any Greek answer would be as good as none."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _rouge_l(pairs: Pairs) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    scores = [scorer.score(wanted, answer)["rougeL"].fmeasure for answer, wanted in pairs]
    return float(sum(scores) / len(scores))


_AGAINST_EXPECTED: dict[str, Callable[[Pairs], float]] = {
    "exact_match": _exact_match,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
}
