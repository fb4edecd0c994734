"""Small reports for the tests of what is made of them."""

from __future__ import annotations

from typing import Any

from fastlora.bench.schema import ArmResult, Gate, Report, Spread

PASSED = [
    Gate(name="work", passed=True, detail="the same"),
    Gate(name="loss", passed=True, detail=""),
]
BEFORE = (990.0, 1000.0, 1020.0)


def arm(
    name: str = "unsloth",
    speed: tuple[float, float, float] = BEFORE,
    gib: float | None = 10.0,
    **more: Any,
) -> ArmResult:
    figures = Spread(p20=speed[0], p50=speed[1], p80=speed[2])
    return ArmResult(
        arm=name, status="ok", gates=PASSED, tokens_per_s=figures, peak_reserved_gib=gib, **more
    )


def report(*arms: ArmResult, **more: Any) -> Report:
    fields: dict[str, Any] = {
        "name": "small",
        "model": "Small",
        "status": "passed",
        "started": "2026-11-25T10:00:00+00:00",
        "seconds": 1,
        "vram_cap_gib": None,
        "settings": {
            "recipe": {"model": {"name": "/tmp/a", "quantization": "nf4"}},
            "work": {"steps": 30, "warmup_steps": 3},
        },
        "environment": {
            "machine": {"gpu": "NVIDIA H200"},
            "versions": {"torch": "2.11.0", "fastlora": "0.1.0"},
            "commit": "abc1234def567890",
        },
        "arms": arms or [arm()],
    }
    return Report.model_validate(fields | more)
