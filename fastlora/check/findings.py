"""Findings: for each kind, the rows it was found in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fastlora.check.rows import Rows
from fastlora.check.text import masked
from fastlora.recipe.findings import KINDS, Kind

_EXAMPLE_CHARS = 160


@dataclass(slots=True)
class Finding:
    code: str
    rows: dict[int, str] = field(default_factory=dict)
    """Place in Rows -> what was found in that row."""
    example: str = ""
    """What the first of them says, shortened."""
    general: str = ""
    """For what concerns no row of its own."""

    @property
    def kind(self) -> Kind:
        return KINDS[self.code]


class Findings:
    def __init__(self) -> None:
        self._by_code: dict[str, Finding] = {}

    def add(self, code: str, place: int, detail: str = "", example: str = "") -> None:
        """`place` is the row's in Rows. A second finding of a kind in a row is left out."""
        finding = self._by_code.setdefault(code, Finding(code))
        if place in finding.rows:
            return
        if not finding.rows:
            finding.example = shortened(example)
        finding.rows[place] = detail

    def add_general(self, code: str, detail: str) -> None:
        self._by_code.setdefault(code, Finding(code)).general = detail

    def sorted(self) -> list[Finding]:
        """The most serious first, in the order of KINDS, which goes by how much harm each does."""
        order = {code: place for place, code in enumerate(KINDS)}
        found = self._by_code.values()
        return sorted(
            found, key=lambda one: (one.kind.severity != "error", order[one.code], one.code)
        )

    def refused(self) -> dict[int, list[str]]:
        """Rows with an error -> each error and what was found, for --write-clean."""
        rows: dict[int, list[str]] = {}
        for finding in self.sorted():
            if finding.kind.severity == "error":
                for place, detail in finding.rows.items():
                    why = f"{finding.code}: {detail or finding.kind.says}"
                    rows.setdefault(place, []).append(why)
        return rows


def counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def shortened(text: str) -> str:
    """On one line, without keys and passwords, and with what no terminal should be sent written out."""
    text = masked(text)[: _EXAMPLE_CHARS + 1]
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return shown if len(shown) <= _EXAMPLE_CHARS else shown[: _EXAMPLE_CHARS - 1] + "…"


def as_document(finding: Finding, rows: Rows) -> dict[str, Any]:
    details = Counter(finding.rows.values())
    return {
        "kind": finding.code,
        "severity": finding.kind.severity,
        "says": finding.kind.says,
        "detail": finding.general or (details.most_common(1)[0][0] if len(details) == 1 else ""),
        "count": len(finding.rows),
        "share": len(finding.rows) / max(1, len(rows.all)),
        "example": finding.example,
        "rows": [
            {
                "source": rows.source(place).name,
                rows.source(place).unit: rows.all[place].number,
                "split": rows.split(place),
                "detail": shortened(detail),
            }
            for place, detail in sorted(finding.rows.items())
        ],
    }
