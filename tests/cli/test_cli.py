from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastlora.cli.main import COMMANDS, cli
from fastlora.recipe import library
from fastlora.recipe.load import load_recipe
from fastlora.train.stop import Interrupted

HEAVY = ("torch", "transformers", "pydantic", "datasets", "rich", "matplotlib", "pandas")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["recipes", "tiny"],
        ["run", "--help"],
        ["plan", "--help"],
        ["--version"],
    ],
)
def test_answers_at_once_and_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
        f"sys.argv = ['fastlora', *{arguments!r}]\n"
        "from fastlora.cli.main import main\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment
    )  # writes the .pyc files
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert done.stderr.strip().splitlines()[-1] == "[]"
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0
    assert done.output.startswith("Usage: ")
    assert name in CliRunner().invoke(cli, ["--help"]).output


def test_recipes_lists_and_shows() -> None:
    listed = CliRunner().invoke(cli, ["recipes"])
    assert "llama31-70b" in listed.output
    assert "Llama 3.1 8B" in listed.output
    shown = CliRunner().invoke(cli, ["recipes", "llama31"]).output
    assert shown.startswith("# Llama 3.1 8B")
    assert "[train]" in shown
    document = json.loads(CliRunner().invoke(cli, ["recipes", "--json"]).output)
    assert {entry["name"] for entry in document} >= {"tiny", "qwen3"}


def test_a_recipe_saved_elsewhere_finds_its_model_and_data(tmp_path: Path) -> None:
    saved = tmp_path / "mine.toml"
    saved.write_text(CliRunner().invoke(cli, ["recipes", "tiny"]).output)
    recipe, bundled = load_recipe(saved), load_recipe(library.find("tiny"))
    assert Path(recipe.model.name).samefile(bundled.model.name)
    assert Path(recipe.data.sources[0].path).samefile(bundled.data.sources[0].path)
    assert recipe.output == bundled.output


def test_ctrl_c_before_a_run_has_begun_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr("fastlora.cli.run._run", interrupted)
    stopped = CliRunner().invoke(cli, ["run", "tiny"])
    assert stopped.exit_code == 130
    assert "stopped by SIGINT before the first step" in stopped.stderr


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    runner = CliRunner()
    unknown = runner.invoke(cli, ["run", "lama31"])
    assert unknown.exit_code == 2
    assert "did you mean llama31?" in unknown.output
    path = tmp_path / "bad.toml"
    path.write_text('[model]\nnmae = "x"\n[train]\nlr = "high"\n')
    bad = runner.invoke(cli, ["run", str(path)])
    assert bad.exit_code == 2
    for line in (
        "bad.toml: model.nmae: unknown key; did you mean model.name?",
        "bad.toml: model.name: missing",
        "bad.toml: train.lr: input should be a valid number, got 'high'",
        "bad.toml: data: missing",
    ):
        assert line in bad.output
    assert "Traceback" not in bad.output
    assert runner.invoke(cli, ["run"]).exit_code == 2
    data = tmp_path / "rows.jsonl"
    data.touch()
    assert "not a recipe, which is a .toml file" in runner.invoke(cli, ["run", str(data)]).output
    mistyped = runner.invoke(cli, ["rnu"])
    assert (mistyped.exit_code, "Did you mean 'run'?" in mistyped.output) == (2, True)
    for arguments in (["merge"], ["export", "--format", "gguf"], ["report"], ["chat"]):
        assert runner.invoke(cli, [*arguments, str(tmp_path)]).exit_code == 1
        nowhere = runner.invoke(cli, [*arguments, str(tmp_path / "nowhere")])
        assert (nowhere.exit_code, "no folder of a run" in nowhere.output) == (2, True)


def test_a_missing_model_is_named_before_anything_is_made(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'engine = "peft"\n[model]\nname = "no-org/no-model"\n[data]\nsources = ["x.jsonl"]\n'
        f'[output]\ndir = "{tmp_path}/runs"\n'
    )
    done = CliRunner().invoke(cli, ["run", str(path)])
    assert done.exit_code == 1
    assert "model.name: no-org/no-model cannot be loaded" in done.output
    assert not (tmp_path / "runs").exists()
