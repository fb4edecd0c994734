from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import interrupt
import pytest
import torch
from forked import Forked

from fastlora.cli.main import main as fastlora
from fastlora.rundir.store import RunDir

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

    def run(
        self, *arguments: str, expect: int = 0, new: bool = False, **environment: str
    ) -> tuple[str, str]:
        """`fastlora run`; `new` in a Python of its own, with its own hashes and imports."""
        return self._ended(
            fastlora, ["run", str(self.recipe), *arguments], expect, new, environment
        )

    def interrupt(
        self, how: str, step: int, *arguments: str, expect: int, new: bool = False
    ) -> str:
        """`fastlora run` hit at a step (see interrupt.py): what it said."""
        given = [how, str(step), "run", str(self.recipe), *arguments]
        return self._ended(interrupt.main, given, expect, new)[1]

    def _ended(
        self, main: Callable[[], object], arguments: list[str], expect: int, new: bool,
        environment: Mapping[str, str] = {},
    ) -> tuple[str, str]:  # fmt: skip
        env = {**os.environ, **environment}
        process: Forked | subprocess.Popen[str]
        if new or torch.cuda.is_available():
            what = ["-m", "fastlora"] if main is fastlora else [interrupt.__file__]
            process = subprocess.Popen(
                [sys.executable, *what, *arguments], cwd=self.folder, env=env,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        else:
            process = Forked(main, ["fastlora", *arguments], cwd=self.folder, env=env).start()
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, err[-4000:]
        return out, err

    def path(self, number: int = 1) -> Path:
        return self.folder / "runs" / str(number)

    def manifest(self, number: int = 1) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path(number) / "manifest.json").read_text())
        return loaded

    def opened(self, number: int = 1) -> RunDir:
        run = RunDir(self.path(number))
        run.manifest = self.manifest(number)
        return run

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


@pytest.fixture(scope="module")
def place(make_workplace: Callable[[], Workplace]) -> Any:
    """For runs in this process, of rows of very different lengths."""
    from place import Place  # it imports the trainer, which few of these tests need

    made = Place(make_workplace())
    made.lengthen_some_rows()
    return made


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two that wait for each other on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
