"""What is read from a report, for every table, plot and sentence: the speed that counts, ratios, the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastlora.bench.schema import ArmResult, Report, Spread

Metric = Literal["tokens_per_s", "supervised_tokens_per_s", "step_s"]
METRICS: tuple[Metric, ...] = ("tokens_per_s", "supervised_tokens_per_s", "step_s")
SPEED_LABELS: dict[Metric, str] = {
    "tokens_per_s": "tokens/s",
    "supervised_tokens_per_s": "supervised tokens/s",
}
_MEASURED = (
    *METRICS,
    "peak_allocated_gib",
    "peak_reserved_gib",
    "driver_gib",
    "host_gib",
    "mfu",
    "hfu",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm as it is shown; ratios are to the report's first arm, normally peft."""

    arm: ArmResult
    """Without a figure unless its status is ok and no gate failed."""
    speed: Spread | None
    """Of the report's headline metric."""
    speed_ratio: float | None
    within_noise: bool
    """Whether the speed's interval meets that of the first arm; False for the first arm itself."""
    memory_ratio: float | None
    """Of peak reserved memory."""

    @property
    def p50(self) -> float | None:
        return _p50(self.speed)

    @property
    def sound(self) -> bool:
        return sound(self.arm)

    @property
    def failed_gates(self) -> list[str]:
        return [gate.name for gate in self.arm.gates if not gate.passed]

    @property
    def gates(self) -> str:
        """`passed`, or the names of those that failed; empty where none was reached."""
        return ", ".join(self.failed_gates) or ("passed" if self.arm.gates else "")

    @property
    def why_empty(self) -> str:
        """Why there is no figure, in a few words."""
        if self.failed_gates:
            return f"red: {self.gates}"
        words = {"ok": "not measured", "oom": "out of memory"}
        return words.get(self.arm.status, self.arm.status)


def is_real(report: Report) -> bool:
    """Whether the rows had the lengths of an instruction set."""
    return (report.settings.get("work") or {}).get("lengths") == "real"


def headline(report: Report) -> Metric:
    """With real lengths most tokens are prompt and padding differs by arm: what is learned from counts."""
    return "supervised_tokens_per_s" if is_real(report) else "tokens_per_s"


def rows(report: Report) -> list[Row]:
    """One per arm, in the report's order. A red arm's figures are withheld even if the report has them:
    it did other work, and its speed means nothing."""
    arms = [withheld(arm) for arm in report.arms]
    key = headline(report)
    speeds: list[Spread | None] = [getattr(arm, key) for arm in arms]
    return [
        Row(
            arm=arm,
            speed=speed,
            speed_ratio=ratio(_p50(speed), _p50(speeds[0])),
            within_noise=place > 0 and meet(speed, speeds[0]),
            memory_ratio=ratio(arm.peak_reserved_gib, arms[0].peak_reserved_gib),
        )
        for place, (arm, speed) in enumerate(zip(arms, speeds, strict=True))
    ]


def sound(arm: ArmResult) -> bool:
    return arm.status == "ok" and all(gate.passed for gate in arm.gates)


def withheld(arm: ArmResult) -> ArmResult:
    return arm if sound(arm) else arm.model_copy(update=dict.fromkeys(_MEASURED))


def _p50(speed: Spread | None) -> float | None:
    return speed.p50 if speed else None


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def disjoint(one: Spread, other: Spread) -> bool:
    """Whether the intervals p20..p80 have no point in common. Each is stretched to its p50, which may be
    total tokens over total seconds and lie outside: what is judged is then never at odds with the ratio."""
    return _high(one) < _low(other) or _high(other) < _low(one)


def meet(one: Spread | None, other: Spread | None) -> bool:
    """Whether both are known and too close to tell apart."""
    return one is not None and other is not None and not disjoint(one, other)


def _low(speed: Spread) -> float:
    return min(speed.p20, speed.p50)


def _high(speed: Spread) -> float:
    return max(speed.p80, speed.p50)


def verdict(report: Report) -> str:
    """The fastest arm against the first, in one line; arms that were not measured are named in it."""
    shown = rows(report)
    measured = [row for row in shown if row.speed]
    unit = SPEED_LABELS[headline(report)]
    parts = [_sentence(shown[0], measured, unit)] if measured else ["no arm was measured"]
    missing = [f"{row.arm.arm} ({row.why_empty})" for row in shown if not row.speed]
    if missing:
        parts.append(f"without a figure: {', '.join(missing)}")
    return "; ".join(parts)


def _sentence(first: Row, measured: list[Row], unit: str) -> str:
    rivals = [row for row in measured if row is not first] or measured
    best = max(rivals, key=lambda row: row.p50 or 0.0)
    assert best.speed  # for the type checker: every row here has one
    if best is not first and first.speed and best.speed_ratio is not None:
        text = f"{best.arm.arm} trains {best.speed_ratio:.2f}x as fast as {first.arm.arm}"
        if unit != SPEED_LABELS["tokens_per_s"]:
            text += f" in {unit}"
        if best.within_noise:
            text += " (within the noise)"
        if best.memory_ratio is not None:
            text += f" with {best.memory_ratio:.2f}x the memory"
    else:
        text = f"{best.arm.arm} trains {best.speed.p50:,.0f} {unit}"
        if best.arm.peak_reserved_gib is not None:
            text += f" in {best.arm.peak_reserved_gib:.2f} GiB"
    gates = best.arm.gates
    if gates:
        equal = "equal work, " if any(g.name == "work" and g.passed for g in gates) else ""
        text += f"; {equal}{sum(g.passed for g in gates)} of {len(gates)} gates passed"
    return text
