"""A run goes on when a step does not fit into the memory: in smaller forwards, over the same samples.

The trainer's own micro-batches, and so the order of the data, the steps and what a resume skips, stay as the recipe has
them; each is split here into forwards of fewer rows. A step that runs out of memory is taken back (gradients, random
state, logged loss) and done again from its first sample. It then is, to the last bit, the step of a run whose
train.micro_batch was smaller from the start, at the same effective batch: every forward's loss is divided by the
supervised tokens of the whole step. Only the sums' order differs from the step that did not fit.

What was changed stands in the manifest under `oom`, with its step, and holds from that step on, also when an earlier
checkpoint is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from fastlora_kernels.layers.group import drop_waiting
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.engines.base import Engine
from fastlora.engines.kept import recompute_all
from fastlora.engines.memory import GIB, free_memory, in_words, is_out_of_memory, memory_now
from fastlora.errors import EngineError
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir
from fastlora.train.collate import ROW_LENGTHS, shares, split, split_labels
from fastlora.train.notes import Notes
from fastlora.train.static import StaticSteps
from fastlora.train.steps import effective_batch

if TYPE_CHECKING:
    Batch = dict[str, Any]
    Forward = Callable[[Batch, int, int, float | None], torch.Tensor]


class DoesNotFit(EngineError):
    """Nothing smaller is left to try. Settings are as --set takes them."""

    def __init__(
        self, problem: str, *, shorter: str, why_shorter: str, resumed_with: Sequence[str] = ()
    ) -> None:
        self.shorter, self.why_shorter = shorter, why_shorter
        self.resumed_with = tuple(resumed_with)
        """What may change on --resume and takes less memory."""
        super().__init__(problem)


class Continuation(TrainerCallback):
    """Runs the forwards of a step, or of an evaluation, in as many rows as fit."""

    def __init__(
        self, run: RunDir, recipe: Recipe, engine: Engine, checkpointing: str, notes: Notes
    ) -> None:
        self.run, self.recipe, self.engine, self.notes = run, recipe, engine, notes
        self.checkpointing = checkpointing
        memory = recipe.memory
        self._keeps = checkpointing == "none" or (
            checkpointing != "unsloth"
            and bool(memory.keep_layers or memory.keep_attention_layers or memory.keep_dequantized)
        )
        """More could still be computed again."""
        self.trainer: Trainer  # build_trainer sets it
        self.static: StaticSteps | None = None  # and this
        self.longest = 0
        """Tokens of the longest row that a step was done with."""
        self.probing = False
        """Not the step is in hand, but what is tried before it (train/probe.py)."""
        self._batches: list[Batch] = []  # of the step in hand, so far
        self._optimizing = False
        self._graphs = 0
        """How many went with what was dropped last."""

    @property
    def step(self) -> int:
        """The one in hand, from 1 on."""
        return self._done + 1

    @property
    def _done(self) -> int:
        return int(self.trainer.state.global_step)

    def most_rows(self, where: str) -> int:
        """In one forward of a "step" or of an "evaluation"."""
        return self._fewest(self._entries(where))

    @property
    def shrunk(self) -> bool:
        """Whether a step is done in smaller forwards, or keeps less, than the recipe has it."""
        found = self._entries("step")
        return any(one["rows"] < one["before"] or "checkpointing" in one for one in found)

    @property
    def ran_out(self) -> bool:
        """Whether a step ever did, of this run: its peak is then all that there was."""
        return bool(self._entries("step"))

    def _fewest(self, entries: list[dict[str, Any]]) -> int:
        fewest: int = min([self.recipe.train.micro_batch, *(entry["rows"] for entry in entries)])
        return fewest

    def _entries(self, where: str) -> list[dict[str, Any]]:
        at = self.step if where == "step" else self._done
        known = self.run.manifest.get("oom", [])
        return [entry for entry in known if entry["where"] == where and entry["step"] <= at]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        known = [one for one in self.run.manifest.get("oom", []) if one["where"] == "step"]
        if known:
            fewest = min(known, key=lambda entry: int(entry["rows"]))
            self.notes(
                f"resume: from step {fewest['step']} on {_rows(self._fewest(known))} in a forward, since more ran "
                "out of memory there"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        trainer = self.trainer
        self._began, self._batches = time.perf_counter(), []
        self._random = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        )
        self._loss = trainer._tr_loss.clone()
        # TRL's own: entropy and accuracy of each forward, and tokens.
        self._logged = {name: len(values) for name, values in trainer._metrics["train"].items()}
        self._tokens = trainer._total_train_tokens
        if any(entry.get("checkpointing") for entry in self._entries("step")):
            self._checkpoint_layers()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What the smaller forwards have cost, if enough steps were logged on both sides."""
        shrunk = [one["step"] for one in self.run.manifest.get("oom", []) if one["where"] == "step"]
        if not shrunk:
            return
        speeds = [
            (entry["step"], entry["tokens_per_s"])
            for entry in self.run.read_metrics()
            if "tokens_per_s" in entry
        ]
        before = [speed for step, speed in speeds if step < shrunk[0]]
        after = [speed for step, speed in speeds if step > shrunk[-1]]
        if min(len(before), len(after)) > 2:
            self.notes(
                f"out of memory at step {shrunk[0]}: {median(before):,.0f} tokens/s before it, {median(after):,.0f} "
                f"after the last change, at step {shrunk[-1]}"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._optimizing = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._optimizing = False

    def train(self, forward: Forward, batch: Batch, *, means: bool) -> torch.Tensor:
        """The trainer's next micro-batch, forward and backward; the loss that the trainer has not yet.

        `forward` takes inputs, how many tokens of them have a label, how many forwards there are in place of one, and
        what its loss is to be multiplied with.
        `means`: each micro-batch's loss is its own mean, as of models that are not told the tokens of the whole step.

        Raises DoesNotFit: with one row as well. What was trained before is then in a checkpoint.
        """
        # What is tried before a step is no part of one: alone it is done again.
        self._batches = [batch] if self.probing else [*self._batches, batch]
        due = [batch]
        while True:
            loss = None
            try:
                for one in due:
                    most_rows = self.most_rows("step")
                    parts, counts = split(one, most_rows, self.engine), split_labels(one, most_rows)
                    for part, count, share in shares(parts, counts, means):
                        if loss is not None:
                            self.trainer._tr_loss += loss
                        loss = forward(part, count, len(parts), share)
                assert loss is not None
                self.longest = max(self.longest, *map(_tokens, batch[ROW_LENGTHS]))
                return loss
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                memory = memory_now(error)
            # Out here, because in there the exception holds every frame it came through, and they the tensors.
            loss = None
            self.take_back()
            self._make_room(one, memory)
            due = self._batches

    def evaluate(self, forward: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
        """The mean loss of the batch's supervised tokens."""
        while True:
            try:
                most_rows = self.most_rows("evaluation")
                parts, counts = split(batch, most_rows, self.engine), split_labels(batch, most_rows)
                if len(parts) == 1:
                    return forward(parts[0])
                weighed = [
                    (forward(part), count)
                    for part, count in zip(parts, counts, strict=True)
                    if count
                ]
                total = sum(tokens for _, tokens in weighed)
                return torch.stack([loss * (tokens / total) for loss, tokens in weighed]).sum()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                memory = memory_now(error)
            self._drop()
            before = min(self.most_rows("evaluation"), len(batch[ROW_LENGTHS]))
            tokens = max(map(_tokens, batch[ROW_LENGTHS]))
            said = f"out of memory in the evaluation after step {self._done}, with {_rows(before)} of up to "
            said += f"{tokens:,} tokens in a forward{in_words(memory)}"
            if before == 1:
                raise DoesNotFit(said, **self._shorter(tokens))
            self._record("evaluation", memory, before=before, rows=(before + 1) // 2)
            self.notes(
                f"{said}; it goes on with {_rows((before + 1) // 2)}, now and later. The loss stays the mean over the "
                "batch's tokens"
            )

    def take_back(self, *, graphs: bool = False) -> None:
        """To the beginning of the step. `graphs`: those that there are stay, and the gradients that they add to."""
        trainer = self.trainer
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        trainer._tr_loss.copy_(self._loss)
        trainer._total_train_tokens = self._tokens
        for name, values in list(trainer._metrics["train"].items()):
            del values[self._logged.get(name, 0) :]
            if not values:
                del trainer._metrics["train"][name]
        # A backward that broke off has left gradients of some layers; all of the step's are made again.
        trainer.model.zero_grad(set_to_none=not graphs)
        if not graphs:
            self._drop()

    def _drop(self) -> None:
        # Their memory serves nothing else.
        self._graphs = self.static.drop() if self.static else 0
        drop_waiting(self.trainer.model)
        self.engine.drop_broken_step()
        free_memory()

    def _make_room(self, batch: Batch, memory: dict[str, float]) -> None:
        lengths = [_tokens(row) for row in batch[ROW_LENGTHS]]
        before = min(self.most_rows("step"), len(lengths))
        freed = memory_now()
        now = time.perf_counter()
        lost_s, self._began = now - self._began, now
        when, again = "", "The step is done again from its first sample"
        if self.probing:
            when, again = "before ", "They are tried again"
        said = (
            f"{when}step {self.step}: out of memory with {_rows(before)} of up to {max(lengths):,} tokens in a forward"
            f"{in_words(memory)}"
        )
        again += f" ({lost_s:.1f} s lost)"
        if freed:
            again += f", from {freed['allocated_gib']:.2f} GiB in use"
        if self.static and (self._graphs or self._rehearsing):
            self._record(
                "step", memory, before=before, rows=before, lost_s=round(lost_s, 2), graphs=False
            )
            self.static.stop(f"out of memory at step {self.step}")
            self.notes(
                f"{said}. {again}, without memory.cuda_graphs from now on"
                + (f": what {self._graphs} of them held is free" if self._graphs else "")
            )
        elif before > 1:
            rows = (before + 1) // 2
            self._record("step", memory, before=before, rows=rows, lost_s=round(lost_s, 2))
            self.notes(
                f"{said}. {again}, with {_rows(rows)} in a forward from now on and more forwards to a step: the same "
                "samples in the same order, the loss normalised as before. Smaller forwards mostly are slower; a new "
                f"run needs train.micro_batch = {rows} and train.effective_batch = {effective_batch(self.recipe)}"
            )
        elif self._keeps:
            kept = "" if self.checkpointing == "none" else " and nothing kept by [memory]"
            self._checkpoint_layers()
            self._record(
                "step", memory, before=1, rows=1, checkpointing=self.checkpointing,
                lost_s=round(lost_s, 2),
            )  # fmt: skip
            self.notes(
                f'{said}. {again}, with train.checkpointing = "{self.checkpointing}"{kept} from now on: the forward of '
                "every layer is computed a second time for the backward, which takes about a third more time and "
                "changes no number"
            )
        else:
            self._give_up(f"{said}, train.checkpointing = {self.checkpointing!r}", max(lengths))

    @property
    def _rehearsing(self) -> bool:
        """The same rows have fitted, as calls; what did not is in preparation of graphs."""
        return self.probing and self.static is not None and not self.static.eager

    def _give_up(self, said: str, tokens: int) -> NoReturn:
        if self._done:
            self.trainer._save_checkpoint(self.trainer.model, None)
            said += f". Step {self._done} is saved"
        # Into host memory; on a CPU it is there already.
        tighter = self.checkpointing == "full" and torch.cuda.is_available()
        default = self.engine.capabilities.checkpointing[0]
        to = "unsloth" if default == "unsloth" else "offload"
        raise DoesNotFit(
            said,
            **self._shorter(tokens),
            resumed_with=[f'train.checkpointing="{to}"'] if tighter else [],
        )

    def _shorter(self, tokens: int) -> dict[str, str]:
        if 8 <= self.longest < tokens:
            fits, why = self.longest, f"up to {self.longest:,} tokens did fit"
        else:
            fits, why = max(8, tokens // 2), f"half of {tokens:,} tokens"
        return {
            "shorter": f"model.seq_len_tokens={fits}",
            "why_shorter": f"{why}; longer rows are cut",
        }

    def _checkpoint_layers(self) -> None:
        if not self._keeps:
            return
        self._keeps = False
        if self.checkpointing == "none":
            self.checkpointing = "full"
        offload = self.checkpointing == "offload"
        recompute_all(self.trainer.model, self.engine, self.notes, offload=offload)

    def _record(self, where: str, memory: dict[str, float], **entry: Any) -> None:
        entries = self.run.manifest.setdefault("oom", [])
        at = self.step if where == "step" else self._done
        entries.append({"where": where, "step": at, **entry, "memory": memory})
        self.run.update()

    def way_out(self) -> str:
        """Where memory ran out and no step can be done again, and what to do."""
        end_others = "end other processes on this GPU and go on with --resume"
        if not self._optimizing:
            return f"It was at step {self.step}; {end_others}"
        trained = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        size = trained * (8 if self.recipe.train.optimizer == "adamw" else 2) / GIB
        return (
            f"It was the optimizer at step {self.step}, whose state, made in the first, takes about {size:.2f} GiB: "
            'set train.optimizer = "paged_adamw_8bit" or a lower lora.rank and start a new run, or '
            f"{end_others}"
        )


def _tokens(row: int | list[int]) -> int:
    return row if isinstance(row, int) else sum(row)


def _rows(count: int) -> str:
    return "one row" if count == 1 else f"{count} rows"
