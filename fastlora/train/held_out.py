"""Held-out losses: of each source, of the base model before training, so that forgetting is seen, and where the curve
turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.recipe.curves import overfitting
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir
from fastlora.train.notes import Notes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers.trainer_utils import EvalLoopOutput

_BY_SOURCE = "eval_loss/"  # trackers show it as eval/loss/<source>


def evaluate_sources(
    parts: Mapping[str, Dataset], evaluate: Callable[[Dataset], EvalLoopOutput]
) -> EvalLoopOutput:
    """Each source's rows once, and the whole from them: `eval_loss` is the mean over rows, as it is for one source,
    in batches that hold the rows of one source alone."""
    outputs = {label: evaluate(part) for label, part in parts.items()}
    rows = sum(output.num_samples for output in outputs.values())
    first = next(iter(outputs.values()))
    total = sum(output.metrics["eval_loss"] * output.num_samples for output in outputs.values())
    losses = {_BY_SOURCE + label: one.metrics["eval_loss"] for label, one in outputs.items()}
    metrics = first.metrics | {"eval_loss": total / rows} | losses
    return first._replace(metrics=metrics, num_samples=rows)


def by_source(metrics: Mapping[str, float]) -> dict[str, float]:
    """Source -> loss, from what the trainer logs; empty where there is one source."""
    return {
        key.removeprefix(_BY_SOURCE): value
        for key, value in metrics.items()
        if key.startswith(_BY_SOURCE)
    }


def show(losses: Mapping[str, float]) -> str:
    parts = ", ".join(f"{label} {loss:.4f}" for label, loss in losses.items())
    return f" ({parts})" if parts else ""


class BaseLosses(TrainerCallback):
    """Where several sources have held-out rows, what the model's losses on them are before the first step."""

    def __init__(self, run: RunDir, announce: Callable[[str], None]) -> None:
        self.run, self.announce = run, announce
        self.trainer: Trainer  # build_trainer sets it
        self.wanted = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self.wanted or state.global_step or "eval_before" in self.run.manifest:
            return
        import torch

        with torch.random.fork_rng(devices=()):  # as evaluations do
            output = self.trainer.evaluation_loop(
                self.trainer.get_eval_dataloader(), "Evaluation", prediction_loss_only=True
            )
        self.trainer._metrics["eval"].clear()  # TRL's own, which would go into the next log
        loss, losses = output.metrics["eval_loss"], by_source(output.metrics)
        self.run.update(eval_before={"loss": loss, "by_source": losses})
        self.announce(f"held-out loss before training: {loss:.4f}{show(losses)}")


class CurveWatch(TrainerCallback):
    """Says once, during training, that the held-out loss has turned."""

    def __init__(self, run: RunDir, recipe: Recipe, notes: Notes) -> None:
        self.run, self.notes = run, notes
        ignored = {"all", "train.epochs"} & set(recipe.advice.ignore)
        # With early stopping the run ends by itself, and says so.
        self.told = bool(ignored or recipe.train.early_stopping_patience)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.told:
            return
        if found := overfitting(self.run.read_metrics()):
            self.told = True
            self.notes.say(
                f"advice: overfitting since step {found.began}: the held-out loss has risen from {found.lowest:.4f} to "
                f"{found.last:.4f} while the training loss fell. Ctrl-C keeps a checkpoint"
            )
