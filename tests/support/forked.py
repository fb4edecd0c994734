"""Processes that begin where the imports end: torch, transformers and trl cost each new Python 6 s of CPU.

They are forked from a server that has imported them and done nothing else. Otherwise they are as any: a
command line, an environment, files, signals, an exit code. A GPU's libraries do not survive a fork, and
unsloth must come before transformers: there, start new ones.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

IMPORTED = [
    "trl", "peft", "bitsandbytes", "accelerate", "datasets", "matplotlib.pyplot", "rich.console",
    "transformers.models.llama.modeling_llama", "fastlora.cli.run", "fastlora.bench.arm", "fastlora.check.look",
    "fastlora.train.session", "fastlora.train.trainer", "fastlora.rundir.report", "fastlora.export.process",
]  # fmt: skip
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(IMPORTED)


def _run(main: Callable[[], Any], arguments: Sequence[str], streams: Path, cwd: str | Path,
         environment: Mapping[str, str], new_session: bool) -> None:  # fmt: skip
    if new_session:
        os.setsid()
    for number, (name, flags) in enumerate(
        (("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))
    ):
        file = os.open(streams / name, flags | (os.O_APPEND if number else 0))
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(arguments)
    sys.exit(main())


class Forked:
    """What the tests use of subprocess.Popen, for `main` of an importable module."""

    def __init__(
        self, main: Callable[[], Any], arguments: Sequence[str], *, cwd: str | Path = ".",
        env: Mapping[str, str] = os.environ, stderr: str | Path | None = None, new_session: bool = False,
    ) -> None:  # fmt: skip
        self.arguments = arguments
        self._streams = Path(tempfile.mkdtemp(prefix="forked-"))
        for name in ("in", "out"):
            (self._streams / name).touch()
        if stderr is None:
            (self._streams / "err").touch()
        else:
            (self._streams / "err").symlink_to(Path(stderr).absolute())
        given = (main, arguments, self._streams, Path(cwd).absolute(), dict(env), new_session)
        self._process = _processes.Process(target=_run, args=given)

    def start(self, text: str = "") -> Forked:
        (self._streams / "in").write_text(text)
        with chdir("/"):  # where the server looks for modules: not in a folder of ours
            forkserver.ensure_running()
        self._process.start()
        return self

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(list(self.arguments), timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            raise
        out, err = ((self._streams / name).read_text(errors="replace") for name in ("out", "err"))
        shutil.rmtree(self._streams)
        return out, err
