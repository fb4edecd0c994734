"""`python interrupt.py HOW STEP RUN_ARGUMENTS`: fastlora, hit at a chosen step.

HOW: SIGINT or SIGTERM in the middle of the step; `twice` for two signals; `kill-save` for SIGKILL in the
middle of writing the checkpoint of that step; `full-save` for a disk that is full when it is written.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    how, at, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    from transformers import Trainer

    if how in ("kill-save", "full-save"):
        original_save = Trainer._save_optimizer_and_scheduler

        def save(self: Any, output_dir: str) -> None:
            if self.state.global_step != at:
                original_save(self, output_dir)
                return
            # The adapter is on the disk; the optimizer is half written.
            (Path(output_dir) / "optimizer.pt").write_bytes(b"half")
            if how == "kill-save":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(
                "PytorchStreamWriter failed writing file: file write failed"
            ) from OSError(28, "No space left on device")

        Trainer._save_optimizer_and_scheduler = save
    else:
        original_step, hit = Trainer.training_step, []

        def step(self: Any, *rest: Any, **named: Any) -> Any:
            if self.state.global_step == at - 1 and not hit:  # a step has several micro-batches
                hit.append(at)
                os.kill(os.getpid(), signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
                if how == "twice":
                    os.kill(os.getpid(), signal.SIGINT)
            return original_step(self, *rest, **named)

        Trainer.training_step = step
    from fastlora.cli.main import main as fastlora

    sys.argv = ["fastlora", *arguments]
    fastlora()


if __name__ == "__main__":
    main()
