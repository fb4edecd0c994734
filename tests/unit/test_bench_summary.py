from __future__ import annotations

from typing import Any

import pytest

from fastlora.bench.schema import ArmResult, Gate, Report, Spread
from fastlora.bench.summary import rows, verdict


def arm(name: str, p50: float, gib: float | None, red: bool = False, **more: Any) -> ArmResult:
    return ArmResult(
        arm=name,
        status="ok",
        gates=[
            Gate(name="work", passed=True, detail=""),
            Gate(name="loss", passed=not red, detail=""),
        ],
        tokens_per_s=Spread(p20=p50 - 10, p50=p50, p80=p50 + 20),
        peak_reserved_gib=gib,
        **more,
    )


def report(*arms: ArmResult, lengths: str = "full") -> Report:
    return Report(
        name="small",
        model="Small",
        status="partial",
        started="2026-11-25T10:11:12+00:00",
        seconds=1,
        vram_cap_gib=None,
        settings={"work": {"lengths": lengths}},
        environment={},
        arms=list(arms),
    )


PEFT, UNSLOTH = arm("peft", 1000, 16), arm("unsloth", 2000, 8)
RED, OOM = arm("liger", 3000, 4, red=True), ArmResult(arm="peft", status="oom")
PASSED = "; equal work, 2 of 2 gates passed"


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ((PEFT, UNSLOTH), f"unsloth trains 2.00x as fast as peft with 0.50x the memory{PASSED}"),
        (
            (PEFT, UNSLOTH, arm("other", 1500, 1)),
            f"unsloth trains 2.00x as fast as peft with 0.50x the memory{PASSED}",
        ),
        (
            (UNSLOTH, RED, PEFT),
            f"peft trains 0.50x as fast as unsloth with 2.00x the memory{PASSED}; "
            "without a figure: liger (red: loss)",
        ),
        (
            (PEFT, arm("unsloth", 1005, None)),
            f"unsloth trains 1.00x as fast as peft (within the noise){PASSED}",
        ),
        ((PEFT,), f"peft trains 1,000 tokens/s in 16.00 GiB{PASSED}"),
        (
            (OOM, UNSLOTH),
            f"unsloth trains 2,000 tokens/s in 8.00 GiB{PASSED}; "
            "without a figure: peft (out of memory)",
        ),
        ((OOM,), "no arm was measured; without a figure: peft (out of memory)"),
        ((), "no arm was measured"),
        (
            (PEFT, UNSLOTH.model_copy(update={"gates": []})),
            "unsloth trains 2.00x as fast as peft with 0.50x the memory",
        ),
    ],
)
def test_verdicts(arms: tuple[ArmResult, ...], expected: str) -> None:
    assert verdict(report(*arms)) == expected


def test_real_lengths_are_judged_by_supervised_tokens() -> None:
    peft, unsloth = (
        arm(name, p50, None, supervised_tokens_per_s=Spread(p20=of, p50=of, p80=of))
        for name, p50, of in (("peft", 1000, 100), ("unsloth", 2000, 150))
    )
    assert verdict(report(peft, unsloth, lengths="real")) == (
        f"unsloth trains 1.50x as fast as peft in supervised tokens/s{PASSED}"
    )
    assert [row.p50 for row in rows(report(peft, unsloth, lengths="real"))] == [100, 150]


def test_a_failed_gate_withholds_figures_whatever_the_status_says() -> None:
    (row,) = rows(report(RED))
    assert (row.speed, row.arm.tokens_per_s, row.arm.peak_reserved_gib) == (None, None, None)
    assert row.why_empty == "red: loss"
