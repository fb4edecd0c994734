"""The longest real micro-batch, tried before the first step: what would run out of memory after hours does so at once.

The longest rows of the data go forward and backward as in a step: by the trainer's own training_step, in smaller
forwards where they do not fit (train/oom.py). Meanwhile memory is held for the optimizer's state, which is made only in
the first step, and for the gradients that a step's later micro-batches find. Then all of it is taken back. The run
is, to the last bit, the run without a probe; on a GPU as far as kernels that are tuned or compiled for the first shape
they see do not round otherwise for another.

They do so twice: only the first backward makes what stays from then on, such as the workspace in which its thread's
products are computed (32 MiB on an H100 or H200), so that only the second forward comes to its loss as those of steps
do. The loss of ours takes the labelled tokens alone; where other rows have more of them, these are tried in between.

What is counted: the most that PyTorch reserves from the probe on, after what nobody held was given back, without the
CUDA context. Steps reserve some more: micro-batches of other lengths leave holes in the allocator's memory, which it
gives back where it would run out. The counters go on from there, so that the peak that a run reports is that of its
worst micro-batch, whether or not it came to it. With CUDA graphs the same padded rows are tried without, and then every
graph is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import send_to_device
from fastlora_kernels.layers.head import is_attached
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.engines.engaged import cap_as_asked
from fastlora.engines.memory import (
    GIB,
    forget_peak,
    free_memory,
    memory_now,
    peak_allocated_gib,
    peak_gib,
)
from fastlora.plan.predict import Prediction
from fastlora.plan.stored import states_bytes
from fastlora.train.callbacks import Metrics, TokenCounter
from fastlora.train.job import Job
from fastlora.train.oom import Continuation
from fastlora.train.planned import learn_from
from fastlora.train.shapes import cut, row_sizes

if TYPE_CHECKING:
    from typing import Any

    from datasets import Dataset

_OFF = 0.05
"""A prediction further off is said to be."""


def worth_it() -> bool:
    """On a CPU memory is the host's, and nothing counts it."""
    return torch.cuda.is_available()


@dataclass(frozen=True, slots=True)
class Figures:
    """What the longest micro-batch took."""

    step: int
    """The one that came next."""
    rows: int
    rows_in_forward: int
    tokens: int
    """Of the longest row; of packed ones all together."""
    optimizer_gib: float
    """State that the optimizer did not have yet."""
    peak_gib: float
    """Reserved by PyTorch, with that state, so that steps are to need as much."""
    peak_allocated_gib: float
    """Of it, held by tensors."""
    as_planned: bool
    """As many rows in a forward, and as much kept, as the recipe has it and the prediction was for."""
    seconds: float


class Probe(TrainerCallback):
    """Tries the longest micro-batch before the first step of training, also of a resumed one. It stands behind
    Continuation among the callbacks, to whose record of the step's beginning it goes back."""

    def __init__(
        self,
        job: Job,
        continuation: Continuation,
        counter: TokenCounter,
        metrics: Metrics,
        predicted: Prediction | None,
    ) -> None:
        self.job, self.continuation, self.counter = job, continuation, counter
        self.metrics, self.predicted = metrics, predicted
        self.figures: Figures | None = None
        self._asked = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raises DoesNotFit: not even one row fits. Interrupted: a signal came; no step is begun."""
        if self._asked or not worth_it():
            return
        self._asked = True
        signals, began = self.job.signals, time.perf_counter()
        signals.raise_pending()
        self.figures = self._probe(args, state, control, began)
        self._cap()
        self._tell(self.figures)
        self.metrics.leave_out(time.perf_counter() - began)
        signals.raise_pending()

    @contextmanager
    def remembered_if_cut_short(self) -> Iterator[None]:
        """A run that does not come to its end is not compared there: the next prediction learns from the probe."""
        try:
            yield
        except BaseException:
            figures = self.figures
            if self.predicted and figures and figures.as_planned:
                learn_from(self.predicted, figures.peak_gib, str(self.job.run.path))
            raise

    def _cap(self) -> None:
        """memory.vram beside the CUDA context as the micro-batch before has left it."""
        planned = self.predicted.memory.context if self.predicted else 0.0
        cap_as_asked(self.job.recipe, self.job.engine, planned)

    @property
    def _trainer(self) -> Trainer:
        return self.continuation.trainer

    @property
    def _gradients_stay(self) -> bool:
        """From one micro-batch to the next."""
        return self.job.recipe.train.accumulation_steps > 1 or self.continuation.static is not None

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self._trainer.model.parameters() if p.requires_grad]

    def _probe(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, began: float
    ) -> Figures:
        trainer, recipe, continuation = self._trainer, self.job.recipe, self.continuation
        data = trainer.train_dataset
        count = min(recipe.train.micro_batch, len(data))
        rows = [data[at] for at in longest(data, count)]
        batches = [self._batch(rows)] * 2
        if self._labels_weigh() and (places := most_labelled(data, count)):
            batches.insert(1, self._batch([data[at] for at in places]))
        free_memory()
        while True:
            known = self._ooms()
            with self._taken_back(args, state, control):
                forget_peak()
                held = self._hold_what_steps_do(args, state, control)
                for batch, items in batches:
                    self.job.signals.raise_pending()
                    self._cap()
                    if not self._gradients_stay:
                        trainer.model.zero_grad()
                    trainer.training_step(trainer.model_wrapped, batch, items)
                optimizer = self._optimizer_peak_gib()
                peak, allocated = (max(one(), optimizer) for one in (peak_gib, peak_allocated_gib))
                missing = sum(len(state) for state in held) / GIB
                held.clear()
            # The peak of one that ran out of memory is all that there was: once more, as steps will be.
            if self._ooms() == known:
                break
        peak = max(peak, self._record(rows, args, state, control))
        lengths = [len(row["input_ids"]) for row in rows]
        return Figures(
            step=continuation.step,
            rows=len(rows),
            rows_in_forward=min(len(rows), continuation.most_rows("step")),
            tokens=sum(lengths) if recipe.data.packing else max(lengths),
            optimizer_gib=round(missing, 3),
            peak_gib=round(peak, 3),
            peak_allocated_gib=round(allocated, 3),
            as_planned=len(rows) == recipe.train.micro_batch and not continuation.shrunk,
            seconds=round(time.perf_counter() - began, 2),
        )

    def _record(
        self,
        rows: list[dict[str, torch.Tensor]],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> float:
        """Every CUDA graph, before there is a step, and the most reserved meanwhile. All lengths are computed as usual
        before the first is recorded: then nothing else of their size is ever beside what the graphs hold."""
        static = self.continuation.static
        if static is None or static.graphs.why_not or self.continuation.shrunk:
            return 0.0
        batches = [self._batch(cut(rows, length)) for length in reversed(static.shapes.lengths)]
        known = self._ooms()
        free_memory()
        with self._taken_back(args, state, control, graphs=True), static.rehearsed():
            forget_peak()
            held = self._hold_what_steps_do(args, state, control)
            for batch, items in batches * (static.graphs.warm_ups + 1):
                self.job.signals.raise_pending()  # unsloth may compile in each: minutes, in all
                self._cap()
                self._trainer.training_step(self._trainer.model_wrapped, batch, items)
                if static.graphs.why_not or self._ooms() > known:
                    break
            peak = peak_gib()
            held.clear()
        if self._ooms() > known:  # what then was the peak is all that there was
            forget_peak()
            return 0.0
        return peak

    def _labels_weigh(self) -> bool:
        """Whether the loss takes the labelled tokens alone; with CUDA graphs, as many of them in every micro-batch."""
        return self.continuation.static is None and is_attached(self._trainer.model)

    def _batch(self, rows: list[dict[str, torch.Tensor]]) -> tuple[Any, Any]:
        """On the device, and its tokens counted, as the trainer's loop has it; unsloth counts in its own way."""
        trainer = self._trainer
        batch = send_to_device(trainer.data_collator(rows), trainer.args.device)
        _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        return batch, items

    def _ooms(self) -> int:
        return len(self.job.run.manifest.get("oom", []))

    @contextmanager
    def _taken_back(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        graphs: bool = False,
    ) -> Iterator[None]:
        """What is trained within it has not been. Where it raises the run ends, from the step before. `graphs`: what is
        recorded within it stays, else nothing is."""
        continuation, counter = self.continuation, self.counter
        static, longest_row = continuation.static, continuation.longest
        counted = counter.tokens, counter.supervised
        continuation.probing = True
        if static is not None:
            static.eager = not graphs
        try:
            yield
        finally:
            continuation.probing, continuation.longest = False, longest_row
            counter.tokens, counter.supervised = counted
            if static is not None:
                static.eager = False
        continuation.take_back(graphs=graphs)
        continuation.on_step_begin(args, state, control)

    def _hold_what_steps_do(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> list[torch.Tensor]:
        """Memory for state that the optimizer does not have yet (a resumed run's has it). And gradients, where a
        forward finds some.

        Raises what the allocator raises; it then ends as a run whose optimizer has no room for its state.
        """
        train, there = self.job.recipe.train, self._trainer.optimizer.state
        self.continuation.on_pre_optimizer_step(args, state, control)
        if self._gradients_stay:
            for parameter in self._trained():
                parameter.grad = torch.zeros_like(parameter)
        held = []
        for parameter in self._trained():
            if parameter not in there:
                size = states_bytes([parameter.numel()], train.optimizer)
                held.append(torch.empty(size, dtype=torch.uint8, device=parameter.device))
        self.continuation.on_optimizer_step(args, state, control)
        return held

    def _optimizer_peak_gib(self) -> float:
        """The largest moment where micro-batches are small: PyTorch's AdamW has a temporary as large as the gradients,
        which are there now; bitsandbytes works in place."""
        if self.job.recipe.train.optimizer != "adamw":
            return 0.0
        work = 4 * sum(parameter.numel() for parameter in self._trained()) / GIB
        return memory_now().get("allocated_gib", 0.0) + work

    def _tell(self, figures: Figures) -> None:
        """One line, and the manifest's plan.probe."""
        job, found, peak = self.job, self.predicted, figures.peak_gib
        many = "the longest row" if figures.rows == 1 else f"the {figures.rows} longest rows"
        said = f"probe: {many} (up to {figures.tokens:,} tokens) took {peak - figures.optimizer_gib:.2f} GiB"
        if figures.rows_in_forward < figures.rows:
            said += f", {figures.rows_in_forward} in a forward"
        if figures.optimizer_gib:
            said += f", {peak:.2f} with the optimizer's state"
        document = asdict(figures)
        budget, allowed = job.recipe.memory.vram_gib, memory_now().get("allowed_gib")
        if budget and allowed:
            # What of the budget PyTorch may not have is the context's (engines/memory.py).
            said += f"; {peak + budget - allowed:.2f} of {budget:.2f} GiB with the CUDA context"
        if found is not None:
            predicted = found.memory.reserved_gib
            document["predicted_gib"] = round(predicted, 3)
            said += f"; {predicted:.2f} were predicted"
            if figures.as_planned:
                error = predicted / peak - 1
                document["error"] = round(error, 4)
                said += f" ({error:+.1%})"
                if abs(error) > _OFF:
                    said += f", more than {_OFF:.0%} off: the next prediction on this GPU learns from it"
            else:
                said += f" for {found.setup.micro_batch} in a forward, as the recipe has it"
        if (static := self.continuation.static) is not None and static.graphs.recorded:
            said += f"; CUDA graphs: {static.graphs.recorded}"
        job.notes(said)
        job.run.update(plan=(found.document() if found else {}) | {"probe": document})


def longest(rows: Dataset, count: int) -> list[int]:
    """Places of the `count` rows that need the most memory together: the longest, of equally long ones those with more
    labels, for which a loss can need more.

    `rows`: as Prepared.train. Labels are read of as long ones alone.
    """
    tokens = _tokens(rows)
    candidates = np.flatnonzero(tokens >= np.partition(tokens, -count)[-count])
    _, labels = row_sizes(rows.select(candidates))
    order = np.lexsort((labels, tokens[candidates]))[::-1][:count]
    return [int(place) for place in candidates[order]]


def most_labelled(rows: Dataset, count: int) -> list[int]:
    """Places of the `count` rows with the most tokens and labels together, if they have more labels than the longest:
    for a loss that takes the labelled tokens alone. What it takes for a label is about what all layers keep of a token
    when they are computed again (8B: 128,256 and 32 x 4,096 numbers). Empty: they have not.
    """
    best, labels = row_sizes(rows.select(longest(rows, count)))
    # No row has more labels than tokens.
    candidates = np.flatnonzero(2 * _tokens(rows) >= (best + labels).min())
    tokens, more = row_sizes(rows.select(candidates))
    order = np.lexsort((tokens, tokens + more))[::-1][:count]
    return candidates[order].tolist() if more[order].sum() > labels.sum() else []


def _tokens(rows: Dataset) -> np.ndarray:
    """Of each row; only the lengths are read, which Arrow keeps beside what the rows hold."""
    column = rows.select_columns(["labels"]).with_format("arrow")[:].column("labels")
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks])
