"""What happens beside the training loop: logging, progress, checkpoints made whole, stopping."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.rundir.store import RunDir
from fastlora.train.stop import StopSignals


class TokenCounter:
    """Tokens and supervised tokens trained on. Counted on the device, so that counting never waits for it."""

    def __init__(self) -> None:
        self.tokens: torch.Tensor | int = 0
        self.supervised: torch.Tensor | int = 0

    def add(self, inputs: dict[str, torch.Tensor]) -> None:
        """`inputs`: one micro-batch; padding does not count."""
        mask = inputs.get("attention_mask")
        self.tokens = self.tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        self.supervised = self.supervised + (inputs["labels"][:, 1:] >= 0).sum()

    def read(self) -> tuple[int, int]:
        return int(self.tokens), int(self.supervised)


class Metrics(TrainerCallback):
    """metrics.jsonl, and the progress on stderr: a bar on a terminal, else a line per log."""

    def __init__(self, run: RunDir, counter: TokenCounter, console: Console) -> None:
        self.run, self.counter, self.console = run, counter, console
        earlier = [entry for entry in run.read_metrics() if "tokens" in entry]
        # A resumed run counts on from where its checkpoint was.
        self._tokens_before = (
            (earlier[-1]["tokens"], earlier[-1]["supervised_tokens"]) if earlier else (0, 0)
        )
        self._mark = self._step_end = 0.0
        self._paused = 0.0
        self._tokens_at_mark = 0
        self._progress: Progress | None = None
        self._last = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._mark = self._step_end = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=False,
            )
            self._task = self._progress.add_task(
                "train", total=state.max_steps, completed=state.global_step, note=""
            )
            self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step_end = time.perf_counter()
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def _resume_clock(self) -> None:
        """Evaluation and saving are not training: their time does not count in tokens/s."""
        now = time.perf_counter()
        self._paused += now - self._step_end
        self._step_end = now

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._resume_clock()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._resume_clock()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        entry: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        if "loss" in logs:
            tokens, supervised = self.counter.read()
            now = time.perf_counter()
            seconds = now - self._mark - self._paused
            entry |= {
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "lr": logs.get("learning_rate"),
                "tokens": self._tokens_before[0] + tokens,
                "supervised_tokens": self._tokens_before[1] + supervised,
                "tokens_per_s": round((tokens - self._tokens_at_mark) / max(seconds, 1e-9), 1),
            }
            if torch.cuda.is_available():
                entry["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
                entry["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
            self._mark = self._step_end = now
            self._paused, self._tokens_at_mark = 0.0, tokens
        elif "eval_loss" in logs:
            entry["eval_loss"] = logs["eval_loss"]
        else:
            return  # the trainer's closing summary
        self.run.append_metrics(entry)
        self._show(entry, state)

    def _show(self, entry: dict[str, Any], state: TrainerState) -> None:
        if "eval_loss" in entry:
            self.console.print(f"step {entry['step']}: held-out loss {entry['eval_loss']:.4f}")
            return
        note = f"loss {entry['loss']:.4f}  {entry['tokens_per_s']:,.0f} tok/s"
        if "peak_reserved_gib" in entry:
            note += f"  {entry['peak_reserved_gib']:.1f} GiB"
        if self._progress is not None:
            self._progress.update(self._task, note=note)
        # Not a terminal (a log file, CI): about forty lines a run, whatever its length.
        elif entry["step"] % max(1, state.max_steps // 40) == 0 or entry["step"] == state.max_steps:
            self.console.print(f"step {entry['step']}/{state.max_steps}  {note}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Checkpoints(TrainerCallback):
    """Marks a checkpoint complete when all of it is on the disk, and only then removes older ones."""

    def __init__(self, run: RunDir, keep: int, keep_best: bool) -> None:
        self.run, self.keep, self.keep_best = run, keep, keep_best

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The last step is evaluated and saved whatever the cadence; by epochs it is anyway.
        if state.global_step >= state.max_steps:
            control.should_evaluate |= args.eval_strategy == "steps"
            control.should_save |= args.save_strategy == "steps"

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
        if self.keep_best and (state.best_metric is None or loss < state.best_metric):
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.run.mark_complete(self.run.checkpoints / f"checkpoint-{state.global_step}")
        self.run.rotate(self.keep, state.best_global_step if self.keep_best else None)


class StopOnSignal(TrainerCallback):
    """Ends training, with a checkpoint, after the step in which a signal came."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.signals.pending is not None:
            control.should_save = control.should_training_stop = True


class StopOnNonFinite(TrainerCallback):
    """Ends training when the loss is NaN or infinite: every further step would be spent on rubbish."""

    def __init__(self) -> None:
        self.step: int | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs and not math.isfinite(logs["loss"]):
            self.step = state.global_step
            control.should_training_stop = True
            control.should_save = False


def best_checkpoint(run: RunDir, state: TrainerState) -> Path | None:
    """The complete checkpoint with the lowest held-out loss, if there was an evaluation."""
    return dict(run.complete_checkpoints()).get(state.best_global_step or -1)
