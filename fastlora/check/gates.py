"""What the recipe's [check] asks of the findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastlora.check.findings import Finding
from fastlora.check.tokens import TokenStats
from fastlora.recipe.findings import KINDS, selected
from fastlora.recipe.schema import CheckSection


@dataclass(frozen=True, slots=True)
class Gate:
    key: str
    met: bool
    says: str


def judge(
    check: CheckSection, findings: Sequence[Finding], tokens: TokenStats | None, rows: int
) -> list[Gate]:
    """A gate on what could not be measured, for want of a tokenizer or template, is not met."""
    return list(_gates(check, {one.code: one for one in findings}, tokens, rows))


def _gates(
    check: CheckSection, found: dict[str, Finding], tokens: TokenStats | None, rows: int
) -> Iterator[Gate]:
    for name in check.require_no:
        key = f'check.require_no = ["{name}"]'
        there = {code: found[code] for code in selected(name) if code in found}
        if there:
            counts = (
                one.general or f"{code} in {len(one.rows):,} rows" for code, one in there.items()
            )
            yield Gate(key, False, ", ".join(counts))
        else:
            yield _unless_unmeasured(Gate(key, True, "none found"), name, tokens)
    for name, most in check.max_share.items():
        places = {place for code in selected(name) if code in found for place in found[code].rows}
        share = len(places) / max(1, rows)
        says = f"{len(places):,} of {rows:,} rows ({share:.2%})"
        gate = Gate(f"check.max_share.{name} = {most:g}", share <= most, says)
        yield _unless_unmeasured(gate, name, tokens) if gate.met else gate
    if (most_lost := check.max_lost_answer_tokens_share) is not None:
        key = f"check.max_lost_answer_tokens_share = {most_lost:g}"
        if tokens is None:
            yield Gate(key, False, "not measured: no usable tokenizer")
        else:
            yield Gate(
                key, tokens.lost_answer_share <= most_lost, f"{tokens.lost_answer_share:.2%}"
            )


def _unless_unmeasured(gate: Gate, name: str, tokens: TokenStats | None) -> Gate:
    if tokens is None and any(KINDS[code].needs_tokenizer for code in selected(name)):
        return Gate(gate.key, False, "not measured: no usable tokenizer")
    return gate
