"""The parent's side of `fastlora bench`, with the processes' answers made up."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from fastlora.bench import run as bench_run
from fastlora.bench.processes import Failed
from fastlora.bench.run import Bench, Request
from fastlora.bench.schema import Arm, ArmResult, Report
from fastlora.cli.main import cli
from fastlora.errors import EngineError, UsageError
from fastlora.recipe.schema import ModelSection
from fastlora.train.stop import Interrupted, StopSignals

PROBED: dict[str, Any] = {"machine": {}, "driver": None, "ceilings": {}}
GPU: dict[str, Any] = {**PROBED, "machine": {"gpu": "a card", "gpu_gib": 24.0}}


@pytest.fixture
def told() -> io.StringIO:
    return io.StringIO()


def bench(
    folder: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch,
    probed: dict[str, Any] = PROBED, **request: Any,
) -> Bench:  # fmt: skip
    """One whose arms all succeed at once."""
    request = {"target": "tiny", **request}
    running = Bench(Request(**request), folder, Console(file=told, width=40))

    def measure(self: Bench, _: Path) -> None:
        for arm in self.plan.arms:
            self._arm(arm, {})

    def rows(arms: list[Arm], results: Any, failures: Any, **_: Any) -> list[ArmResult]:
        return [
            ArmResult(arm=arm.name, status="failed", detail=failures[arm.name].detail)
            if arm.name in failures
            else ArmResult(arm=arm.name, status="ok" if arm.name in results else "interrupted")
            for arm in arms
        ]

    monkeypatch.setattr(Bench, "_measure", measure)
    monkeypatch.setattr(
        Bench, "_worker", lambda self, kind, *_, **__: {"probe": probed}.get(kind, {})
    )
    monkeypatch.setattr(bench_run, "assess", rows)
    return running


def test_whatever_goes_wrong_with_an_arm_is_its_row(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = bench(tmp_path, told, monkeypatch)

    def worker(self: Bench, kind: str, task: str, name: str = "", **_: Any) -> dict[str, Any]:
        if name == "peft":
            raise KeyError("[/i]")
        return PROBED

    monkeypatch.setattr(Bench, "_worker", worker)
    first, second = running.run().arms
    assert (first.status, first.detail) == ("failed", "KeyError: '[/i]'")
    assert second.status == "ok"
    assert "peft: failed: KeyError: '[/i]'" in told.getvalue()


def test_names_are_no_markup_and_are_not_broken(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{'long/' * 20}q[/i]/:smile:"
    bench(tmp_path, told, monkeypatch)._say(text)
    assert told.getvalue() == f"bench: {text}\n"


def test_what_the_card_cannot_give_is_refused_and_what_disturbs_is_told(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no more than 24 GiB"):
        bench(tmp_path, told, monkeypatch, GPU, vram_cap_gib=25.0).run()
    bench(tmp_path, told, monkeypatch, {**GPU, "in_use_gib": 0.6}, vram_cap_gib=24.0).run()
    assert "in use" not in told.getvalue()
    bench(tmp_path, told, monkeypatch, {**GPU, "in_use_gib": 3.2}).run()
    assert "3.2 GiB of the GPU are in use" in told.getvalue()


@pytest.mark.parametrize(
    ("suite", "arm", "why"),
    [
        ("llama32-1b", "peft+hostembed", "stays where it is: it is the output layer's weight too"),
        ("llama31-8b", "unsloth+hostembed+dequantized+fastlora+record+offload", ""),
        ("llama31-8b-dora", "peft+fastlora+dequantized", "memory.keep_dequantized: DoRA's"),
        ("tiny", "peft+fastlora+dequantized", "only 4-bit weights are dequantized"),
        ("tiny", "peft-optimizer", r"^--arms peft-optimizer: -optimizer would change nothing"),
        ("tiny", "peft+batch2", "batch2 would change nothing: it is so without it"),
        ("llama31-8b", "peft+keep0", "keep0 would change nothing"),
        ("llama31-8b", "peft+keep4-checkpointing", "keep4 would change nothing: no layer is comp"),
        ("llama31-8b", "peft+batch4+offload-optimizer", ""),
    ],
)
def test_an_arm_that_would_not_be_what_its_name_says_is_refused_before_anything_is_loaded(
    suite: str, arm: str, why: str, tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    running = bench(tmp_path, told, monkeypatch, GPU, target=suite, arms=[Arm.parse(arm)])
    if not why:
        running.run()
        return
    with pytest.raises(UsageError, match=why):
        running.run()


@pytest.mark.parametrize(
    ("arms", "why"),
    [
        ("peft+fastlora+record", r"\+record would change nothing: there is no CUDA GPU here"),
        ("peft+budget", r"\+budget would change nothing: there is no CUDA GPU here"),
        ("peft-checkpointing", "-checkpointing would change nothing: it is so without it"),
        ("peft+keep1", "keep1 would change nothing: no layer is computed again"),
        ("peft,peft+offload,peft", "^--arms peft: it is named 2 times$"),
        ("peft+offload,peft+offload+keep1,peft+batch1", ""),
    ],
)
def test_what_a_cpu_does_not_have_is_refused_before_anything_is_loaded(
    arms: str, why: str, tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = [Arm.parse(arm) for arm in arms.split(",")]
    running = bench(tmp_path, told, monkeypatch, arms=parsed)
    if not why:
        running.run()
        return
    with pytest.raises(UsageError, match=why):
        running.run()


def test_a_suite_of_recorded_arms_says_where_they_cannot_be(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "ours.toml"
    suite.write_text('like = "llama32-1b"\narms = ["peft+fastlora+record"]\n')
    for machine, request in ((PROBED, {}), (GPU, {"lengths": "real"})):
        with pytest.raises(UsageError, match=r"^ours: all its arms are recorded .* with --arms$"):
            bench(tmp_path, told, monkeypatch, machine, target=str(suite), **request).run()
    running = bench(tmp_path, told, monkeypatch, GPU, target=str(suite), ledger=True)
    assert "peft+fastlora+record-optimizer" in [arm.arm for arm in running.run().arms]


def test_what_a_recipe_asks_for_in_vain_is_told(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.toml"
    (tmp_path / "d.jsonl").touch()
    recipe.write_text(
        '[model]\nname = "m"\n[data]\nsources = ["d.jsonl"]\npacking = true\n'
        '[train]\nchunked_loss = true\n[kernels]\nmode = "all"\n[output]\ndir = "o"\n'
    )
    report = bench(tmp_path, told, monkeypatch, target=str(recipe), lengths="real").run()
    assert [arm.arm for arm in report.arms] == ["peft+packing", "peft+fastlora+packing"]
    assert "train.chunked_loss is not used" in told.getvalue()
    assert "kernels: not used by the benchmark" in told.getvalue()
    assert "data.packing" not in told.getvalue()
    bench(tmp_path, told, monkeypatch, target=str(recipe), arms=[Arm.parse("peft")]).run()
    assert "data.packing: not in peft" in told.getvalue()


def test_a_signal_does_not_cut_the_report(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, kept = bench(tmp_path, told, monkeypatch), []

    def keep(report: Report) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        kept.append(report)

    report = running.run(keep)
    assert kept == [report]
    assert running.stopped is not None
    assert running.stopped.exit_code == 143


def test_hangup_is_a_stop_signal_unless_it_is_ignored() -> None:
    with pytest.raises(Interrupted) as caught, StopSignals():
        os.kill(os.getpid(), signal.SIGHUP)
    assert caught.value.exit_code == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_configuration_of_a_model_that_is_not_there() -> None:
    with pytest.raises(EngineError, match="/no/such cannot be loaded"):
        bench_run._config(ModelSection(name="/no/such"))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["bench", *arguments])


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (["nosuch"], "no suite or recipe", 2),
        (["tiny", "--arms", "nosuch"], "no engine", 2),
        (["tiny", "--vram-cap", "8GiB"], "no CUDA GPU here", 2),
        (["tiny", "--timeout", "nan"], "number of seconds", 2),
        (["tiny", "--timeout", "-5"], "number of seconds", 2),
        (["tiny", "--out", "/proc/out"], "with --out", 1),
        (["tiny", "--out", "old"], "holds a report already", 2),
    ],
)
def test_wrong_arguments_leave_nothing(
    arguments: list[str], told: str, code: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bench(tmp_path, io.StringIO(), monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/report.json").write_text("mine")
    done = invoke(*arguments)
    assert done.exit_code == code
    assert told in " ".join(done.stderr.split())
    assert (tmp_path / "old/report.json").read_text() == "mine"
    assert not list(tmp_path.glob("runs/bench/*/*"))


def test_json_is_all_there_is_on_stdout_even_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(tmp_path, io.StringIO(), monkeypatch)
    monkeypatch.chdir(tmp_path)
    quiet = Bench._measure

    def noisy(self: Bench, scratch: Path) -> None:
        print("a library's banner")
        quiet(self, scratch)

    monkeypatch.setattr(Bench, "_measure", noisy)
    done = invoke("tiny", "--json", "--out", "whole")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tiny"
    assert "a library's banner" in done.stderr
    assert (tmp_path / "whole/report.html").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastlora.bench.report.write", full)
    done = invoke("tiny", "--json", "--out", "full")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["name"] == "tiny"
    assert "full: the report cannot be written: " in done.stderr


def test_an_arm_that_would_not_be_what_its_name_says_is_refused(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*names: str) -> list[str]:
        arms = [Arm.parse(name) for name in names]
        running = bench(tmp_path, told, monkeypatch, GPU, arms=arms)
        running.machine = GPU
        return [arm.name for arm in running._plan().arms]

    fine = ["unsloth+offload+attention4", "unsloth+keep2+stream4", "peft+attention4"]
    assert planned(*fine) == fine
    with pytest.raises(
        UsageError, match=r"(?s)^--arms unsloth\+attention4: .*\n--arms unsloth\+stream4-ch"
    ):
        planned("peft", "unsloth+attention4", "unsloth+stream4-checkpointing")


def test_what_is_recorded_is_measured_where_it_can_be(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(machine: dict[str, Any], **request: Any) -> list[str]:
        running = bench(tmp_path, told, monkeypatch, machine, target="llama32-1b", **request)
        running.machine = machine
        return [arm.name for arm in running._plan().arms]

    ours = ["unsloth+fastlora+offload+record-kernels", "unsloth+fastlora+record+budget-kernels"]
    eager = ["peft", "liger", "unsloth"]
    assert names(GPU) == eager + ours
    assert names(PROBED) == eager
    assert names(GPU, lengths="real") == eager + [f"{name}+packing" for name in eager]
    asked = [Arm.parse(ours[0])]
    assert names(GPU, arms=asked) == ours[:1]
    assert "unsloth-loss" in names(GPU, ledger=True)  # of what is not recorded
    assert "unsloth-loss" not in names(GPU, arms=asked, ledger=True)


def test_an_arm_without_a_frontier_is_refused_or_of_a_suite_left_out(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "peft+batch1", "peft+fastlora+record", "unsloth+budget", "unsloth+packing"
    arms = [Arm.parse(name) for name in ("peft", *names)]
    with pytest.raises(UsageError) as refused:
        bench(tmp_path, told, monkeypatch, GPU, arms=arms, frontier=True).run()
    lines = str(refused.value).splitlines()
    assert [line.split(" has none")[0] for line in lines] == [f"--frontier: {one}" for one in names]
    running = bench(tmp_path, told, monkeypatch, GPU, target="llama32-1b", frontier=True)
    running.run()
    for arm in running.plan.arms[3:]:
        running._frontier(arm, {})
    assert running.frontiers == []
    suite = tmp_path / "packs.toml"
    suite.write_text('like = "llama32-1b"\narms = ["peft+packing"]\n')
    with pytest.raises(UsageError, match=r"^--frontier: no arm has one: its rows are full"):
        bench(tmp_path, told, monkeypatch, GPU, target=str(suite), frontier=True).run()
    assert " ".join(told.getvalue().split()).count(": no frontier: a size is tried twice") == 2


def test_an_arm_whose_frontier_fails_has_its_rows(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = bench(tmp_path, told, monkeypatch, GPU)
    running.machine = GPU
    running.plan = running._plan()
    fitted = {"fits": 3, "fails": 4, "tokens_per_s": 1.0, "peak_reserved_gib": 2.0}

    def worker(self: Bench, kind: str, task: str, name: str = "", **_: Any) -> dict[str, Any]:
        limits = json.loads(task)["limits"]
        assert limits["seq_len_tokens"] == 512
        if name == "peft":
            raise Failed("timeout", "no answer", {"status": "partial", "seq_len_tokens": fitted})
        return {"status": "ok", **dict.fromkeys(limits, fitted)}

    monkeypatch.setattr(Bench, "_worker", worker)
    monkeypatch.setattr(
        bench_run, "_config", lambda _: SimpleNamespace(max_position_embeddings=512)
    )
    for name in ("peft", "unsloth"):
        running._frontier(Arm.parse(name), {})
    rows = [(row.arm, row.axis, row.fits, row.detail) for row in running.frontiers]
    assert rows == [
        ("peft", "seq_len_tokens", 3, ""),  # was found before
        ("peft", "micro_batch", 0, "timeout: no answer"),
        ("unsloth", "seq_len_tokens", 3, ""),
        ("unsloth", "micro_batch", 3, ""),
    ]
