from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_reports import arm, report
from scripts import script

from fastlora.bench.report import write
from fastlora.bench.schema import ArmResult, Frontier, Gate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    return path


def sync(root: Path, *arguments: str) -> int:
    module = script("readme")
    code: int = module.main(arguments, root)
    return code


def test_readme_is_brought_in_sync(readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = readme.parent
    results = root / "benchmarks" / "results"
    both = (
        arm("peft", counted={"steps": 30}),
        arm("liger", (900.0, 950.0, 1000.0), counted={"steps": 30}),
        arm("unsloth", (1900.0, 2000.0, 2100.0), 5.0, counted={"steps": 30}),
    )
    frontier = [Frontier(arm="peft", axis="micro_batch", fits=7, fails=8, tokens_per_s=1.0,
                         peak_reserved_gib=23.0)]  # fmt: skip
    write(report(*both, frontier=frontier, vram_cap_gib=24, model="small"), results / "new")
    old = report(arm("peft", (1.0, 1.0, 1.0)), started="2026-11-25T11:00:00+02:00")
    replaced = {"vram_cap_gib": 24, "model": "small", "frontier": frontier}
    write(old.model_copy(update=replaced), results / "old")
    red = arm("peft").model_copy(
        update={"status": "red", "gates": [Gate(name="loss", passed=False, detail="")]}
    )
    write(report(red, name="a|b", environment={"commit": "5eed"}, status="red"), results / "cpu")
    assert sync(root, "--check") == 1
    assert "not in sync" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert sync(root) == 0
    assert sync(root, "--check") == 0
    assert readme.read_text() == (
        "before\n<!-- bench:begin -->\n"
        "| suite | GPU | arm | tokens/s [p20..p80] | x peft | timed steps | peak reserved GiB "
        "| x peft | gates |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |\n"
        "| a\\|b, Small, nf4 | CPU | peft |  |  |  |  |  | red: loss |\n"
        "| small, nf4, 24 GiB, frontier | NVIDIA H200 | peft | 1,000 [990..1,020] | 1.00x | 27 "
        "| 10.00 | 1.00x | 2 of 2 |\n"
        "| small, nf4, 24 GiB, frontier | NVIDIA H200 | liger | 950 [900..1,000] | ~1 | 27 "
        "| 10.00 | 1.00x | 2 of 2 |\n"
        "| small, nf4, 24 GiB, frontier | NVIDIA H200 | unsloth | 2,000 [1,900..2,100] | 2.00x | 27 "
        "| 5.00 | 0.50x | 2 of 2 |\n"
        "\n"
        "- a\\|b, Small, nf4 on CPU: 2026-11-25, commit 5eed, "
        "[report](benchmarks/results/cpu/report.html)\n"
        "- small, nf4, 24 GiB, frontier on NVIDIA H200: 2026-11-25, commit abc1234def56, "
        "[report](benchmarks/results/new/report.html)\n"
        "\n"
        "The most that fits:\n\n"
        "| suite | GPU | arm | axis | fits | x first arm | fails at | tokens/s "
        "| peak reserved GiB |\n"
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| small, nf4, 24 GiB, frontier | NVIDIA H200 | peft | micro_batch | 7 | 1.00x | 8 | 1 | 23.00 |\n"
        "<!-- bench:end -->\nafter\n"
    )


def test_reports_of_other_work_stand_beside_each_other(readme: Path) -> None:
    root = readme.parent
    real, int8 = (report().settings for _ in range(2))
    real["work"]["lengths"] = "real"
    int8["recipe"]["model"]["quantization"] = "int8"
    others: list[dict[str, Any]] = [
        {}, {"model": "Other"}, {"vram_cap_gib": 24}, {"settings": real}, {"settings": int8},
        {"name": "tiny-8k"},
    ]  # fmt: skip
    for place, other in enumerate(others):
        write(report(**other), root / "benchmarks" / "results" / str(place))
    plan = root / "benchmarks" / "suites" / "plan"
    plan.mkdir(parents=True)
    (plan / "tiny-8k.toml").touch()
    assert sync(root) == 0
    text = readme.read_text()
    for name in (
        "small, Small, nf4", "small, Other, nf4", "small, Small, nf4, 24 GiB",
        "small, Small, nf4, real lengths", "small, Small, int8",
    ):  # fmt: skip
        assert text.count(f"- {name} on NVIDIA H200") == 1, name
    assert "tiny-8k" not in text  # it is for docs/plan.md


def test_arms_that_were_not_come_to_are_not_shown(readme: Path) -> None:
    whole = report(environment={"commit": "5eed", "dirty": False})
    cut = ArmResult(arm="unsloth+keep7", status="interrupted")
    results = readme.parent / "benchmarks" / "results"
    arms = [*whole.arms, whole.arms[0].model_copy(update={"arm": "liger"}), cut]
    write(whole.model_copy(update={"arms": arms}), results / "cut")
    assert sync(readme.parent) == 0
    text = readme.read_text()
    assert [f"| {arm.arm} |" in text for arm in arms] == [True, True, False]


def test_reports_that_cannot_be_repeated_are_left_out(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = readme.parent
    results = root / "benchmarks" / "results"
    cut = [ArmResult(arm="unsloth", status="interrupted")]
    write(report(status="partial").model_copy(update={"arms": cut}), results / "partial")
    write(report(environment={"dirty": False}), results / "unknown")
    write(report(environment={"commit": "5eed", "dirty": True}), results / "dirty")
    assert sync(root) == 0
    assert "No benchmark has been measured yet." in readme.read_text()
    assert capsys.readouterr().err.splitlines() == [
        "benchmarks/results/dirty/report.json: left out: it was measured with changes that no "
        "commit holds",
        "benchmarks/results/partial/report.json: left out: it was interrupted after 0 arms",
        "benchmarks/results/unknown/report.json: left out: it names no commit",
    ]


def test_readme_without_markers_or_with_a_bad_report_is_refused(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = readme.parent
    assert sync(root) == 0
    assert "No benchmark has been measured yet." in readme.read_text()
    folder = root / "benchmarks" / "results" / "bad"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"schema_version": 0}))
    assert sync(root) == 2
    assert "schema_version is 0" in capsys.readouterr().err
    readme.write_text("none")
    assert sync(root) == 2
    assert "markers" in capsys.readouterr().err
