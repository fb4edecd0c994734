"""`fastlora run` and `fastlora merge` where what was typed is wrong, odd, or cut short by a signal."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from fastlora.cli.main import cli
from fastlora.errors import RunDirError
from fastlora.recipe.load import load_recipe
from fastlora.rundir import report
from fastlora.train import session
from fastlora.train.session import Request, dry_run, train_run


def trained(workplace: object, *settings: str, width: int = 80) -> tuple[dict, str]:
    """A run in this process: its manifest, and what it said."""
    said = io.StringIO()
    request = Request(load_recipe(workplace.recipe, settings), str(workplace.recipe), settings)
    return train_run(request, Console(file=said, width=width)), said.getvalue()


def killed(number: int) -> None:
    os.kill(os.getpid(), number)


def test_paths_are_printed_as_they_are(workplace: object) -> None:
    """Not as rich's markup, not as emoji, and not wrapped: they are there to be copied."""
    place = workplace.folder / "runs" / "[" / "x]" / ":dog:"
    manifest, said = trained(workplace, f"output.dir={place}", "train.steps=1", width=30)
    assert manifest["status"] == "finished"
    assert f"run: {place}/1\n" in said
    assert "<strong>finished</strong>" in (place / "1" / "report.html").read_text()


def test_a_page_that_cannot_be_written_costs_no_run(
    workplace: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write_report", lambda _: 1 / 0)
    manifest, said = trained(workplace, "train.steps=1")
    assert manifest["status"] == "finished"
    assert "report.html could not be written (ZeroDivisionError: division by zero)" in said
    assert f"fastlora report {workplace.path()}\n" in said


def test_an_unusable_place_is_refused_before_the_data_are_read(
    workplace: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "prepare_data", lambda *_: pytest.fail("read"))
    with pytest.raises(RunDirError, match=r"a run cannot be made here: .*; set output\.dir"):
        trained(workplace, f"output.dir={workplace.recipe}/runs")


@pytest.mark.parametrize("epochs", [0.3, 1.05])
def test_a_dry_run_counts_steps_as_the_trainer_does(workplace: object, epochs: float) -> None:
    recipe = load_recipe(workplace.recipe, [f"train.epochs={epochs}"])
    counted = dry_run(Request(recipe, "x"), Console(quiet=True))["steps"]
    assert trained(workplace, f"train.epochs={epochs}")[0]["result"]["steps"] == counted


def test_exact_match_says_what_it_cannot_ask(workplace: object) -> None:
    base = ("train.steps=1", "eval.rows=5", 'eval.metrics=["exact_match"]')
    notes = "\n".join(trained(workplace, *base, "eval.max_new_tokens=2")[0]["notes"])
    assert "of 5 expected answers are longer than 2 tokens" in notes
    assert "set eval.max_new_tokens = " in notes
    manifest, _ = trained(workplace, *base, 'data.supervise="all"')
    assert "5 of 5 held-out rows are not asked" in "\n".join(manifest["notes"])
    assert "answers" not in manifest


def test_a_dry_run_does_not_resume(workplace: object) -> None:
    done = CliRunner().invoke(cli, ["run", str(workplace.recipe), "--dry-run", "--resume"])
    assert done.exit_code == 2
    assert "--dry-run and --resume" in done.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_dry_run(
    workplace: object, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(session, "load_tokenizer", lambda _: killed(number))
    done = CliRunner().invoke(cli, ["run", str(workplace.recipe), "--dry-run"])
    assert done.exit_code == 128 + number
    assert "Aborted!" not in done.output


def test_merge_of_an_unfinished_run_says_how_to_finish_it(workplace: object) -> None:
    run = workplace.path()
    run.mkdir(parents=True)
    (run / "manifest.json").write_text(
        json.dumps({"status": "interrupted", "resume_command": "fastlora run tiny --resume"})
    )
    done = CliRunner().invoke(cli, ["merge", str(run)])
    assert done.exit_code == 1
    assert "has not finished; go on with:\n  fastlora run tiny --resume" in done.output


def test_a_signal_ends_a_merge_and_its_process(workplace: object) -> None:
    trained(workplace, "train.steps=1")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (workplace.path() / f".merged.{dead.pid}").mkdir()
    for number in (signal.SIGTERM, signal.SIGINT):
        parent = subprocess.Popen(
            [sys.executable, "-m", "fastlora", "merge", str(workplace.path())],
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (children := psutil.Process(parent.pid).children()):
            time.sleep(0.05)
        parent.send_signal(number)
        _, err = parent.communicate(timeout=60)
        assert parent.returncode == 128 + number
        assert "Aborted!" not in err
        # It is told to end, and nobody waits for it: under load that takes a moment.
        assert not psutil.wait_procs(children, timeout=30)[1]
        assert not list(workplace.path().glob(".merged.*"))
