"""TensorBoard and Weights & Biases, where output.report_to asks for them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastlora.engines.base import Announce
from fastlora.errors import EngineError
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir

if TYPE_CHECKING:
    from transformers import TrainerCallback


def tracker_problems(recipe: Recipe) -> Iterator[str]:
    """A line for each tracker that could not be used, each with its remedy. W&B may ask for a key here, on a
    terminal: before the model is loaded, and not after."""
    for tracker in dict.fromkeys(recipe.output.report_to):
        # Without an origin it is no module: wandb leaves a folder of its name where it ran.
        found = find_spec(tracker)
        if found is None or found.origin is None:
            yield f"output.report_to: {tracker} is not installed; pip install {tracker}, or leave it out"
        elif tracker == "wandb" and (why := _no_account()):
            yield (
                f"output.report_to: wandb cannot be used ({why}); log in with `wandb login`, or set "
                "WANDB_MODE=offline to keep its files in the run's folder"
            )


def _no_account() -> str:
    """Why W&B could not send anything; nothing if it can, or need not."""
    try:
        import wandb

        if wandb.setup().settings.mode == "online":
            wandb.login()
    except Exception as error:  # its own types, and whatever a broken installation raises
        return f"{type(error).__name__}: {error}".rstrip(".")
    return ""


class Trackers:
    """The trackers of one run. A resumed run goes on in the curves that it began."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        """Raises EngineError: a tracker cannot start."""
        self.callbacks: list[TrainerCallback] = []
        self._wandb: Any = None
        for tracker in dict.fromkeys(recipe.output.report_to):
            try:
                start = self._tensorboard if tracker == "tensorboard" else self._weights_and_biases
                self.callbacks.append(start(recipe, run))
            except Exception as error:  # theirs have no common type
                raise EngineError(
                    f"output.report_to: {tracker} cannot start ({type(error).__name__}: {error}); mend that, or leave "
                    "it out with --set output.report_to=[]"
                ) from error

    def _tensorboard(self, recipe: Recipe, run: RunDir) -> TrainerCallback:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(run.path / "tensorboard")
        done = [step for step, _ in run.complete_checkpoints()]
        # What was logged after the checkpoint is logged again.
        writer = SummaryWriter(folder, purge_step=done[-1] + 1 if done else None)
        return TensorBoardCallback(writer)

    def _weights_and_biases(self, recipe: Recipe, run: RunDir) -> TrainerCallback:
        import wandb
        from transformers.integrations import WandbCallback

        if "wandb_id" not in run.manifest:
            run.update(wandb_id=uuid.uuid4().hex[:12])
        # The callback takes the run that is open; its own would be named huggingface and lie where the user is.
        self._wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastlora"),
            name=os.environ.get("WANDB_NAME") or "/".join(run.path.absolute().parts[-2:]),
            id=os.environ.get("WANDB_RUN_ID") or run.manifest["wandb_id"],
            dir=os.environ.get("WANDB_DIR") or str(run.path),
            resume="allow",
            config={"recipe": recipe.model_dump(mode="json")},
        )
        return WandbCallback()

    def close(self, announce: Announce) -> None:
        """Whether training ended or was cut short: what was logged reaches the disk or the service."""
        closing = [
            writer.close
            for callback in self.callbacks
            if (writer := getattr(callback, "tb_writer", None)) is not None
        ]
        if self._wandb is not None:
            closing.append(self._wandb.finish)
        for close in closing:
            try:
                close()
            except Exception as error:  # no reason to lose the training
                announce(
                    f"output.report_to: not all was reported ({type(error).__name__}: {error})"
                )
