"""Two reports of one benchmark, before and after a change: what got faster, what got lost, what is noise.

Between two runs the whole machine drifts, by more than the steps of one run differ: an arm is judged by its
speed beside the first arm of the same run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, computed_field
from rich.console import Console
from rich.text import Text

from fastlora.bench.report import show
from fastlora.bench.schema import SCHEMA_VERSION, Axis, Frontier, Report, Spread
from fastlora.bench.summary import METRICS, Metric, Row, disjoint, headline, ratio, rows
from fastlora.bench.tables import Table, gib, spread, times, was_found
from fastlora.errors import UsageError

MEMORY_ALLOWANCE = 0.02
"""PyTorch's allocator reserves in blocks of 2 to 20 MiB and rounds larger ones up to 2 MiB, so that the same
arm's peak differs a little from run to run, by how its blocks came to lie."""
FITS_ALLOWANCE = 0.05
"""The frontier's search ends at 4 %."""


class SpeedChange(BaseModel):
    arm: str
    metric: Metric
    relative: bool
    """Whether before and after are multiples of the first arm's figure in the same report; the first arm's
    own are absolute."""
    before: Spread
    after: Spread
    ratio: float | None
    """After to before, of p50."""
    verdict: Literal["faster", "slower", "noise"]
    """noise: the intervals p20..p80 meet."""


class MemoryChange(BaseModel):
    """Peak reserved memory."""

    arm: str
    before_gib: float
    after_gib: float
    ratio: float | None
    verdict: Literal["more", "less", "same"]


class FitsChange(BaseModel):
    """The most that fits, of a frontier."""

    arm: str
    axis: Axis
    before: int
    after: int
    ratio: float | None
    verdict: Literal["more", "less", "same"]


class Comparison(BaseModel):
    name: str
    headline: Metric
    first: str
    """The arm that the others are held to: the first that was measured in both reports."""
    speeds: list[SpeedChange]
    memory: list[MemoryChange]
    fits: list[FitsChange]
    lost: list[str]
    """A line per arm that passed before and now does not, or is missing; the same for frontiers."""
    new_arms: list[str]
    warnings: list[str]
    """What makes the comparison unfair."""

    @computed_field  # type: ignore[prop-decorator]  # mypy takes no decorator above property
    @property
    def regressed(self) -> bool:
        """An arm or a frontier was lost, an arm takes more memory, less fits, or it is slower in the headline
        metric; the time of a step alone does not count, since it follows the work in it."""
        return (
            bool(self.lost)
            or any(change.verdict == "more" for change in self.memory)
            or any(change.verdict == "less" for change in self.fits)
            or any(change.verdict == "slower" for change in self._judged)
        )

    @property
    def _judged(self) -> list[SpeedChange]:
        """The ratios; absolute speeds only where there is nothing else."""
        speeds = [change for change in self.speeds if change.metric == self.headline]
        return [change for change in speeds if change.relative] or speeds


def compare(before: Report, after: Report) -> Comparison:
    """Raises UsageError: no arm passed in both."""
    old = {row.arm.arm: row for row in rows(before)}
    new = {row.arm.arm: row for row in rows(after)}
    key = headline(after)
    lost = [*_lost(old, new), *_lost_frontiers(before, after)]
    both = [(old[name], row) for name, row in new.items() if name in old]
    measured = [pair for pair in both if all(getattr(row.arm, key) for row in pair)]
    if not measured:
        why = "".join(f"; {line}" for line in lost)
        raise UsageError(
            f"no arm passed in both reports, so there is nothing to compare{why}; "
            "measure again with an arm in common"
        )
    first = measured[0]
    return Comparison(
        name=after.name,
        headline=key,
        first=first[1].arm.arm,
        speeds=[change for pair in measured for change in _speeds(pair, first)],
        memory=[change for pair in both for change in _memory(*pair)],
        fits=list(_fits(before, after)),
        lost=lost,
        new_arms=[name for name in new if name not in old],
        warnings=list(_warnings(before, after)),
    )


def _speeds(pair: tuple[Row, Row], first: tuple[Row, Row]) -> Iterator[SpeedChange]:
    relative = pair is not first
    for metric in METRICS:
        before, after = (getattr(row.arm, metric) for row in pair)
        if relative:
            bases = [getattr(row.arm, metric) for row in first]
            before, after = map(_beside, (before, after), bases)
        if before is None or after is None:
            continue
        verdict: Literal["faster", "slower", "noise"] = "noise"
        if disjoint(before, after):
            better = (after.p50 > before.p50) != (metric == "step_s")
            verdict = "faster" if better else "slower"
        yield SpeedChange(
            arm=pair[1].arm.arm,
            metric=metric,
            relative=relative,
            before=before,
            after=after,
            ratio=ratio(after.p50, before.p50),
            verdict=verdict,
        )


def _beside(speed: Spread | None, first: Spread | None) -> Spread | None:
    """The ratio, as wide as the two intervals allow."""
    if speed is None or first is None or not (first.p20 and first.p50 and first.p80):
        return None
    return Spread(p20=speed.p20 / first.p80, p50=speed.p50 / first.p50, p80=speed.p80 / first.p20)


def _memory(old: Row, new: Row) -> Iterator[MemoryChange]:
    before, after = old.arm.peak_reserved_gib, new.arm.peak_reserved_gib
    if before is None or after is None:
        return
    verdict: Literal["more", "less", "same"] = "same"
    if abs(after - before) > MEMORY_ALLOWANCE * before:
        verdict = "more" if after > before else "less"
    yield MemoryChange(
        arm=new.arm.arm,
        before_gib=before,
        after_gib=after,
        ratio=ratio(after, before),
        verdict=verdict,
    )


def _fits(before: Report, after: Report) -> Iterator[FitsChange]:
    old = _frontiers(before)
    for (arm, axis), entry in _frontiers(after).items():
        if (arm, axis) not in old:
            continue
        was = old[arm, axis].fits
        verdict: Literal["more", "less", "same"] = "same"
        if abs(entry.fits - was) > FITS_ALLOWANCE * was:
            verdict = "more" if entry.fits > was else "less"
        yield FitsChange(
            arm=arm,
            axis=entry.axis,
            before=was,
            after=entry.fits,
            ratio=ratio(entry.fits, was),
            verdict=verdict,
        )


def _frontiers(report: Report) -> dict[tuple[str, str], Frontier]:
    return {(entry.arm, entry.axis): entry for entry in report.frontier if was_found(entry)}


def _lost_frontiers(before: Report, after: Report) -> Iterator[str]:
    """None where no frontier was asked for after: that is a warning."""
    new = _frontiers(after)
    details = {(entry.arm, entry.axis): entry.detail for entry in after.frontier}
    for key, entry in _frontiers(before).items():
        if after.frontier and key not in new:
            now = f"not found now: {details[key]}" if key in details else "missing now"
            yield f"{entry.arm}: {entry.axis}: {entry.fits:,} fitted before, {now}"


def _lost(old: dict[str, Row], new: dict[str, Row]) -> Iterator[str]:
    for name, row in old.items():
        if not row.sound:
            continue
        if name not in new:
            yield f"{name}: passed before, missing now"
        elif not new[name].sound:
            yield f"{name}: passed before, now {new[name].why_empty}"


def _warnings(before: Report, after: Report) -> Iterator[str]:
    """Everything but the code that differs. Two commits are what is compared, and fastlora's own version
    with them; the checkpoint's path and the output's folder may be scratch."""
    old, new = _conditions(before), _conditions(after)
    yield from _differences(old, new, "")
    if before.frontier and not after.frontier:
        yield "frontier: searched before, not after"
    for when, report in (("before", before), ("after", after)):
        if report.environment.get("dirty"):
            yield f"{when}: measured with changes that no commit holds"
    if (old["recipe"], old["work"]) == (new["recipe"], new["work"]):  # else it follows from them
        fed = {arm.arm: arm.counted for arm in before.arms if arm.counted}
        for arm in after.arms:
            if arm.counted and arm.arm in fed:
                yield from _differences(fed[arm.arm], arm.counted, f"{arm.arm}.counted")


def _conditions(report: Report) -> dict[str, Any]:
    recipe = dict(report.settings.get("recipe") or {})
    recipe["model"] = _without(recipe.get("model"), "name")
    versions = report.environment.get("versions")
    return {
        "name": report.name,
        "model": report.model,
        "vram_cap_gib": report.vram_cap_gib,
        "recipe": _without(recipe, "output"),
        "work": report.settings.get("work"),
        "shape": report.settings.get("shape"),
        "weights": report.settings.get("weights"),
        "machine": report.environment.get("machine"),
        "driver": report.environment.get("driver"),
        "versions": _without(versions, "fastlora"),
    }


def _without(section: dict[str, Any] | None, key: str) -> dict[str, Any]:
    return {name: value for name, value in (section or {}).items() if name != key}


def _differences(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield f"{path}: {_said(before)} before, {_said(after)} after"


def _said(value: Any) -> str:
    return "nothing" if value is None else str(value)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What makes it unfair first, then every change, then the verdict."""
    for line in comparison.warnings:
        console.print(Text(f"unfair: {line}", style="yellow"))
    changes = [
        [
            c.arm,
            f"{c.metric} / {comparison.first}'s" if c.relative else c.metric,
            spread(c.before),
            spread(c.after),
            times(c.ratio),
            c.verdict,
        ]
        for c in comparison.speeds
    ]
    changes += [
        [c.arm, "peak_reserved_gib", gib(c.before_gib), gib(c.after_gib), times(c.ratio), c.verdict]
        for c in comparison.memory
    ]
    changes += [
        [c.arm, f"fits: {c.axis}", f"{c.before:,}", f"{c.after:,}", times(c.ratio), c.verdict]
        for c in comparison.fits
    ]
    show(Table(["arm", "metric", "before", "after", "x", "verdict"], changes), console)
    console.print(Text(_drift(comparison)))
    for line in comparison.lost:
        console.print(Text(line, style="red"))
    if comparison.new_arms:
        console.print(Text(f"new: {', '.join(comparison.new_arms)}"))
    result = "regressed" if comparison.regressed else "no regression"
    unfair = ", but the comparison is unfair" if comparison.warnings else ""
    console.print(Text(f"{comparison.name}: {result}{unfair}", style="bold"))


def _drift(comparison: Comparison) -> str:
    absolute = next(
        change
        for change in comparison.speeds
        if not change.relative and change.metric == comparison.headline
    )
    alone = not any(change.relative for change in comparison.speeds)
    judged = "judged all the same: no other arm passed in both" if alone else "not judged"
    return (
        f"the first arm changed by {times(absolute.ratio) or 'nothing known'} ({comparison.first}, "
        f"{comparison.headline}); absolute figures of two runs carry the machine's drift: {judged}"
    )


def read_report(path: Path) -> Report:
    """A report.json, or the folder that holds it. Raises UsageError: none there, or not one of ours."""
    file = path / "report.json" if path.is_dir() else path
    hint = "give a report.json of `fastlora bench`, or its folder"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: not readable: {error.strerror}; {hint}") from None
    except ValueError as error:
        raise UsageError(f"{file}: not JSON: {error}; {hint}") from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise UsageError(f"{file}: not a report: it has no schema_version; {hint}")
    if document["schema_version"] != SCHEMA_VERSION:
        raise UsageError(
            f"{file}: schema_version is {document['schema_version']!r}, and this fastlora reads "
            f"{SCHEMA_VERSION}; measure again, or compare with the fastlora that wrote it"
        )
    try:
        return Report.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{file}: {place}: {first['msg']}; {hint}") from None
