"""The report on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastlora.check.check import Report
from fastlora.check.findings import Finding, counted, shortened
from fastlora.check.rows import Rows
from fastlora.check.tokens import TokenStats

_SHOWN_ROWS = 8
_STYLES = {"error": "bold red", "warning": "yellow"}


def show(report: Report, console: Console) -> None:
    rows = report.rows
    names = ", ".join(source.name for source in rows.sources)
    held_out = f", {len(rows.held_out):,} of them held out" if rows.held_out else ""
    _say(console, f"{names}: {len(rows.all):,} rows{held_out}, {len(report.refused):,} with errors")
    for finding in report.findings:
        _show_finding(finding, rows, console)
    if not report.findings:
        _say(console, "\nnothing found", style="green")
    answers = report.answers
    if answers.count:
        low, middle, high = answers.chars_p5_p50_p95
        told = ", ".join(f"{name} {share:.0%}" for name, share in (answers.languages or {}).items())
        _say(
            console,
            f"\nanswers: {middle:,} characters in the middle ({low:,} to {high:,} for 9 of 10), "
            f"{answers.json_share:.1%} JSON{'; ' + told if told else ''}",
        )
    if report.tokens:
        _show_lengths(report.tokens, console)
    for why in report.run_refuses:
        _say(console, f"a run would refuse these data: {why}", "bold red")
    for gate in report.gates:
        style = "green" if gate.met else "bold red"
        _say(console, f"gate {'met' if gate.met else 'not met'}: {gate.key}: {gate.says}", style)


def _show_finding(finding: Finding, rows: Rows, console: Console) -> None:
    kind = finding.kind
    head = Text(f"\n{kind.severity:<8}", style=_STYLES[kind.severity])
    head.append(finding.code, style="bold")
    if finding.rows:
        share = len(finding.rows) / len(rows.all)
        head.append(f"  {counted(len(finding.rows), 'row')} ({share:.1%})", style="default")
    head.append(f"  {kind.says}", style="default")
    console.print(head, soft_wrap=True)
    if finding.general:
        _say(console, f"        {finding.general}")
    for line in _places(finding, rows):
        _say(console, f"        {line}")
    if finding.example:
        _say(console, f"        e.g. {finding.example}", "dim")


def _places(finding: Finding, rows: Rows) -> Iterator[str]:
    """Rows that share a source and a detail on one line."""
    places = sorted(finding.rows)
    groups: dict[tuple[str, str], list[str]] = {}
    for place in places[:_SHOWN_ROWS]:
        key = (rows.unit(place), finding.rows[place])
        groups.setdefault(key, []).append(str(rows.all[place].number))
    for (where, detail), numbers in groups.items():
        yield f"{where} {', '.join(numbers)}" + (f": {shortened(detail)}" if detail else "")
    if len(places) > _SHOWN_ROWS:
        yield f"and {len(places) - _SHOWN_ROWS:,} more (--json names all)"


def _show_lengths(tokens: TokenStats, console: Console) -> None:
    chosen = tokens.lengths[0]
    _say(
        console,
        f"tokens: {tokens.tokens:,}, {tokens.answer_tokens:,} of answers; the longest row has "
        f"{tokens.longest_row_tokens:,}",
    )
    if not chosen.rows_cut:
        _say(console, f"no row is cut at model.seq_len_tokens = {chosen.seq_len_tokens:,}")
        return
    table = Table(box=None, pad_edge=False)
    for column in (
        "seq_len_tokens",
        "rows cut",
        "without an answer",
        "tokens lost",
        "answer tokens lost",
        "recovered",
        "GPU GiB",
    ):
        table.add_column(column, justify="right", no_wrap=column == "seq_len_tokens")
    for one in tokens.lengths:
        recovered = chosen.answer_tokens_lost - one.answer_tokens_lost
        lost_share = one.answer_tokens_lost / max(1, tokens.answer_tokens)
        table.add_row(
            f"{one.seq_len_tokens:,}",
            f"{one.rows_cut:,}",
            f"{one.rows_without_answer:,}",
            f"{one.tokens_lost:,}",
            f"{one.answer_tokens_lost:,} ({lost_share:.1%})",
            f"{recovered / max(1, chosen.answer_tokens_lost):.0%}" if one is not chosen else "",
            "" if one.peak_gib is None else f"{one.peak_gib:.1f}",
        )
        if not one.rows_cut:
            break
    console.print(table)


def _say(console: Console, line: str, style: str = "") -> None:
    # As it stands: what rows and paths hold is no markup.
    console.print(Text(line, style=style), soft_wrap=True)
