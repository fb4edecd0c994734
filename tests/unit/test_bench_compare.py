from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from bench_reports import BEFORE, arm, report
from rich.console import Console

from fastlora.bench.compare import Comparison, compare, print_comparison, read_report
from fastlora.bench.report import write
from fastlora.bench.schema import ArmResult, Frontier, Gate, Report, Spread
from fastlora.errors import UsageError


def printed(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_comparison(comparison, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("after", "verdict", "regressed"),
    [
        ((1030.0, 1040.0, 1050.0), "faster", False),
        ((900.0, 950.0, 980.0), "slower", True),
        ((900.0, 1005.0, 980.0), "noise", False),  # total tokens over total seconds lies outside
        ((900.0, 950.0, 995.0), "noise", False),
        ((1010.0, 1100.0, 1200.0), "noise", False),
        ((1020.0, 1100.0, 1200.0), "noise", False),  # they touch
        (BEFORE, "noise", False),
        ((1000.0, 1000.0, 1000.0), "noise", False),
        ((1021.0, 1021.0, 1021.0), "faster", False),
        ((float("nan"),) * 3, "noise", False),
    ],
)
def test_a_lone_arm_is_judged_by_absolute_speeds_that_are_disjoint(
    after: tuple[float, float, float], verdict: str, regressed: bool
) -> None:
    comparison = compare(report(), report(arm(speed=after)))
    (change,) = comparison.speeds
    assert (change.arm, change.metric, change.verdict) == ("unsloth", "tokens_per_s", verdict)
    assert (change.relative, comparison.regressed) == (False, regressed)
    text = printed(comparison)
    assert verdict in text
    assert "judged all the same: no other arm passed in both" in " ".join(text.split())


def narrow(speed: float) -> tuple[float, float, float]:
    return 0.99 * speed, speed, 1.01 * speed


@pytest.mark.parametrize(
    ("peft", "unsloth", "verdict", "regressed"),
    [
        (20_000.0, 40_000.0, "noise", False),  # the machine was faster: each arm was
        (14_000.0, 28_000.0, "noise", False),
        (20_000.0, 32_000.0, "slower", True),  # as fast as before, but it should have been faster
        (16_000.0, 36_000.0, "faster", False),
    ],
)
def test_other_arms_are_judged_by_their_ratio_to_the_first(
    peft: float, unsloth: float, verdict: str, regressed: bool
) -> None:
    before = report(arm("peft", narrow(16_000)), arm("unsloth", narrow(32_000)))
    after = report(arm("peft", narrow(peft)), arm("unsloth", narrow(unsloth)))
    comparison = compare(before, after)
    first, other = comparison.speeds
    assert (comparison.first, first.relative, other.relative) == ("peft", False, True)
    assert (other.verdict, comparison.regressed) == (verdict, regressed)
    assert other.before.model_dump() == pytest.approx(
        {"p20": 2 * 0.99 / 1.01, "p50": 2, "p80": 2 * 1.01 / 0.99}
    )
    text = " ".join(printed(comparison).split())
    assert "tokens_per_s / peft's" in text
    assert f"the first arm changed by {peft / 16_000:.2f}x (peft, tokens_per_s)" in text
    assert "absolute figures of two runs carry the machine's drift: not judged" in text


def test_arms_are_held_to_the_first_that_passed_in_both() -> None:
    before = report(arm("peft"), arm("liger", narrow(2000)), arm("unsloth", narrow(4000)))
    after = report(
        arm("unsloth", narrow(2000)),
        ArmResult(arm="peft", status="oom"),
        arm("liger", narrow(1000)),
    )
    comparison = compare(before, after)
    assert comparison.first == "unsloth"
    assert [(c.arm, c.verdict) for c in comparison.speeds if c.relative] == [("liger", "noise")]


@pytest.mark.parametrize(
    "after",
    [
        report(arm("liger")),
        report(ArmResult(arm="unsloth", status="timeout")),
        report(arm().model_copy(update={"tokens_per_s": None})),
    ],
)
def test_nothing_in_common_is_not_called_no_regression(after: Report) -> None:
    with pytest.raises(UsageError, match="no arm passed in both reports"):
        compare(report(), after)


def fitted(fits: int, detail: str = "", axis: Any = "seq_len_tokens") -> Frontier:
    return Frontier(
        arm="unsloth", axis=axis, fits=fits, fails=None, tokens_per_s=None,
        peak_reserved_gib=None, detail=detail,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "verdict", "regressed"),
    [
        (10_000, fitted(9_500), "same", False),
        (10_000, fitted(9_400), "less", True),
        (10_000, fitted(10_600), "more", False),
        (10_000, fitted(0), "less", True),
        (10_000, fitted(0, "oom: while loading"), "less", True),
        (0, fitted(0), "same", False),
    ],
)
def test_what_fits_has_an_allowance(
    before: int, after: Frontier, verdict: str, regressed: bool
) -> None:
    comparison = compare(report(frontier=[fitted(before)]), report(frontier=[after]))
    assert [change.verdict for change in comparison.fits] == [verdict]
    assert comparison.regressed is regressed
    assert "fits: seq_len_tokens" in printed(comparison)


def test_a_frontier_that_is_not_found_any_more_is_lost() -> None:
    both = [fitted(8), fitted(4, axis="micro_batch")]
    comparison = compare(report(frontier=both), report(frontier=[fitted(0, "timeout: 900 s")]))
    assert (comparison.fits, comparison.regressed) == ([], True)
    assert comparison.lost == [
        "unsloth: seq_len_tokens: 8 fitted before, not found now: timeout: 900 s",
        "unsloth: micro_batch: 4 fitted before, missing now",
    ]
    unfound = report(frontier=[fitted(0, "failed: crashed")])
    assert not compare(unfound, report(frontier=both)).regressed
    assert compare(report(frontier=both), report()).warnings == [
        "frontier: searched before, not after"
    ]


def test_single_points_that_are_equal_are_noise_and_zero_has_no_ratio() -> None:
    still = report(arm(speed=(0.0, 0.0, 0.0)))
    (change,) = compare(still, still).speeds
    assert (change.verdict, change.ratio) == ("noise", None)


def test_a_longer_step_is_slower_but_alone_no_regression() -> None:
    one, two = Spread(p20=1, p50=1, p80=1), Spread(p20=2, p50=2, p80=2)
    comparison = compare(report(arm(step_s=one)), report(arm(step_s=two)))
    assert [(c.metric, c.verdict) for c in comparison.speeds] == [
        ("tokens_per_s", "noise"),
        ("step_s", "slower"),
    ]
    assert comparison.speeds[1].ratio == 2
    assert not comparison.regressed


@pytest.mark.parametrize(
    ("after", "verdict"), [(10.2, "same"), (9.8, "same"), (10.21, "more"), (9.79, "less")]
)
def test_memory_has_an_allowance(after: float, verdict: str) -> None:
    comparison = compare(report(), report(arm(gib=after)))
    assert [change.verdict for change in comparison.memory] == [verdict]
    assert comparison.regressed is (verdict == "more")
    assert f"{after:.2f}" in printed(comparison)


def test_without_a_gpu_there_is_no_memory_to_compare() -> None:
    assert compare(report(arm(gib=None)), report(arm())).memory == []


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (ArmResult(arm="unsloth", status="oom"), "unsloth: passed before, now out of memory"),
        (
            arm().model_copy(
                update={
                    "status": "red",
                    "gates": [Gate(name="parity", passed=False, detail="")],
                }
            ),
            "unsloth: passed before, now red: parity",
        ),
        (None, "unsloth: passed before, missing now"),
    ],
)
def test_an_arm_that_is_lost_is_a_regression(now: ArmResult | None, line: str) -> None:
    after = report(arm("peft"), *([now] if now else []))
    comparison = compare(report(arm("peft"), arm()), after)
    assert comparison.lost == [line]
    assert comparison.regressed
    assert [change.arm for change in comparison.speeds] == ["peft"]
    assert line in printed(comparison)
    assert "small: regressed" in printed(comparison)
    assert comparison.model_dump(mode="json")["regressed"] is True


def test_an_arm_that_never_passed_is_not_lost_and_new_ones_are_listed() -> None:
    before = report(arm("peft"), ArmResult(arm="unsloth", status="oom"))
    comparison = compare(before, report(arm("peft"), arm("liger")))
    assert (comparison.lost, comparison.new_arms) == ([], ["liger"])
    assert not comparison.regressed
    assert "new: liger" in printed(comparison)


def test_what_makes_it_unfair_is_named() -> None:
    after = report(
        arm(counted={"tokens": 2}),
        model="Other",
        vram_cap_gib=24,
        settings={
            "recipe": {"model": {"name": "/tmp/b", "quantization": "nf4"}},
            "work": {"steps": 60, "warmup_steps": 3},
        },
        environment={
            "machine": {"gpu": "NVIDIA A100"},
            "versions": {"torch": "2.12.0", "fastlora": "0.2.0"},
            "commit": "def5678",
            "driver": "580",
            "dirty": True,
        },
    )
    comparison = compare(report(arm(counted={"tokens": 1})), after)
    assert comparison.warnings == [
        "model: Small before, Other after",
        "vram_cap_gib: nothing before, 24.0 after",
        "work.steps: 30 before, 60 after",
        "machine.gpu: NVIDIA H200 before, NVIDIA A100 after",
        "driver: nothing before, 580 after",
        "versions.torch: 2.11.0 before, 2.12.0 after",
        "after: measured with changes that no commit holds",
    ]
    text = printed(comparison)
    assert "unfair: machine.gpu: NVIDIA H200 before, NVIDIA A100 after" in text
    assert "no regression, but the comparison is unfair" in text
    assert compare(report(), report()).warnings == []


def test_other_rows_make_it_unfair() -> None:
    one, two = (report(arm(counted={"digest": digest})) for digest in ("aa", "bb"))
    assert compare(one, two).warnings == ["unsloth.counted.digest: aa before, bb after"]


def test_a_report_is_read_from_its_file_or_folder(tmp_path: Path) -> None:
    write(report(), tmp_path)
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == report()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "report.json: not readable: No such file"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "no schema_version"),
        (b'{"schema_version": 99}', "schema_version is 99, and this fastlora reads 1"),
        (b'{"schema_version": 1}', "name: Field required"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"report\.json") as refused:
        read_report(tmp_path)
    assert problem in str(refused.value)
    assert ";" in str(refused.value)  # how to mend it comes after
