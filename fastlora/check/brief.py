"""The check that comes before every training: a few lines, in a bounded time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastlora.check.check import Report, check_data
from fastlora.check.findings import counted
from fastlora.check.tokens import TokenStats
from fastlora.errors import GateError
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_FINDINGS = 5


def check_before_run(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, announce: Callable[[str], None]
) -> dict[str, Any]:
    """What was found, for the manifest, without words of the rows. Looks closely at a sample; where the recipe sets
    gates at all rows, since a gate that is met in a sample is not met.

    Raises DataError as check_data does; GateError: a gate is not met.
    """
    report = check_data(recipe, tokenizer, sample=not recipe.check.has_gates)
    for line in _lines(report):
        announce(line)
    if not report.passed:
        missed = [f"{gate.key}: {gate.says}" for gate in report.gates if not gate.met]
        raise GateError(
            "\n".join(["the data do not meet the recipe's [check]:", *missed])
            + "\n`fastlora check` names the rows; with --write-clean it writes the data without those with an error"
        )
    return report.document(examples=False)


def _lines(report: Report) -> list[str]:
    """For a run: one for what was looked at, one each for the worst, one for what is cut."""
    rows = report.rows
    looked = (
        counted(len(rows.all), "row")
        if report.looked_at >= len(rows.good)
        else f"{len(rows.all):,} rows for exact repeats and leaks, a sample of {report.looked_at:,} for the rest"
    )
    way_out = (
        "; `fastlora check` names them, --write-clean leaves them out" if report.refused else ""
    )
    lines = [f"check: {looked}: {len(report.refused):,} with errors{way_out}"]
    # What keeps the run from beginning at all it says itself; what is cut has a line of its own.
    told = [one for one in report.findings if not one.general and one.code != "truncated_answer"]
    for finding in told[:_SHOWN_FINDINGS]:
        first = f", first {rows.where(min(finding.rows))}"
        lines.append(
            f"check: {finding.code}: {counted(len(finding.rows), 'row')}: {finding.kind.says}{first}"
        )
    if len(told) > _SHOWN_FINDINGS:
        lines.append(
            f"check: and {len(told) - _SHOWN_FINDINGS} more kinds of finding; `fastlora check` lists them"
        )
    if report.tokens and report.tokens.lengths[0].rows_cut:
        lines.append(f"check: {_cut(report.tokens)}")
    lines += [f"check: gate met: {gate.key}: {gate.says}" for gate in report.gates if gate.met]
    return lines


def _cut(stats: TokenStats) -> str:
    chosen, longer = stats.lengths[0], stats.lengths[1:]
    # The shortest that saves nearly all that any does.
    worth = next(
        (one for one in longer if 10 * one.answer_tokens_lost <= chosen.answer_tokens_lost), None
    )
    saved = ""
    if worth and chosen.answer_tokens_lost:
        share = 1 - worth.answer_tokens_lost / chosen.answer_tokens_lost
        saved = f"; model.seq_len_tokens = {worth.seq_len_tokens} saves {share:.0%} of them"
    return (
        f"{counted(chosen.rows_cut, 'row')} cut at {chosen.seq_len_tokens:,} tokens: {chosen.answer_tokens_lost:,} "
        f"answer tokens lost ({stats.lost_answer_share:.1%}){saved}"
    )
