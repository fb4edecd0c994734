"""Geometric means and worst cases of rows, and the targets that they are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from opbench.cases import DORA, HEAD, LEFT_BY_UNSLOTH, LINEAR

Row = dict[str, Any]
COLUMNS = ("eager", "recorded")


def _p50(row: Row, arm: str, column: str) -> float | None:
    arms = row if column == "eager" else row.get("recorded", {})
    found: float | None = arms.get(arm, {}).get("p50")
    return found


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def speedup(row: Row, column: str) -> float | None:
    """PEFT's time over ours."""
    return _ratio(_p50(row, "peft", column), _p50(row, "ours", column))


def over_floor(row: Row, column: str) -> float | None:
    return _ratio(_p50(row, "ours", column), _p50(row, "floor", column))


def peak(row: Row, _: str) -> float | None:
    """Ours over PEFT's, launched one by one: a graph's memory is that of its largest call."""
    ours, peft = (row.get(arm, {}).get("peak_mib") for arm in ("ours", "peft"))
    return _ratio(ours, peft)


def figures(rows: Iterable[Row], of: Callable[[Row, str], float | None], column: str) -> dict[int, float]:  # fmt: skip
    """Place of a row -> its figure, where it has one."""
    found = {place: of(row, column) for place, row in enumerate(rows)}
    return {place: figure for place, figure in found.items() if figure is not None}


def mean(numbers: Iterable[float]) -> float:
    """Geometric."""
    logarithms = [math.log(number) for number in numbers]
    return math.exp(sum(logarithms) / len(logarithms))


def called(row: Row) -> str:
    words = (row["model"], row["op"], row["shape"], row["base"], f"T{row['tokens']} r{row['rank']}")
    return " ".join(filter(None, words))


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title="geometric mean (worst) of each group")
    for name in ("group", "base", "measured"):
        shown.add_column(name)
    for name in ("PEFT / ours", "recorded", "ours / floor", "recorded", "peak, ours / PEFT"):
        shown.add_column(name, justify="right")
    shown.add_column("slowest case over PEFT, recorded where it is")
    for group, base in dict.fromkeys((row["group"], row["base"]) for row in rows):
        of_group = [row for row in rows if (row["group"], row["base"]) == (group, base)]
        cells = [group, base, f"{sum('ours' in row for row in of_group)} of {len(of_group)}"]
        for of, columns, worst in (
            (speedup, COLUMNS, min), (over_floor, COLUMNS, max), (peak, COLUMNS[:1], max),
        ):  # fmt: skip
            for column in columns:
                found = figures(of_group, of, column).values()
                cells.append(f"{mean(found):.2f} ({worst(found):.2f})" if found else "")
        found_at = next((f for c in COLUMNS[::-1] if (f := figures(of_group, speedup, c))), {})
        cells.append(called(of_group[min(found_at, key=found_at.__getitem__)]) if found_at else "")
        shown.add_row(*cells)
    return shown


class Target(NamedTuple):
    what: str
    groups: tuple[str, ...]
    of: Callable[[Row, str], float | None]
    worst: bool
    """Of the cases; else their geometric mean."""
    limit: float
    at_least: bool
    base: str | None = None

    def said(self, rows: Sequence[Row]) -> str:
        """A line; "" where no row is of its groups. Targets are for real models, not for shapes of the user's."""
        of_groups = [
            row for row in rows
            if row["model"] and row["group"] in self.groups and self.base in (None, row["base"])
        ]  # fmt: skip
        if not of_groups:
            return ""
        columns = COLUMNS[:1] if self.of is peak else COLUMNS
        verdicts = [self._verdict(of_groups, column) for column in columns]
        than = "at least" if self.at_least else "at most"
        how = "worst case" if self.worst else "geometric mean"
        return f"{self.what}, {how} {than} {self.limit:g}: " + "; ".join(verdicts)

    def _verdict(self, rows: Sequence[Row], column: str) -> str:
        label = f"{column} " if self.of is not peak else ""
        found = figures(rows, self.of, column)
        if not found:
            return f"{label}not measured"
        least = min if self.at_least else max
        place = least(found, key=found.__getitem__)
        figure = found[place] if self.worst else mean(found.values())
        met = figure >= self.limit if self.at_least else figure <= self.limit
        off = abs(figure / self.limit - 1)
        verdict = f"{label}{figure:.3f} {'met' if met else f'MISSED by {off:.1%}'}"
        if self.worst:
            verdict += f" ({called(rows[place])})"
        return verdict + f", {len(found)} of {len(rows)} cases"


TARGETS = (
    Target("what Unsloth leaves, PEFT / ours", LEFT_BY_UNSLOTH, speedup, False, 1.5, True),
    Target("what Unsloth leaves, PEFT / ours", LEFT_BY_UNSLOTH, speedup, True, 1.0, True),
    Target("what Unsloth leaves, peak ours / PEFT", LEFT_BY_UNSLOTH, peak, True, 1.0, False),
    Target("linear on NF4, ours / floor", (LINEAR,), over_floor, True, 1.15, False, "nf4"),
    Target("DoRA, PEFT / ours", (DORA,), speedup, False, 1.8, True),
    Target("head and loss, PEFT / ours", (HEAD,), speedup, False, 1.5, True),
    Target("head and loss, peak ours / PEFT", (HEAD,), peak, True, 0.25, False),
)


def targets(rows: Sequence[Row]) -> list[str]:
    return [line for target in TARGETS if (line := target.said(rows))]
