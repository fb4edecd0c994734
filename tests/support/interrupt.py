"""`python interrupt.py HOW STEP RUN_ARGUMENTS`: fastlora, hit at a chosen step.

HOW: SIGINT or SIGTERM in the middle of the step; `twice` for two signals; `kill-save` for SIGKILL in the
middle of writing the checkpoint of that step; `full-save` for a disk that is full when it is written;
`evaluation` for SIGINT in the middle of the evaluation after it. STEP does not matter to `answers`, SIGINT in
the answers after training, and `finaliser`, SIGTERM in a `__del__` before the merge.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
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
    elif how == "evaluation":
        from transformers.trainer_callback import CallbackHandler

        original_prediction = CallbackHandler.on_prediction_step

        def predicted(self: Any, args: Any, state: Any, control: Any) -> Any:
            if state.global_step == at:
                os.kill(os.getpid(), signal.SIGINT)
            return original_prediction(self, args, state, control)

        CallbackHandler.on_prediction_step = predicted
    elif how == "answers":
        from fastlora.train import answers

        original_answered, calls = answers.answered, []

        def answered(*rest: Any, **named: Any) -> Any:
            calls.append(how)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return original_answered(*rest, **named)

        answers.answered = answered
    elif how == "finaliser":
        from fastlora.train import session

        class Last:
            def __del__(self) -> None:
                os.kill(os.getpid(), signal.SIGTERM)

        def collect() -> None:
            Last()

        session.gc = SimpleNamespace(collect=collect)
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
