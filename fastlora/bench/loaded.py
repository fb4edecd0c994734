"""An arm's model with its adapter, kernels and checkpointing, ready to train: what the benchmark's processes load."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from fastlora.bench.schema import Arm, Work
from fastlora.engines import Engine, choose_engine
from fastlora.engines.base import resolve_checkpointing, resolve_dtype, target_problems
from fastlora.engines.embedding import embedding_to_host
from fastlora.engines.engaged import Plan, engage, lines, loss_line
from fastlora.engines.kept import dense_as_asked, keep_as_asked, transformers_own
from fastlora.engines.packed import keep_rows_apart
from fastlora.engines.unsloth import attach_own_loss, fused_layers
from fastlora.errors import EngineError
from fastlora.recipe.schema import Recipe
from fastlora.train.collate import Collator
from fastlora.train.planned import fit_memory

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from fastlora.train.graphs import Graphs

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
    compared_rows: int = 2
    """Of a micro-batch whose gradients are compared with other arms'."""
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
        began = time.perf_counter()
        self.engine: Engine = choose_engine(task.arm.engine, self.notes.append)
        self.engine.prepare()
        self.imports_s = time.perf_counter() - began
        """Of the engine's libraries, for a first model."""
        self.recipe = recipe
        if recipe.memory.vram is not None:
            # Batches are not chosen: the work of every arm is the same.
            self.recipe, _ = fit_memory(recipe, self.engine.name, None, self.notes.append)
        self._check_targets()
        self.dtype = resolve_dtype(self.recipe.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Begins with a scale with which the gradients of the parity step do not overflow.
        self.scaler: Any = torch.amp.GradScaler(
            self.device.type, init_scale=1024.0, enabled=self.dtype == torch.float16
        )
        began = time.perf_counter()
        self.model: PeftModel = self.engine.load(self.recipe, self.notes.append)
        self.model.config.use_cache = False  # as the trainer sets it, for every engine
        self.weights_s = time.perf_counter() - began
        if self.recipe.memory.embedding == "host" and (why := embedding_to_host(self.model)):
            raise EngineError(f"+hostembed: the embedding stays where it is: {why}")
        self.checkpointing = resolve_checkpointing(self.recipe, self.engine)
        self._engage(task.arm)
        memory = self.recipe.memory
        ours = self.checkpointing == "offload" or memory.keep_layers or memory.keep_attention_layers
        ours = ours or memory.keep_dequantized or memory.cuda_graphs  # no other is recorded
        if ours or "+fastlora" in task.arm.options:
            keep_as_asked(self.model, self.engine, self.recipe, self.notes.append)
            keep_rows_apart(self.model, self.engine, self.recipe, self.notes.append)
        elif task.arm.engine != "unsloth" and self.checkpointing == "full":
            # What one has without fastlora, which is what such an arm stands for.
            transformers_own(self.model)
        if memory.cuda_graphs:
            self._record(task.arm)
        for _, parameter in self.adapter():
            parameter.data = parameter.data.float()  # as the trainer keeps them
        self.model.train()
        self.collate = Collator(0, self.engine)

    @property
    def host_embedding_bytes(self) -> int:
        """Of the input embedding, where it is in host memory."""
        if self.recipe.memory.embedding != "host":
            return 0
        return int(self.model.get_input_embeddings().weight.nbytes)

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
        plan = Plan(
            ours="+fastlora" in arm.options,
            unsloths="-kernels" not in arm.options,
            dtype=self.dtype,
        )
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

    def _record(self, arm: Arm) -> None:
        """Raises EngineError: micro-batches cannot be recorded."""
        from fastlora.train.graphs import CudaRecorder, Graphs, can_record
        from fastlora.train.static import why_not

        if arm.engine == "unsloth" and (reason := attach_own_loss(self.model)):
            raise EngineError(
                f"+record: unsloth's loss waits for the GPU, and ours cannot be it: {reason}"
            )
        if not can_record():
            raise EngineError("+record: CUDA graphs need a CUDA GPU")
        packing = self.recipe.data.packing
        if reason := why_not(self.model, self.engine, own_loss=True, packing=packing):
            raise EngineError(f"+record: {reason}")
        dense = dense_as_asked(self.model, self.recipe, self.notes.append)
        parameters = [parameter for _, parameter in self.adapter()]
        self.graphs = Graphs(CudaRecorder(), parameters, weights=dense)

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
        self.stepped()

    def stepped(self) -> None:
        """The adapter has changed; to be called whenever it has (+dense)."""
        if self.graphs is not None:
            self.graphs.stepped()

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
        self, inputs: dict[str, torch.Tensor], counted: torch.Tensor, most_labels: int
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch, of whose tokens at most `most_labels` have a label; its loss. The
        gradients are scaled (`scaler`), and with +record it is a replay once its shape was recorded."""

        from fastlora.train.causal import rows_as_they_are

        def step(given: Any) -> torch.Tensor:
            labels = {} if self.graphs is None else {"most_labels": most_labels}
            inputs = {name: value for name, value in given.items() if name != "counted"}
            with (
                nullcontext() if self.graphs is None else rows_as_they_are(self.model, self.engine)
            ):
                loss = self.loss(inputs | labels, given["counted"])
                self.scaler.scale(loss).backward()
            return loss.detach()

        given = {**inputs, "counted": counted}
        return step(given) if self.graphs is None else self.graphs(step, given, most_labels)

    @property
    def not_recorded(self) -> str:
        """Why micro-batches that were to be recorded were not, or no more from some step on; empty if they were, and
        where none was to be."""
        graphs = self.graphs
        if graphs is None or (graphs.replays and not graphs.why_not):
            return ""
        return graphs.why_not or "no shape came often enough"

    def kept_attention(self) -> int | None:
        """Layers whose attention the last backward was given instead of computing it again; None: no such were asked
        for.

        Raises EngineError: it was given none."""
        from fastlora_kernels.recompute import decoder_layers, spared

        memory, layers = self.recipe.memory, decoder_layers(self.model)
        others = max(0, len(layers) - (memory.keep_layers or 0))
        asked = min(memory.keep_attention_layers or 0, others)
        if not asked or self.checkpointing == "none":
            return None
        found = sum((left_out := spared(one)) is not None and left_out.attention for one in layers)
        # Of the last one that is offloaded nothing but its input is kept.
        if not found and asked > (self.checkpointing == "offload"):
            raise EngineError(
                "+attention: attention was computed again in every layer; its operator is not one that can be kept"
            )
        return found

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
