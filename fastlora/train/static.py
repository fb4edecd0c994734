"""memory.cuda_graphs in a run: micro-batches padded to static shapes, whose forward and backward are replayed.

Whatever is not recorded (the first of a shape, packed rows that are too many) is computed on the same padded shapes, so
that a resumed run, which has other first ones, is the run that was not interrupted. More labels than a shape provides
for are taken in turns: the micro-batch's loss is a sum over them. What the optimizer does, clipping, the schedule and
evaluations are as without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from fastlora_kernels.layers.head import is_attached
from fastlora_kernels.recompute import BEFORE, decoder_layers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.engines.base import CUMULATIVE_LENGTHS, Engine
from fastlora.engines.kept import dense_as_asked
from fastlora.engines.unsloth import streamed_layers
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir
from fastlora.train import graphs
from fastlora.train.causal import rows_as_they_are
from fastlora.train.graphs import Graphs
from fastlora.train.notes import Notes
from fastlora.train.shapes import Shapes, choose_shapes, pad, some_labels

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    Step = Callable[[dict[str, Any]], torch.Tensor]


def why_not(model: PeftModel, engine: Engine, *, own_loss: bool, packing: bool) -> str:
    """What of a run cannot be recorded, as far as it can be known before its first step; "" if nothing is known of."""
    unsloth = engine.name == "unsloth"
    if not own_loss:
        return (
            "unsloth's loss asks the GPU which tokens have a label, and waits for it"
            if unsloth
            else "TRL's loss reads entropy and accuracy of each micro-batch from the GPU"
        )
    if unsloth and packing and not engine.longest_packed:
        return "unsloth reads the lengths of packed rows from the GPU"
    if streamed_layers(model):
        return "memory.stream_layers waits for copies from host memory"
    # Of what stands around its layers unsloth sets the flag too, where nothing asks for it.
    checkpointed = decoder_layers(model) or model.modules()
    if any(
        getattr(m, "gradient_checkpointing", False) and BEFORE not in vars(m) for m in checkpointed
    ):
        return (
            'unsloth\'s checkpointing waits for its copies; train.checkpointing = "offload" does not'
            if unsloth
            else "transformers' own checkpointing reads the random state of the GPU in each layer"
        )
    if drawn := _draws(model):
        return f"{drawn}: random numbers that are not known to be the same when it is resumed"
    return ""


def _draws(model: PeftModel) -> str:
    """What draws random numbers in training."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            return f"dropout of {module.p} in {name}"
    for name in ("attention_dropout", "attn_pdrop"):
        if value := getattr(model.config, name, 0):
            return f"{name} of {value} in the model's configuration"
    return ""


class StaticSteps(TrainerCallback):
    """Forward and backward of a run's micro-batches."""

    def __init__(
        self,
        recipe: Recipe,
        model: PeftModel,
        engine: Engine,
        rows: Dataset,
        run: RunDir,
        notes: Notes,
        pad_token_id: int,
    ) -> None:
        """`rows`: all that are trained on. A run that is resumed keeps its shapes, and stays without graphs if it went
        on without them."""
        self.model, self.engine, self.pad_token_id = model, engine, pad_token_id
        self.run, self.notes = run, notes
        self.trained = [p for p in model.parameters() if p.requires_grad]
        dense = dense_as_asked(model, recipe, notes)
        self.graphs = Graphs(graphs.CudaRecorder(), self.trained, weights=dense)
        self.count_labels = is_attached(model)
        self.eager = False
        """While it is set, nothing is recorded, replayed or counted; the shapes are the same."""
        self._most_rows = min(recipe.train.micro_batch, len(rows))
        self._count = self._replayed = 0
        known = run.manifest.get("cuda_graphs")
        if known is None:
            shapes = choose_shapes(rows, recipe.train.micro_batch, recipe.model.seq_len_tokens)
            known = asdict(shapes)
            run.update(cuda_graphs=known)
        else:
            lengths, labels = tuple(known["lengths"]), tuple(known["labels"])
            shapes = Shapes(lengths, labels, known["padding"], known.get("rows", 0))
        self.shapes = shapes
        if "stopped" in known:
            self.graphs.stop(known["stopped"])
            notes(f"cuda_graphs: not used any more ({known['stopped']})")
        else:
            notes(f"cuda_graphs: {shapes}")
            _zero_in_place(model, self.trained)

    def __call__(
        self, step: Step, inputs: dict[str, Any], *, labels: int, rows: int, baked: Hashable
    ) -> torch.Tensor:
        """step(inputs), the loss with backward done.

        `inputs`: of the model, and numbers, or None, that can be others in the next call; what else can is `baked`.
        `labels`: tokens with one. `rows`: the most that there can be; an epoch's last micro-batch can have fewer.
        """
        if self.graphs.why_not:
            return step(inputs)
        self._count += not self.eager
        device = self.trained[0].device
        length, most = self.shapes.fit(inputs["input_ids"].shape[1])
        tensors = {
            name: torch.as_tensor(value).to(device, non_blocking=True)
            for name, value in inputs.items()
            if value is not None
        }
        absent = dict.fromkeys(inputs.keys() - tensors.keys())
        turns = -(-labels // most) if self.count_labels else 1
        # A mean over the micro-batch's labels is no sum of the turns' means.
        provided = turns <= 1 or baked is None
        more = {"most_labels": most} if self.count_labels and provided else {}
        unpacked = "attention_mask" in inputs

        def padded_step(given: Any) -> torch.Tensor:
            with rows_as_they_are(self.model, self.engine) if unpacked else nullcontext():
                return step({**given, **absent, **more})

        rows = min(rows, self._most_rows) if unpacked else self.shapes.rows
        longest = self.engine.longest_packed
        padded = pad(tensors, length, self.pad_token_id, rows=rows, longest=longest)
        ends = padded.get(CUMULATIVE_LENGTHS)
        provided = provided and (ends is None or len(ends) == rows + 1)
        recorded = provided and length in self.shapes.lengths and not self.eager
        given = [padded]
        if turns > 1 and provided:
            given = [
                {**padded, "labels": some_labels(padded["labels"], turn * most, most)}
                for turn in range(turns)
            ]
        replays = self.graphs.replays
        losses = [
            self.graphs(padded_step, one, (most, baked)) if recorded else padded_step(one)
            for one in given
        ]
        self._replayed += recorded and self.graphs.replays - replays == len(given)
        if recorded and self.graphs.why_not:
            self._remember(self.graphs.why_not)
            self.notes(
                f"cuda_graphs: not used ({self.graphs.why_not}); a new run is faster with memory.cuda_graphs = false"
            )
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """Within it micro-batches are recorded, and not counted."""
        try:
            yield
        finally:
            self._count = self._replayed = 0

    def drop(self) -> int:
        """Give back what graphs hold; how many there were. They come again."""
        return self.graphs.drop()

    def stop(self, why: str) -> None:
        self.graphs.stop(why)
        self._remember(why)

    def _remember(self, why: str) -> None:
        self.run.update(cuda_graphs=self.run.manifest["cuda_graphs"] | {"stopped": why})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.graphs.stepped()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        done = {
            "recorded": self.graphs.recorded,
            "replayed": self._replayed,
            "of": self._count,
        }
        self.run.update(cuda_graphs=self.run.manifest["cuda_graphs"] | done)
        if not self.graphs.why_not:
            self.notes(
                f"cuda_graphs: {self._replayed:,} of {self._count:,} micro-batches were replays"
            )
        self.graphs.drop()  # answers and exports want their memory


def _zero_in_place(model: PeftModel, trained: list[torch.nn.Parameter]) -> None:
    """Makes `model.zero_grad()`, which the trainer calls after each step, keep the gradients' memory, which graphs add
    to."""
    forget = model.zero_grad

    def zero_grad(set_to_none: bool = False) -> None:
        if set_to_none:
            forget(set_to_none=True)
        elif gradients := [p.grad for p in trained if p.grad is not None]:
            torch._foreach_zero_(gradients)

    model.zero_grad = zero_grad  # type: ignore[method-assign]
