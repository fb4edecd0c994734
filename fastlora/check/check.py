"""The whole check of a recipe's data, and its brief form."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastlora.check.drift import AnswerStats, find_drift
from fastlora.check.duplicates import find_duplicates
from fastlora.check.findings import Finding, Findings, as_document, counted
from fastlora.check.gates import Gate, judge
from fastlora.check.rows import HalfCharacter, Row, Rows, example_of, hold_out, read_rows
from fastlora.check.text import text_findings
from fastlora.check.tokens import TokenStats, check_tokens, special_tokens
from fastlora.check.turns import order_fault
from fastlora.data.format import BadRow, Chat, EmptyText, UnknownRole
from fastlora.data.load import NOT_UTF8
from fastlora.recipe.schema import CheckSection, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_ROWS = 2000


@dataclass(frozen=True, slots=True)
class Report:
    rows: Rows
    looked_at: int
    """Rows looked at closely: all, or a sample of them."""
    findings: list[Finding]
    """The most serious first."""
    answers: AnswerStats
    tokens: TokenStats | None
    gates: list[Gate]
    refused: dict[int, list[str]]
    """Rows with an error, by place -> why."""
    run_refuses: list[str]
    """Why a run would not begin with these data; nothing where it would, whatever the rows teach."""

    @property
    def passed(self) -> bool:
        return all(gate.met for gate in self.gates)

    def document(self, examples: bool = True) -> dict[str, Any]:
        """As JSON. Without `examples`, which quote the rows, each finding names its first ten rows only."""
        findings = [as_document(one, self.rows) for one in self.findings]
        if not examples:
            for finding, one in zip(self.findings, findings, strict=True):
                del one["example"]
                one["detail"] = finding.general
                one["rows"] = [
                    {key: value for key, value in row.items() if key != "detail"}
                    for row in one["rows"][:10]
                ]
        held_out = len(self.rows.held_out)
        return {
            "sources": [
                {
                    "name": source.name,
                    "format": source.format,
                    "split": "eval" if source.eval else "train",
                }
                for source in self.rows.sources
            ],
            "rows": {
                "all": len(self.rows.all),
                "train": len(self.rows.good) - held_out,
                "eval": held_out,
                "with_errors": len(self.refused),
                "looked_at_closely": self.looked_at,
            },
            "findings": findings,
            "answers": asdict(self.answers),
            "tokens": asdict(self.tokens) if self.tokens else None,
            "gates": [asdict(gate) for gate in self.gates],
            "run_refuses": self.run_refuses,
            "passed": self.passed,
        }


def check_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    sample: bool = False,
    no_tokenizer: str = "",
) -> Report:
    """`no_tokenizer` says why there is none: what needs no tokenizer is checked all the same.

    With `sample` and more rows than SAMPLE_ROWS, exact duplicates, leaks and unreadable rows are looked for
    everywhere, all else in a sample.

    Raises DataError: a source that is missing, unreadable as a whole, or of no known format.
    """
    rows, findings = read_rows(recipe), Findings()
    for place, row in enumerate(rows.all):
        if row.problem is not None:
            findings.add(
                _kind_of(row.problem), place, str(row.problem), row.excerpt or repr(row.value)
            )
    looked_at = rows.good
    if sample and len(rows.good) > SAMPLE_ROWS:
        looked_at = sorted(random.Random(recipe.train.seed).sample(rows.good, SAMPLE_ROWS))
    own_tokens = special_tokens(tokenizer)
    for place in looked_at:
        _look_at_words(recipe, rows, place, own_tokens, findings)
    tokens = None
    if tokenizer is None:
        findings.add_general("tokenizer_missing", no_tokenizer)
    else:
        tokens = check_tokens(recipe, tokenizer, rows, looked_at, findings)
        good = set(rows.good)
        looked_at = [place for place in looked_at if place in good]
    if refused := hold_out(rows, recipe):
        findings.add_general("mix_refused", refused)
    find_duplicates(rows, looked_at, recipe.check.near_similarity, findings)
    answers = find_drift(rows, looked_at, findings)
    found = findings.sorted()
    gates = judge(recipe.check, found, tokens, len(rows.all))
    refuses = list(_run_refuses(recipe, rows, found))
    return Report(rows, len(looked_at), found, answers, tokens, gates, findings.refused(), refuses)


def _run_refuses(recipe: Recipe, rows: Rows, found: Sequence[Finding]) -> Iterator[str]:
    for finding in found:
        if finding.general and finding.kind.severity == "error":
            yield finding.code
    bad = sum(row.problem is not None for row in rows.all)
    if bad and recipe.data.on_bad_row == "error":
        yield (
            f"{counted(bad, 'row')} that cannot be trained on: mend them, or leave them out with --write-clean or "
            'data.on_bad_row = "skip"'
        )


def _kind_of(problem: BadRow) -> str:
    if isinstance(problem, EmptyText):
        return "empty_turn"
    if isinstance(problem, UnknownRole):
        return "role_unknown"
    if isinstance(problem, HalfCharacter) or str(problem).startswith(NOT_UTF8):
        return "unreadable_bytes"
    return "unreadable_row"


def _look_at_words(
    recipe: Recipe, rows: Rows, place: int, own_tokens: frozenset[str], findings: Findings
) -> None:
    row = rows.all[place]
    example = example_of(row, rows, templated=recipe.data.template != "none")
    assert not isinstance(example, BadRow)
    words = f"{row.prompt}\n\n{row.rest}" if row.prompt else row.rest
    for code, detail, shown in text_findings(words, example, own_tokens):
        findings.add(code, place, detail, shown)
    if isinstance(example, Chat) and (fault := order_fault(example)):
        findings.add("role_order", place, fault, words)
    for code, detail in _answer_limits(row, recipe.check):
        findings.add(code, place, detail, words)


def _answer_limits(row: Row, check: CheckSection) -> Sequence[tuple[str, str]]:
    lengths = [len(answer.strip()) for answer in row.answers]
    least, most = check.min_answer_chars, check.max_answer_chars
    # A turn of tool calls alone has no words.
    short = [length for length in lengths if 0 < length < least]
    long = [length for length in lengths if most is not None and length > most]
    return [
        *(("answer_short", f"{length:,} characters") for length in short[:1]),
        *(("answer_long", f"{length:,} characters") for length in long[:1]),
    ]
