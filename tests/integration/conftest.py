from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# 64 rows of the cipher, 8 steps an epoch, two epochs; dropout on, so that resume must restore the
# random state as well as the order of the rows.
RECIPE = """
[model]
name = "{model}"
quantization = "none"
seq_len_tokens = 64
[lora]
rank = 4
dropout = 0.1
[data]
sources = ["rows.jsonl"]
eval_split = 16
[train]
epochs = 2
micro_batch = 4
effective_batch = 8
lr = 2e-3
optimizer = "adamw"
eval_every_steps = 4
save_every_steps = 4
keep_checkpoints = 9
[eval]
rows = 0
[output]
dir = "{folder}/runs"
"""


class Workplace:
    """A folder with a recipe and rows, and `fastlora` run in it as a user would."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        rows = (root / "recipes/tiny/cipher.jsonl").read_text().splitlines(keepends=True)[:80]
        (folder / "rows.jsonl").write_text("".join(rows))
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(RECIPE.format(model=root / "recipes/tiny/model", folder=folder))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fastlora", "run", str(self.recipe), *arguments]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def interrupt(self, how: str, step: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`fastlora run` hit at a step: see interrupt.py."""
        script = str(Path(__file__).parent / "interrupt.py")
        return subprocess.run(
            [sys.executable, script, how, str(step), "run", str(self.recipe), *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def run(self, *arguments: str, expect: int = 0, **environment: str) -> tuple[str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, err[-4000:]
        return out, err

    def path(self, number: int = 1) -> Path:
        return self.folder / "runs" / str(number)

    def manifest(self, number: int = 1) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path(number) / "manifest.json").read_text())
        return loaded

    def losses(self, number: int = 1) -> list[tuple[int, str, float]]:
        """(step, which, value), to the last bit, without what depends on the clock."""
        found = []
        for line in (self.path(number) / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            found += [
                (entry["step"], key, entry[key])
                for key in ("loss", "grad_norm", "tokens", "supervised_tokens", "eval_loss")
                if key in entry
            ]
        return found


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path, Path(__file__).parents[2])


@pytest.fixture(scope="session")
def make_workplace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Workplace]:
    return lambda: Workplace(tmp_path_factory.mktemp("work"), Path(__file__).parents[2])
