"""Answers that are unlike nearly all others: in form, language or length."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from fastlora.check.findings import Findings
from fastlora.check.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from py3langid.langid import LanguageIdentifier

_FEW = 0.1
"""Up to this share of the answers is a drift; above it, the data hold two kinds."""
_MIN_ANSWERS = 20
_LANGUAGE_CHARS, _LANGUAGE_MIN_BYTES, _LANGUAGE_SURE = 120, 40, 0.99
_AS_JSON = re.compile(r"\s*(?:\{\s*[\"}]|\[\s*[\"{\[\]])")


@dataclass(slots=True)
class AnswerStats:
    """Of the first taught answer of each row looked at."""

    count: int = 0
    json_share: float = 0.0
    chars_p5_p50_p95: tuple[int, int, int] = (0, 0, 0)
    languages: dict[str, float] | None = None
    """Shares among those that were long and clear enough to tell; the commonest three."""


def find_drift(rows: Rows, places: Sequence[int], findings: Findings) -> AnswerStats:
    answered = [place for place in places if rows.all[place].answers]
    answers = [rows.all[place].answers[0].strip() for place in answered]
    stats = AnswerStats(len(answers))
    if not answers:
        return stats
    stats.json_share = _json(answered, answers, findings)
    lengths = np.array([len(answer) for answer in answers])
    low, middle, high = (int(one) for one in np.percentile(lengths, (5, 50, 95)))
    stats.chars_p5_p50_p95 = (low, middle, high)
    _lengths(answered, answers, lengths, findings)
    stats.languages = _languages(answered, answers, findings)
    return stats


def _json(places: Sequence[int], answers: Sequence[str], findings: Findings) -> float:
    """The share of answers that are JSON objects or lists."""
    is_json = []
    for place, answer in zip(places, answers, strict=True):
        parsed = False
        if answer.startswith(("{", "[")):
            try:
                json.loads(answer)
                parsed = True
            except (ValueError, RecursionError) as error:
                if _AS_JSON.match(answer):
                    findings.add("drift_broken_json", place, str(error).partition(";")[0], answer)
        is_json.append(parsed)
    share = sum(is_json) / len(answers)
    if len(answers) >= _MIN_ANSWERS and (share <= _FEW or share >= 1 - _FEW):
        for place, answer, parsed in zip(places, answers, is_json, strict=True):
            if parsed is not (share > 0.5):
                detail = "is JSON" if parsed else "is no JSON"
                findings.add(
                    "drift_json", place, f"{detail}; {share:.1%} of the answers are", answer
                )
    return share


def _lengths(
    places: Sequence[int], answers: Sequence[str], lengths: NDArray[np.int64], findings: Findings
) -> None:
    """Tukey's outer fences on the logarithm, and a factor of 8, so that data of nearly one length have some room."""
    if len(answers) < _MIN_ANSWERS:
        return
    logs = np.log(np.maximum(lengths, 1))
    low, middle, high = np.percentile(logs, (25, 50, 75))
    reach = max(3 * (high - low), 0.0)
    far = (logs < min(low - reach, middle - np.log(8))) | (
        logs > max(high + reach, middle + np.log(8))
    )
    for at in np.flatnonzero(far).tolist():
        detail = f"{lengths[at]:,} characters; the middle answer has {int(np.exp(middle)):,}"
        findings.add("drift_length", places[at], detail, answers[at])


def _languages(
    places: Sequence[int], answers: Sequence[str], findings: Findings
) -> dict[str, float]:
    told = {}
    for place, answer in zip(places, answers, strict=True):
        start = answer[:_LANGUAGE_CHARS]
        if len(start.encode("utf-8", "replace")) < _LANGUAGE_MIN_BYTES:
            continue
        language, sure = _identifier().classify(start)
        if sure >= _LANGUAGE_SURE:
            told[place] = (language, start)
    counts = Counter(language for language, _ in told.values())
    if not counts:
        return {}
    most, count = counts.most_common(1)[0]
    if len(told) >= _MIN_ANSWERS and count >= (1 - _FEW) * len(told):
        for place, (language, start) in told.items():
            if language != most:
                findings.add("drift_language", place, f"{language}; nearly all are {most}", start)
    return {language: number / len(told) for language, number in counts.most_common(3)}


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
