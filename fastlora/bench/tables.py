"""The tables of a report as text, drawn alike on the console, in the page and in README.md."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastlora.bench.schema import Frontier, Report, Spread
from fastlora.bench.summary import (
    SPEED_LABELS,
    Row,
    headline,
    is_real,
    meet,
    ratio,
    rows,
    sound,
    withheld,
)

_FIGURE = re.compile(r"(~?-?\d[\d,.e+-]*[x%]?( \[.*\])?( supervised)?|nan)?")


class Table(NamedTuple):
    columns: list[str]
    rows: list[list[str]]

    @property
    def right(self) -> list[bool]:
        """Which columns hold nothing but figures, and go to the right."""
        return [
            all(_FIGURE.fullmatch(cells[i]) for cells in self.rows)
            for i in range(len(self.columns))
        ]

    @property
    def trimmed(self) -> Table:
        """Without empty columns: a CPU has no MFU, and most rows no detail."""
        kept = [i for i in range(len(self.columns)) if any(cells[i] for cells in self.rows)]
        return Table(
            [self.columns[i] for i in kept], [[cells[i] for i in kept] for cells in self.rows]
        )


def number(value: float | None) -> str:
    """Whole from 100 on, else three digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(value: float | None, within_noise: bool = False) -> str:
    """`1.05x`; `~1.05x` where the two intervals meet."""
    return "" if value is None else f"{'~' if within_noise else ''}{value:.2f}x"


def gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def spread(value: Spread | None) -> str:
    """`p50 [p20..p80]`."""
    if value is None:
        return ""
    return f"{number(value.p50)} [{number(value.p20)}..{number(value.p80)}]"


def arms_table(report: Report) -> Table:
    shown = rows(report)
    first = f"x {shown[0].arm.arm}" if shown else "x"
    columns = ["arm", "status", SPEED_LABELS[headline(report)], first]
    columns += ["tokens/s"] if is_real(report) else []
    columns += ["peak reserved GiB", first, "host GiB", "MFU", "HFU", "gates"]
    return Table(columns, [_arm_cells(row, is_real(report)) for row in shown])


def _arm_cells(row: Row, real: bool) -> list[str]:
    arm = row.arm
    cells = [arm.arm, arm.status, spread(row.speed)]
    cells += [times(row.speed_ratio, row.within_noise)]
    cells += [number(arm.tokens_per_s.p50 if arm.tokens_per_s else None)] if real else []
    cells += [gib(arm.peak_reserved_gib), times(row.memory_ratio), gib(arm.host_gib)]
    return [*cells, percent(arm.mfu), percent(arm.hfu), gates(row)]


def gates(row: Row) -> str:
    """`6 of 6`, or `red: parity`; nothing where no gate was reached."""
    total = len(row.arm.gates)
    return f"red: {row.gates}" if row.failed_gates else f"{total} of {total}" if total else ""


def ledger_table(report: Report) -> Table:
    """What each ingredient is worth: the arm that has it beside the arm that differs in it alone."""
    columns = ["ingredient", "arm", "beside", "tokens/s", "beside", "x"]
    columns += ["peak reserved GiB", "beside", "x"]
    speeds = {arm.arm: withheld(arm).tokens_per_s for arm in report.arms}
    cells = [
        [
            entry.ingredient,
            entry.arm,
            entry.base,
            number(entry.tokens_per_s),
            number(entry.base_tokens_per_s),
            times(
                ratio(entry.tokens_per_s, entry.base_tokens_per_s),
                meet(speeds.get(entry.arm), speeds.get(entry.base)),
            ),
            gib(entry.peak_reserved_gib),
            gib(entry.base_peak_reserved_gib),
            times(ratio(entry.peak_reserved_gib, entry.base_peak_reserved_gib)),
        ]
        for entry in report.ledger
    ]
    return Table(columns, cells)


def frontier_table(report: Report) -> Table:
    """The most that fits, per arm and axis. The speed of an arm that did not pass its gates, or never
    reached them, is withheld, as in the arms' table."""
    passed = {arm.arm for arm in report.arms if sound(arm)}
    columns = [
        "arm",
        "axis",
        "fits",
        "x first arm",
        "fails at",
        "tokens/s",
        "peak reserved GiB",
        "detail",
    ]
    cells = [
        [
            entry.arm,
            entry.axis,
            f"{entry.fits:,}" if was_found(entry) else "",
            times(ratio(entry.fits, _first(report, entry).fits)) if was_found(entry) else "",
            "" if entry.fails is None else f"{entry.fails:,}",
            number(entry.tokens_per_s) if entry.arm in passed else "",
            gib(entry.peak_reserved_gib),
            entry.detail if was_found(entry) else f"not found: {entry.detail}",
        ]
        for entry in report.frontier
    ]
    return Table(columns, cells)


def was_found(entry: Frontier) -> bool:
    """Whether the search came to an end. One that crashed or ran out of time has 0 as well, and says
    nothing about what fits; out of memory does: not even the model did."""
    return not (entry.fits == 0 and entry.detail and not entry.detail.startswith("oom"))


def _first(report: Report, entry: Frontier) -> Frontier:
    return next(other for other in report.frontier if other.axis == entry.axis)
