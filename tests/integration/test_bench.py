"""The harness on a CPU: what is right passes, each planted fault turns its gate red, nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from fastlora.bench.processes import Failed, run_worker
from fastlora.bench.run import Bench, Request
from fastlora.bench.schema import Arm, ArmResult, Report

pytestmark = pytest.mark.slow

FAULTY = (sys.executable, str(Path(__file__).parent / "bench_worker.py"))


def bench(
    folder: Path, monkeypatch: pytest.MonkeyPatch, faults: dict[str, str], **request: object
) -> tuple[Bench, dict[str, ArmResult]]:
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    arms = [Arm.parse(name) for name in ("peft", *faults)]
    asked = Request(target="tiny", arms=arms, steps=6, **request)  # type: ignore[arg-type]
    running = Bench(asked, folder, Console(quiet=True), FAULTY)
    return running, {arm.arm: arm for arm in running.run().arms}


def red(arm: ArmResult) -> set[str]:
    return {gate.name for gate in arm.gates if not gate.passed}


def test_planted_faults_show_no_speed_and_dead_arms_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {
        "peft-checkpointing": "gradient",
        "peft-optimizer": "frozen",
        "peft-checkpointing-optimizer": "tokens",
        "peft+fastlora": "oom",
        "peft+fastlora-optimizer": "kill",
        "peft+fastlora-checkpointing": "deep",
    }
    _, arms = bench(tmp_path, monkeypatch, faults)
    assert arms["peft"].status == "ok", arms["peft"].detail
    assert red(arms["peft-checkpointing"]) == {"parity"}
    assert "1 of 15 are wrong" in arms["peft-checkpointing"].detail
    assert {"weights", "loss"} <= red(arms["peft-optimizer"])
    assert "28 of 28 adapter tensors did not change" in arms["peft-optimizer"].detail
    assert {"work", "parity", "depth"} <= red(arms["peft-checkpointing-optimizer"])
    for name in list(faults)[:3]:
        assert arms[name].status == "red"
        assert arms[name].tokens_per_s is None
        assert arms[name].mfu is None
    oom, killed = arms["peft+fastlora"], arms["peft+fastlora-optimizer"]
    assert (oom.status, oom.tokens_per_s) == ("oom", None)
    assert oom.detail == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert killed.status == "failed"
    assert "SIGKILL" in killed.detail
    assert red(arms["peft+fastlora-checkpointing"]) == {"depth"}  # past the layers that parity sees


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(Failed) as caught:
        run_worker(
            "arm", "", log=tmp_path / "log", timeout_s=2, command=(sys.executable, "-c", script)
        )
    assert caught.value.status == "timeout"
    assert caught.value.detail == "no answer within 2 s"


def test_ctrl_c_leaves_a_partial_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, arms = bench(
        tmp_path, monkeypatch, {"peft-optimizer": "interrupt", "peft-checkpointing": ""}
    )
    assert running.stopped is not None
    assert running.stopped.exit_code == 130
    assert arms["peft"].tokens_per_s is not None
    assert arms["peft-optimizer"].status == arms["peft-checkpointing"].status == "interrupted"


def fastlora(*arguments: str, folder: Path, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "bench", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout


def test_the_command_measures_reports_and_compares(tmp_path: Path) -> None:
    """Without arguments and a GPU: the tiny suite, PEFT beside our kernels' reference path."""
    out = fastlora("--steps", "8", "--json", "--out", "first", folder=tmp_path)
    report = Report.model_validate_json(out)
    assert report.status == "passed"
    assert [arm.arm for arm in report.arms] == ["peft", "peft+fastlora"]
    for arm in report.arms:
        assert {gate.name for gate in arm.gates} >= {
            "work",
            "loss",
            "gradients",
            "weights",
            "parity",
        }
        assert arm.tokens_per_s is not None
        assert arm.tokens_per_s.p20 <= arm.tokens_per_s.p50 <= arm.tokens_per_s.p80
        assert arm.counted["steps"] == 8
        assert arm.counted["tokens"] == 8 * 4 * 64
    assert {"depth", "trajectory"} <= {gate.name for gate in report.arms[1].gates}
    for arm, kernel in zip(report.arms, ("PEFT", "fastlora"), strict=True):
        (line,) = [note for note in arm.notes if note.startswith("kernels: ")]
        assert line.startswith(f"kernels: {kernel} 14 (q_proj 2, ")
    assert report.environment["versions"]["torch"]
    written = {path.name for path in (tmp_path / "first").iterdir()}
    assert written >= {"report.json", "rows.csv", "speed.png", "memory.png", "report.html"}
    same = fastlora(
        "--compare", "first/report.json", "first/report.json", "--json", folder=tmp_path
    )
    assert json.loads(same)["regressed"] is False


def test_a_recipe_is_measured_with_its_own_rows(workplace: object) -> None:
    out = fastlora(
        str(workplace.recipe), "--steps", "6", "--lengths", "real", "--arms", "peft,peft+packing",
        "--json", folder=workplace.folder,
    )  # fmt: skip
    report = Report.model_validate_json(out)
    assert report.status == "passed", [arm.detail for arm in report.arms]
    padded, packed = report.arms
    assert padded.counted["digest"] == packed.counted["digest"]
    assert padded.counted["supervised_tokens"] == packed.counted["supervised_tokens"]
    assert padded.counted["padding_share"] > 0 == packed.counted["padding_share"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arms", "peft,unslot"], "no engine 'unslot'; known: peft, liger, unsloth"),
        (["--arms", "peft+graphs"], "peft has no option '+graphs'"),
        (["llama31-8"], "did you mean llama31-8b?"),
        (["nosuch"], "no suite or recipe of that name"),
        (["--vram-cap", "lots"], "write 24GiB"),
        (["--timeout", "nan"], "not a number of seconds"),
        (["--timeout", "0"], "not a number of seconds"),
        (["tiny", "--vram-cap", "8GiB"], "no CUDA GPU here"),
        (["tiny", "--frontier"], "no CUDA GPU here"),
        (["--compare", "no.json", "no.json"], "no.json"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], told: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "bench", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("runs/bench/*/*"))


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlora", "bench", "tiny", "--out", "cut"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "peft ..." in line:
            break
    time.sleep(1)
    (arm,) = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=60)
    arm.wait(timeout=10)


def test_a_signal_while_the_machine_is_asked_leaves_with_its_number(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlora", "bench", "tiny", "--out", "cut"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "cut/probe.log").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_and_its_process(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlora", "bench", "tiny", "--out", "cut"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "peft ..." in line:
            break
    time.sleep(1)
    (arm,) = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert not arm.is_running()
    report = Report.model_validate_json((tmp_path / "cut/report.json").read_text())
    assert report.status == "partial"
