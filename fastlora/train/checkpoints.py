"""When training evaluates, saves and ends; and what a resumed run takes up from a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.errors import EngineError
from fastlora.recipe.schema import TrainSection
from fastlora.rundir.store import RunDir, write_atomic
from fastlora.train.callbacks import TokenCounter
from fastlora.train.stop import StopSignals

_OURS = "fastlora"  # our part of the trainer's state, in trainer_state.json


class Checkpoints(TrainerCallback):
    """Ends training early and on signals, saves what a resume needs, and takes it up again.

    A signal ends training after the step in hand, or in the middle of an evaluation. What is saved then
    is the state before the evaluation that was due; the resumed run owes that and begins with it.
    """

    def __init__(
        self, run: RunDir, recipe: TrainSection, counter: TokenCounter, signals: StopSignals
    ) -> None:
        self.run, self.recipe, self.counter, self.signals = run, recipe, counter, signals
        self.trainer: Trainer  # build_trainer sets it
        self.finished = False
        self.owes_evaluation = False
        self.worse = 0  # evaluations in a row without a lower loss

    def newest(self) -> Path | None:
        complete = self.run.complete_checkpoints()
        return complete[-1][1] if complete else None

    def best(self) -> Path | None:
        """The checkpoint with the lowest held-out loss, if there was an evaluation."""
        step = self.trainer.state.best_global_step
        return dict(self.run.complete_checkpoints()).get(step or -1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        trainer, ours = self.trainer, state.stateful_callbacks.get(_OURS)
        self.run.rewind_metrics(state.global_step, bool(ours and ours["owes_evaluation"]))
        if ours is None:
            return  # a new run
        self.counter.tokens, self.counter.supervised = ours["tokens"], ours["supervised_tokens"]
        # The next logged loss is the mean over the steps since the last one, as without the interrupt.
        trainer._tr_loss += ours["unlogged_loss"]
        trainer._globalstep_last_logged = ours["logged_step"]
        self.worse, self.finished = ours["worse"], ours["finished"]
        if ours["owes_evaluation"]:
            # The checkpoint may be written again after it, and the trainer loads the random state later.
            trainer._load_rng_state(str(self.newest()))
            self.owes_evaluation = control.should_evaluate = True
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss, None, trainer.model, None, state.epoch, None, 0.0
            )
        control.should_training_stop = self.finished

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The last step is evaluated and saved whatever the cadence; by epochs it is anyway.
        self.finished = state.global_step >= state.max_steps
        control.should_evaluate |= self.finished and args.eval_strategy == "steps"
        control.should_save |= self.finished and args.save_strategy == "steps"
        # An evaluation by epochs comes in on_epoch_end, after this step's checkpoint.
        self.owes_evaluation = control.should_evaluate or (
            args.eval_strategy == "epoch" and (self.finished or state.epoch.is_integer())
        )
        # Training can end only here. A loss that is not finite is found then, without asking at each step.
        control.should_log |= self.finished or self.owes_evaluation
        if self.signals.pending is not None:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # It comes too when training stops in the middle of an epoch, where no evaluation is due.
        control.should_evaluate &= self.owes_evaluation
        if self.signals.pending is not None:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.signals.raise_pending()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        # Called before the trainer takes note of a new best, so the comparison is with the old one.
        loss = (metrics or {}).get("eval_loss", math.nan)
        better = state.best_metric is None or loss < state.best_metric
        self.owes_evaluation = False
        self.worse = 0 if better else self.worse + 1
        if (
            self.recipe.early_stopping_patience
            and self.worse >= self.recipe.early_stopping_patience
        ):
            self.finished = control.should_training_stop = control.should_save = True
        control.should_save |= self.recipe.keep_best and better

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._check_finite((logs or {}).get("loss", 0.0), state.global_step)

    def save(self, write: Callable[[], None]) -> None:
        """Save the step in hand by `write`, which is the trainer's own; mark it complete when all of it
        is on the disk; only then remove older ones.

        Raises EngineError: the loss is not finite; such a state is not worth resuming.
        """
        trainer, state = self.trainer, self.trainer.state
        unlogged = float(trainer._tr_loss)
        self._check_finite(unlogged, state.global_step)
        tokens, supervised = self.counter.read()
        state.stateful_callbacks[_OURS] = {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "unlogged_loss": unlogged,
            "logged_step": trainer._globalstep_last_logged,
            "worse": self.worse,
            "finished": self.finished,
            "owes_evaluation": self.owes_evaluation,
        }
        folder = self.run.checkpoints / f"checkpoint-{state.global_step}"
        if folder in dict(self.run.complete_checkpoints()).values():
            # An evaluation since has changed the trainer's state alone.
            write_atomic(folder / "trainer_state.json", json.dumps(asdict(state), indent=2) + "\n")
        else:
            write()
            self.run.mark_complete(folder)
        self.run.rotate(
            self.recipe.keep_checkpoints, state.best_global_step if self.recipe.keep_best else None
        )

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise EngineError(
                f"the loss is not finite at step {step}: lower train.lr ({self.recipe.lr:g}), raise "
                'train.warmup_fraction, or set model.dtype = "bfloat16" if it is float16'
            )
