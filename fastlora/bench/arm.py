"""One arm, in its own process: timed steps on the whole model, then gradients on a cut-down one.

A bare loop (forward, backward, clip, step), because every engine is to be measured and not TRL's trainer.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from fastlora.bench import work as works
from fastlora.bench.flops import flops_per_token
from fastlora.bench.memory import memory, release
from fastlora.bench.schema import Arm, Work
from fastlora.engines import Engine, choose_engine
from fastlora.engines.base import resolve_checkpointing, resolve_dtype, target_problems
from fastlora.engines.engaged import Plan, engage, lines, loss_line
from fastlora.engines.kept import keep_as_asked
from fastlora.engines.memory import cap_memory
from fastlora.engines.unsloth import attach_own_loss, fused_layers
from fastlora.errors import EngineError
from fastlora.recipe.schema import Recipe
from fastlora.train.collate import Collator
from fastlora.train.planned import fit_memory

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from fastlora.train.graphs import Graphs

PARITY_TOKENS = 512
"""Of each row: enough to tell a wrong gradient, little enough to be compared in float32 on a small card."""
PARITY_B_DEVIATION = 0.02
ADAPTER_SEED = 3407


class ArmTask(BaseModel):
    arm: Arm
    recipe: Recipe
    """With the arm's changes; model.name is the whole checkpoint."""
    parity_checkpoint: str
    rows: str
    gradients: str
    """Where the gradients of the parity step go; those of the whole model beside it, as NAME.depth.*."""
    work: Work
    vram_cap_gib: float | None = None

    def load(self) -> Loaded:
        return Loaded(self, self.recipe)

    def load_for_parity(self) -> Loaded:
        """The cut-down model."""
        model = self.recipe.model.model_copy(update={"name": self.parity_checkpoint})
        return Loaded(self, self.recipe.model_copy(update={"model": model}))


class Loaded:
    """An engine's model with its adapter, ready to train as `recipe` says."""

    def __init__(self, task: ArmTask, recipe: Recipe) -> None:
        import torch

        self.notes: list[str] = []
        self.graphs: Graphs | None = None
        self.engine: Engine = choose_engine(task.arm.engine, self.notes.append)
        self.engine.prepare()
        # Batches are not chosen: the work of every arm is the same.
        self.recipe, _ = fit_memory(recipe, self.engine.name, None, self.notes.append)
        self._check_targets()
        self.dtype = resolve_dtype(self.recipe.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: PeftModel = self.engine.load(self.recipe, self.notes.append)
        self.checkpointing = resolve_checkpointing(self.recipe, self.engine)
        self._engage(task.arm)
        memory = self.recipe.memory
        ours = self.checkpointing == "offload" or memory.keep_layers or memory.keep_attention_layers
        if ours or "+fastlora" in task.arm.options:
            keep_as_asked(self.model, self.engine, self.recipe, self.notes.append)
        elif task.arm.engine != "unsloth" and self.checkpointing == "full":
            # What one has without fastlora, which is what such an arm stands for.
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            self.model.enable_input_require_grads()
        for _, parameter in self.adapter():
            parameter.data = parameter.data.float()  # as the trainer keeps them
        self.model.train()
        self.collate = Collator(0, self.engine)

    def _check_targets(self) -> None:
        """Raises EngineError: the engine would not train the adapters that are asked for."""
        from transformers import AutoConfig

        model, targets = self.recipe.model, self.recipe.lora.target_modules
        if targets == "all-linear":
            return
        config = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if problems := target_problems(targets, config, self.engine, self.notes.append):
            raise EngineError("\n".join(problems))

    def _engage(self, arm: Arm) -> None:
        """The arm's kernels, as `fastlora run` would put them on. Without +fastlora, none of ours.

        Raises EngineError: an option would change nothing.
        """
        plan = Plan(ours="+fastlora" in arm.options, unsloths="-kernels" not in arm.options)
        if not plan.unsloths and not fused_layers(self.model):
            raise EngineError(
                "-kernels: unsloth has no fused LoRA kernel in this model to take out"
            )
        rows = engage(self.model, arm.engine, plan)
        said = list(lines(rows))
        if plan.ours and not any(row.kernel == "fastlora" for row in rows):
            raise EngineError(
                "\n".join([f"+fastlora: this arm would be {arm.engine} alone.", *said])
            )
        self.notes += said
        if plan.ours and arm.engine == "peft":  # the others have a loss of their own
            from fastlora_kernels import attach_head

            self.notes.append(loss_line(attach_head(self.model)))
        if self.recipe.memory.cuda_graphs:
            self._record(arm)

    def _record(self, arm: Arm) -> None:
        """Raises EngineError: micro-batches cannot be recorded."""
        from fastlora.train.graphs import CudaRecorder, Graphs, can_record

        if arm.engine == "unsloth" and (reason := attach_own_loss(self.model)):
            raise EngineError(
                f"+record: unsloth's loss waits for the GPU, and ours cannot be it: {reason}"
            )
        if not can_record():
            raise EngineError("+record: CUDA graphs need a CUDA GPU")
        self.graphs = Graphs(CudaRecorder(), [parameter for _, parameter in self.adapter()])

    def adapter(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name as PEFT saves it, parameter) of all that is trained."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name.replace(".default", ""), parameter

    def set_adapter(self, b_deviation: float, seed: int = ADAPTER_SEED) -> None:
        """The same adapter in every arm: A uniform as PEFT draws it, B normal (0: as PEFT starts)."""
        for name, parameter in self.adapter():
            initial = initial_value(name, tuple(parameter.shape), b_deviation, seed)
            if initial is not None:
                parameter.data.copy_(initial)

    @property
    def recomputed(self) -> float:
        """Share of the layers that are computed again."""
        layers: int = self.model.config.num_hidden_layers
        kept = min(layers, self.recipe.memory.keep_layers or 0)
        return 0.0 if self.checkpointing == "none" else 1 - kept / layers

    def autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        # A cast that was kept from before would not be recorded.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=self.graphs is None)

    def loss(self, inputs: dict[str, Any], counted: torch.Tensor) -> torch.Tensor:
        """Of one micro-batch: summed over its supervised tokens, over `counted` ones of the whole step."""
        with self.autocast():
            loss: torch.Tensor = self.model(**inputs, num_items_in_batch=counted).loss
        return loss

    def train(
        self, inputs: dict[str, torch.Tensor], counted: torch.Tensor, most_labels: int, scaler: Any
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch, of whose tokens at most `most_labels` have a label; its loss."""

        def step(given: Any) -> torch.Tensor:
            labels = {} if self.graphs is None else {"most_labels": most_labels}
            inputs = {name: value for name, value in given.items() if name != "counted"}
            with self.unmasked():
                loss = self.loss(inputs | labels, given["counted"])
                scaler.scale(loss).backward()
            return loss.detach()

        given = {**inputs, "counted": counted}
        return step(given) if self.graphs is None else self.graphs(step, given, most_labels)

    def unmasked(self) -> AbstractContextManager[None]:
        """As in a run with memory.cuda_graphs."""
        from fastlora.train.causal import right_padded

        own = self.graphs is not None and self.engine.name == "peft"
        return right_padded(self.model) if own else nullcontext()

    def zero_gradients(self) -> None:
        """Graphs add to them where they are."""
        for _, parameter in self.adapter():
            if self.graphs is None:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in inputs.items()}


def initial_value(
    name: str, shape: tuple[int, ...], b_deviation: float, seed: int = ADAPTER_SEED
) -> torch.Tensor | None:
    """float32 on the CPU; None for what is neither A nor B (DoRA's magnitudes start from the base)."""
    import torch

    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    value: torch.Tensor | None = None
    if ".lora_A." in name:
        value = (torch.rand(shape, generator=draw) * 2 - 1) / shape[-1] ** 0.5
    if ".lora_B." in name:
        value = torch.randn(shape, generator=draw) * b_deviation
    return value


def counted_tokens(batches: Sequence[dict[str, torch.Tensor]]) -> int:
    """Supervised tokens of micro-batches; the first of a row is never predicted."""
    return sum(int((inputs["labels"][:, 1:] >= 0).sum()) for inputs in batches)


def parity_rows(rows: Sequence[works.Row], count: int) -> list[works.Row]:
    """The first `count` rows that have something to learn within PARITY_TOKENS, cut there."""
    cut = ({name: ids[:PARITY_TOKENS] for name, ids in row.items()} for row in rows)
    return list(islice((row for row in cut if max(row["labels"][1:]) >= 0), count))


def parity_step(loaded: Loaded, rows: Sequence[works.Row]) -> dict[str, torch.Tensor]:
    """Gradients by name, and "loss", float32 on the CPU, of one micro-batch with B away from zero and
    without dropout, whose masks no two engines draw alike."""
    import torch

    dropouts = [module for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropouts:
        module.eval()
    loaded.set_adapter(PARITY_B_DEVIATION)
    inputs = loaded.collate(rows)
    counted = torch.tensor(counted_tokens([inputs]), device=loaded.device)
    # A constant scale keeps float16 gradients from vanishing; it divides out.
    scale = 1024.0 if loaded.dtype == torch.float16 else 1.0
    loss = loaded.loss(loaded.on_device(inputs), counted)
    (loss * scale).backward()
    gradients = {
        name: parameter.grad.float().cpu() / scale
        for name, parameter in loaded.adapter()
        if parameter.grad is not None
    }
    for _, parameter in loaded.adapter():
        parameter.grad = None
    for module in dropouts:
        module.train()
    return {**gradients, "loss": loss.detach().float().cpu()}


def run_arm(task: ArmTask) -> dict[str, Any]:
    """The timed steps, then the parity step; what gates and report are made from."""
    import torch
    from safetensors.torch import save_file

    rows = works.load(Path(task.rows))
    train = task.recipe.train
    cap_memory(task.vram_cap_gib)
    started = time.perf_counter()
    loaded = task.load()
    load_s = time.perf_counter() - started
    whole = rows[: train.micro_batch]
    short = parity_rows(
        rows, max(2, train.micro_batch)
    )  # two, or packing has no boundary to leak through
    if task.arm.packed:
        # In one sequence, and still the gradients of rows apart.
        whole, short = (works.pack(some, sum(map(_length, some))) for some in (whole, short))
        rows = works.pack(rows, task.recipe.model.seq_len_tokens)
    depth = parity_step(loaded, whole)
    del depth["loss"]
    save_file(
        {name: gradient.bfloat16() for name, gradient in depth.items()},
        str(Path(task.gradients).with_suffix(".depth.safetensors")),
    )
    loaded.set_adapter(0.0)
    before = {name: parameter.detach().cpu().clone() for name, parameter in loaded.adapter()}
    steps = works.steps(rows, train.micro_batch, train.accumulation_steps)
    measured = timed_steps(loaded, steps)
    first_rows_after = step_loss(loaded, steps[0])
    after = {name: parameter.detach().cpu() for name, parameter in loaded.adapter()}
    unchanged = [name for name, value in after.items() if torch.equal(before[name], value)]
    notes = loaded.notes
    flops = flops_per_token(loaded.model, loaded.recomputed)
    empty(loaded)

    parity = parity_step(task.load_for_parity(), short)
    save_file(parity, task.gradients)
    return {
        **measured,
        "first_rows_after": first_rows_after,
        "adapter_tensors": len(after),
        "unchanged": unchanged,
        "load_s": round(load_s, 1),
        "notes": notes,
        "flops": flops,
    }


def timed_steps(loaded: Loaded, steps: works.Steps) -> dict[str, Any]:
    """Train on every step; seconds, tokens and losses of each, memory at its peak.

    Raises EngineError: micro-batches were to be recorded and were not.
    """
    import torch

    train, cuda = loaded.recipe.train, loaded.device.type == "cuda"
    parameters = [parameter for _, parameter in loaded.adapter()]
    optimizer = make_optimizer(parameters, train.optimizer, train.lr, train.weight_decay)
    scaler = torch.amp.GradScaler(loaded.device.type, enabled=loaded.dtype == torch.float16)
    digest = works.Digest()
    most_labels = max(counted_tokens([loaded.collate(rows)]) for step in steps for rows in step)
    losses, seconds, tokens, supervised = [], [], [], []
    if cuda:
        release()  # what loading left behind is not training's
        torch.cuda.reset_peak_memory_stats()
    for step in steps:
        batches = [loaded.collate(rows) for rows in step]
        counts = counted_tokens(batches)
        before = digest.tokens
        for inputs in batches:
            digest.add(inputs)
        loaded.zero_gradients()  # here, so that the last step's can be looked at
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        counted = torch.tensor(counts, device=loaded.device)
        total = torch.zeros((), device=loaded.device)
        for inputs in batches:
            total += loaded.train(loaded.on_device(inputs), counted, most_labels, scaler)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(total))  # waits for the GPU
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        tokens.append(digest.tokens - before)
        supervised.append(counts)
    if loaded.graphs is not None and not loaded.graphs.replays:
        raise EngineError(
            f"+record: nothing was recorded: {loaded.graphs.why_not or 'no shape came often enough'}"
        )
    return {
        "losses": losses,
        "step_s": seconds,
        "step_tokens": tokens,
        "step_supervised": supervised,
        "fed_tokens": digest.fed,
        "squared_lengths": digest.squared_lengths,
        "digest": digest.value(),
        "order": digest.ordered(),
        "zero_gradients": [
            name
            for name, parameter in loaded.adapter()
            if parameter.grad is None or float(parameter.grad.norm()) == 0
        ],
        **memory(),
    }


def _length(row: works.Row) -> int:
    return len(row["input_ids"])


def step_loss(loaded: Loaded, step: list[list[works.Row]]) -> float:
    """The loss of one step's rows as the adapter now is."""
    import torch

    batches = [loaded.collate(rows) for rows in step]
    counted = torch.tensor(counted_tokens(batches), device=loaded.device)
    with torch.no_grad():
        return sum(float(loaded.loss(loaded.on_device(inputs), counted)) for inputs in batches)


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], name: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    import torch

    if name == "adamw" or not torch.cuda.is_available():
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    import bitsandbytes as bnb

    kind = bnb.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, lr=lr, weight_decay=weight_decay)
    return optimizer


def empty(loaded: Loaded) -> None:
    """Free a model's memory although unsloth keeps hold of its layers for the whole process."""
    import torch

    if loaded.graphs is not None:
        loaded.graphs.drop()

    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.grad = None
    release()
