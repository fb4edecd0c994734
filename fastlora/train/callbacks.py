"""What a run logs while it trains: metrics.jsonl and the progress on stderr."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.engines.memory import forget_peak
from fastlora.rundir.store import RunDir
from fastlora.train.held_out import by_source, show


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
        self._mark = self._step_end = 0.0
        self._paused = 0.0
        self._tokens_at_mark = 0
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._mark = self._step_end = time.perf_counter()
        self._paused, self._tokens_at_mark = 0.0, self.counter.read()[0]
        forget_peak()
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

    def leave_out(self, seconds: float) -> None:
        """Of the time that tokens/s is taken over: nothing was trained in it."""
        self._paused += seconds

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
        logs = {} if logs is None else logs
        entry: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        if "loss" in logs:
            tokens, supervised = self.counter.read()
            now = time.perf_counter()
            seconds = now - self._mark - self._paused
            entry |= {
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "lr": logs.get("learning_rate"),
                "tokens": tokens,
                "supervised_tokens": supervised,
                "tokens_per_s": round((tokens - self._tokens_at_mark) / max(seconds, 1e-9), 1),
            }
            if torch.cuda.is_available():
                entry["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
                entry["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
            self._mark = self._step_end = now
            self._paused, self._tokens_at_mark = 0.0, tokens
        elif "eval_loss" in logs:
            entry["eval_loss"] = logs["eval_loss"]
            if losses := by_source(logs):
                entry["eval_loss_by_source"] = losses
        else:
            return  # the trainer's closing summary
        # The trackers come after this one, and show what it measured as well.
        measured = (
            "tokens",
            "supervised_tokens",
            "tokens_per_s",
            "peak_allocated_gib",
            "peak_reserved_gib",
        )
        logs |= {key: entry[key] for key in measured if key in entry}
        self.run.append_metrics(entry)
        self._show(entry, state)

    def _show(self, entry: dict[str, Any], state: TrainerState) -> None:
        if "eval_loss" in entry:
            sources = show(entry.get("eval_loss_by_source", {}))
            line = f"step {entry['step']}: held-out loss {entry['eval_loss']:.4f}{sources}"
            self.console.print(line, markup=False, emoji=False, soft_wrap=True)
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
