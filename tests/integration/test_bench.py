"""The harness on a CPU: what is right passes, each planted fault turns its gate red, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import bench_worker
import psutil
import pytest
import torch
from click.testing import CliRunner
from forked import Forked
from rich.console import Console

from fastlora.bench import processes
from fastlora.bench.processes import Failed, run_worker
from fastlora.bench.run import Bench, Request
from fastlora.bench.schema import Arm, ArmResult, Report
from fastlora.cli.main import cli

pytestmark = pytest.mark.slow

FAULTY = (sys.executable, bench_worker.__file__)
KNOWN = (sys.executable, str(Path(__file__).parents[1] / "support/bench_known.py"))


class ForkedWorker(Forked):
    """The worker's process, as run_worker starts, feeds and ends it."""

    def __init__(
        self, command: list[str], *, stderr: TextIO, env: dict[str, str], **_: object
    ) -> None:
        super().__init__(
            bench_worker.main, command[-2:], env=env, stderr=stderr.name, new_session=True
        )

    def __enter__(self) -> ForkedWorker:
        return self

    def __exit__(self, *_: object) -> None: ...

    def communicate(self, task: str, timeout: float) -> tuple[str, str]:  # type: ignore[override]
        self.start(task)
        return super().communicate(timeout)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without their 6 s of imports; test_the_command_measures_reports_and_compares has real ones."""
    monkeypatch.setenv("FAULTS", "{}")
    if not torch.cuda.is_available():
        names = {**vars(subprocess), "Popen": ForkedWorker}
        monkeypatch.setattr(processes, "subprocess", SimpleNamespace(**names))


def bench(
    folder: Path, monkeypatch: pytest.MonkeyPatch, faults: dict[str, str], **request: object
) -> tuple[Bench, dict[str, ArmResult]]:
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    monkeypatch.setenv("BENCH", str(os.getpid()))
    arms = [Arm.parse(name) for name in ("peft", *faults)]
    asked = Request(target="tiny", arms=arms, steps=6, **request)  # type: ignore[arg-type]
    running = Bench(asked, folder, Console(quiet=True), FAULTY)
    return running, {arm.arm: arm for arm in running.run().arms}


def red(arm: ArmResult) -> set[str]:
    return {gate.name for gate in arm.gates if not gate.passed}


@pytest.mark.usefixtures("forked")
def test_planted_faults_show_no_speed_and_dead_arms_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {
        "peft+offload": "gradient",
        "peft+batch1": "frozen",
        "peft+offload+batch1": "tokens",
        "peft+fastlora": "oom",
        "peft+fastlora+batch1": "kill",
        "peft+fastlora+offload": "deep",
    }
    _, arms = bench(tmp_path, monkeypatch, faults)
    assert arms["peft"].status == "ok", arms["peft"].detail
    assert red(arms["peft+offload"]) == {"parity"}
    assert "1 of 15 are wrong" in arms["peft+offload"].detail
    assert {"weights", "loss"} <= red(arms["peft+batch1"])
    assert "28 of 28 adapter tensors did not change" in arms["peft+batch1"].detail
    assert {"work", "parity", "depth"} <= red(arms["peft+offload+batch1"])
    for name in list(faults)[:3]:
        assert arms[name].status == "red"
        assert arms[name].tokens_per_s is None
        assert arms[name].mfu is None
    oom, killed = arms["peft+fastlora"], arms["peft+fastlora+batch1"]
    assert (oom.status, oom.tokens_per_s) == ("oom", None)
    assert oom.detail == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert killed.status == "failed"
    assert "SIGKILL" in killed.detail
    assert red(arms["peft+fastlora+offload"]) == {"depth"}  # past the layers that parity sees


@pytest.mark.usefixtures("forked")
def test_gradients_are_compared_on_as_many_rows_whatever_an_arms_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, arms = bench(tmp_path, monkeypatch, {"peft+fastlora+batch4": ""})
    own = arms["peft+fastlora+batch4"]
    assert own.status == "ok", own.detail
    assert {gate.name for gate in own.gates} >= {"work", "parity", "depth", "trajectory"}
    assert running.results["peft"]["digest"] == running.results[own.arm]["digest"]


def test_an_answer_counts_though_its_process_does_not_end(tmp_path: Path) -> None:
    script = 'import time; print(\'{"status": "ok", "fits": 7}\', flush=True); time.sleep(600)'
    answer = run_worker(
        "arm", "", log=tmp_path / "log", timeout_s=2, command=(sys.executable, "-c", script)
    )
    assert answer["fits"] == 7


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(Failed) as caught:
        run_worker(
            "arm", "", log=tmp_path / "log", timeout_s=2, command=(sys.executable, "-c", script)
        )
    assert caught.value.status == "timeout"
    assert caught.value.detail == "no answer within 2 s"


@pytest.mark.parametrize(
    ("end", "status"), [("time.sleep(600)", "timeout"), ("os._exit(7)", "failed")]
)
def test_what_a_process_said_before_its_end_is_kept(end: str, status: str, tmp_path: Path) -> None:
    script = f'import os, time; print(\'{{"status": "partial", "fits": 7}}\', flush=True); {end}'
    with pytest.raises(Failed) as caught:
        run_worker(
            "frontier",
            "",
            log=tmp_path / "log",
            timeout_s=2,
            command=(sys.executable, "-c", script),
        )
    assert (caught.value.status, caught.value.told["fits"]) == (status, 7)


def test_a_stranger_on_the_pipe_of_a_process_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server that a library started in a session of its own."""
    monkeypatch.setattr(processes, "_READ_S", 0.5)
    script = (
        'import subprocess, time; print(\'{"status": "partial", "fits": 7}\', flush=True);'
        "subprocess.Popen(['sleep', '20'], start_new_session=True); time.sleep(600)"
    )
    began = time.monotonic()
    with pytest.raises(Failed) as caught:
        run_worker(
            "frontier", "", log=tmp_path / "log", timeout_s=2, command=(sys.executable, "-c", script)
        )  # fmt: skip
    assert time.monotonic() - began < 15
    assert (caught.value.status, caught.value.told["fits"]) == ("timeout", 7)


@pytest.mark.usefixtures("forked")
def test_ctrl_c_leaves_a_partial_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, arms = bench(tmp_path, monkeypatch, {"peft+batch1": "interrupt", "peft+offload": ""})
    assert running.stopped is not None
    assert running.stopped.exit_code == 130
    assert arms["peft"].tokens_per_s is not None
    assert arms["peft+batch1"].status == arms["peft+offload"].status == "interrupted"


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
    assert all(0.1 < (arm.host_gib or 0) < 16 for arm in report.arms)
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


@pytest.mark.usefixtures("forked")
def test_a_recipe_is_measured_with_its_own_rows(
    workplace: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace.folder)
    done = CliRunner().invoke(cli, [
        "bench", str(workplace.recipe), "--steps", "6", "--lengths", "real", "--arms", "peft,peft+packing", "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    report = Report.model_validate_json(done.stdout)
    assert report.status == "passed", [arm.detail for arm in report.arms]
    padded, packed = report.arms
    assert padded.counted["digest"] == packed.counted["digest"]
    assert padded.counted["supervised_tokens"] == packed.counted["supervised_tokens"]
    assert padded.counted["padding_share"] > 0 == packed.counted["padding_share"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arms", "peft,unslot"], "no engine 'unslot'; known: peft, liger, unsloth"),
        (["--arms", ""], "no engine ''"),
        (["--arms", "peft+graphs"], "peft has no option '+graphs'"),
        (["llama31-8"], "did you mean llama31-8b?"),
        (["nosuch"], "no suite or recipe of that name"),
        (["--vram-cap", "lots"], "write 24GiB"),
        (["--timeout", "nan"], "not a number of seconds"),
        (["--timeout", "0"], "not a number of seconds"),
        (["tiny", "--vram-cap", "8GiB"], "no CUDA GPU here"),
        (["tiny", "--frontier"], "no CUDA GPU here"),
        (["--compare", "no.json", "no.json"], "no.json"),
        (
            ["tiny", "--compare", "no.json", "no.json", "--vram-cap", "8GiB", "--ledger", "--json"],
            "measures nothing; leave out [SUITE|RECIPE], --vram-cap, --ledger",
        ),
        (["tiny", "--arms", "peft+hostembed"], "+hostembed: there is no CUDA GPU here"),
        (["tiny", "--arms", "peft+batch3"], "4 rows, which micro-batches of 3 do not make"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["bench", *arguments])
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("runs/bench/*/*"))


def measuring(workplace: object) -> tuple[subprocess.Popen[str], psutil.Process]:
    """`fastlora bench`, and the process of the arm that it has begun to measure."""
    process = subprocess.Popen(
        [*KNOWN, "bench", str(workplace.recipe), "--out", "cut"],
        cwd=workplace.folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "peft ..." in line:
            break
    time.sleep(1)
    (arm,) = psutil.Process(process.pid).children(recursive=True)
    return process, arm


def test_a_worker_dies_with_its_parent(workplace: object) -> None:
    process, arm = measuring(workplace)
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
def test_a_signal_ends_the_command_and_its_process(
    workplace: object, number: signal.Signals
) -> None:
    process, arm = measuring(workplace)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert not arm.is_running()
    report = Report.model_validate_json((workplace.folder / "cut/report.json").read_text())
    assert report.status == "partial"
