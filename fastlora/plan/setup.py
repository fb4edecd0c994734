"""What decides memory and speed besides the model's shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fastlora.errors import RecipeError
from fastlora.plan.shape import Linear, Shape
from fastlora.recipe.schema import Recipe

EngineName = Literal["peft", "liger", "unsloth"]
Policy = Literal["none", "full", "offload", "unsloth"]
"""As train.checkpointing."""
Loss = Literal["logits", "fastlora", "liger", "unsloth"]
"""logits: kept whole, with a float32 copy; the others take chunks of tokens."""

# The architectures whose LoRA layers unsloth 2026.10 fuses; others run PEFT's layers, which it rewrites a little.
FUSED = frozenset({"llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    engine: EngineName
    policy: Policy
    loss: Loss
    quantization: Literal["nf4", "int8", "none"]
    item: int
    """Bytes of the compute type."""
    micro_batch: int
    row_tokens: int
    """Of the longest row of a micro-batch."""
    rank: int
    targets: tuple[str, ...] | Literal["all-linear"]
    dora: bool
    train_biases: bool
    dropout: float
    optimizer: Literal["adamw_8bit", "paged_adamw_8bit", "adamw"]
    accumulation: int
    kernels: bool
    """fastlora's run the LoRA layers."""
    packed: bool
    keep_layers: int = 0
    keep_attention_layers: int = 0
    keep_dequantized: bool = False
    """As in [memory], where it does something."""
    stream_layers: int = 0
    """As in [memory]. No layer keeps all and its attention, or keeps all and is streamed; one at least is not."""
    host_embedding: bool = False
    """The input embedding is in host memory: asked for, and possible."""
    dense_layers: int = 0
    """As in [memory], where it does something: micro-batches are recorded, and fastlora's kernels dequantize."""
    graphs: bool = False
    """Micro-batches are recorded: asked for, and not refused (train/static.py)."""
    not_recorded: str = ""
    """Why not, where it was asked for."""
    compiled: bool = False
    """unsloth compiles the layers, each as a whole."""
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.micro_batch * self.row_tokens

    @property
    def inputs_on_host(self) -> bool:
        """Of the layers that are computed again."""
        return self.policy in ("offload", "unsloth")

    @property
    def recomputed_by_us(self) -> bool:
        """What is computed again is so by fastlora, its kernels know it, and no compiled layer is in between."""
        return self.kernels and self.policy in ("full", "offload") and not self.compiled

    def adapted(self, linear: Linear) -> bool:
        if self.targets == "all-linear":
            return linear.name not in ("lm_head", "embed_tokens")
        return linear.name in {target.rpartition(".")[2] for target in self.targets}


def setup_of(
    recipe: Recipe,
    shape: Shape,
    *,
    engine: EngineName | None = None,
    row_tokens: int | None = None,
    bfloat16: bool = True,
) -> Setup:
    """As the recipe would be run on a GPU.

    engine: what `auto` stands for there; row_tokens: of the longest row, if it is known and below
    model.seq_len_tokens; bfloat16: the GPU has it.
    Raises RecipeError: lora.target_modules names no layer of the model; the engine cannot keep or stream layers so.
    """
    model, lora, train = recipe.model, recipe.lora, recipe.train
    notes, not_unsloth = list(shape.notes), lora.why_not_unsloth
    name: EngineName = engine or (
        recipe.engine if recipe.engine != "auto" else "peft" if not_unsloth else "unsloth"
    )
    if recipe.engine == "auto" and engine is None:
        notes.append(
            f"engine: peft, since {not_unsloth}"
            if not_unsloth
            else "engine: unsloth, which auto is where it is installed beside a GPU; --set engine=peft for the other"
        )
    unsloth = name == "unsloth"
    policy = policy_of(recipe, name)
    if policy == "unsloth" and name != "unsloth":
        problem = f"train.checkpointing: the {name} engine has no 'unsloth'"
        raise RecipeError("recipe", [f"{problem}, and {not_unsloth}" if not_unsloth else problem])
    if problems := list(memory_problems(recipe, name, policy, streams=unsloth)):
        raise RecipeError("recipe", problems)
    chunked = _chunked(recipe, name)
    memory = recipe.memory
    streamed = min(memory.stream_layers or 0, shape.layers - 1)
    free = shape.layers - streamed
    kept = free if policy == "none" else min(memory.keep_layers or 0, free)
    refused = memory.cuda_graphs and (
        shape.not_recorded
        or why_not_recorded(recipe, name, policy)
        or (unsloth and recipe.data.packing and _why_not_packed(recipe, shape, bfloat16))
    )
    if refused:
        notes.append(f"memory.cuda_graphs: a run would go on without them ({refused})")
    graphs = bool(memory.cuda_graphs) and not refused
    # With kernels.mode = "auto" they run a layer where unsloth leaves all of it; counted where that was measured.
    left = graphs and (shape.model_type not in FUSED or lora.dora)
    kernels = _kernels(recipe, name) or (left and recipe.kernels.mode == "auto")
    if lora.dora and model.quantization == "int8":
        kernels = False  # they serve no such layer
    in_compiled = compiled(name, shape.model_type, graphs)
    dense = graphs and kernels and not in_compiled
    if memory.dense_layers and not dense:
        why = (in_compiled or NO_LAYER) if graphs else "micro-batches are not recorded"
        notes.append(f"memory.dense_layers: it does nothing ({why})")
    targets = (
        lora.target_modules if lora.target_modules == "all-linear" else tuple(lora.target_modules)
    )
    setup = Setup(
        engine=name,
        policy=policy,
        loss="fastlora" if graphs else name if name != "peft" else "fastlora" if chunked else "logits",
        quantization=model.quantization,
        item=4 if model.dtype == "float32" else 2,
        micro_batch=train.micro_batch,
        row_tokens=min(row_tokens or model.seq_len_tokens, model.seq_len_tokens),
        rank=lora.rank,
        targets=targets,
        dora=lora.dora,
        train_biases=lora.bias != "none",
        dropout=lora.dropout,
        optimizer=train.optimizer,
        accumulation=train.accumulation_steps,
        kernels=kernels,
        packed=recipe.data.packing,
        keep_layers=kept,
        keep_attention_layers=min(memory.keep_attention_layers or 0, shape.layers - kept),
        keep_dequantized=bool(memory.keep_dequantized),
        stream_layers=streamed,
        dense_layers=dense * min(memory.dense_layers or 0, shape.layers),
        graphs=graphs,
        not_recorded=refused or "",
        compiled=bool(in_compiled),
    )  # fmt: skip
    if setup.keep_dequantized and (in_compiled or not setup.recomputed_by_us):
        setup = replace(setup, keep_dequantized=False)
        nothing = "no layer is computed again" if policy == "none" else "" if kernels else NO_LAYER
        notes.append(f"memory.keep_dequantized: it does nothing ({nothing or in_compiled})")
    if not bfloat16 and model.dtype == "auto":
        notes.append("model.dtype: float16, since this GPU has no bfloat16")
    if problems := list(_target_problems(setup, shape, not_unsloth)):
        raise RecipeError("recipe", problems)
    if memory.embedding == "host":
        why = why_embedding_stays(shape, setup)
        setup = replace(setup, host_embedding=not why)
        if why:
            notes.append(f"memory.embedding: it stays on the GPU ({why})")
    notes += _not_measured(setup, shape)
    return replace(setup, notes=tuple(notes))


NO_LAYER = "fastlora's kernels run no layer"


def compiled(engine: str, model_type: str, recorded: bool) -> str:
    """Why a layer keeps no matrix of its weights, if unsloth compiles it: an op is given the codes of the weights then,
    and not the weights, by which matrices are kept. "": it does not."""
    if engine != "unsloth":
        return ""
    if model_type not in FUSED:
        return f"unsloth compiles layers of {model_type}"
    return "" if recorded else "unsloth compiles layers, unless micro-batches are recorded"


def why_embedding_stays(shape: Shape, setup: Setup) -> str:
    """What of memory.embedding = "host" a run finds in its model and refuses (engines/embedding.py); "": nothing."""
    if shape.tied:
        return "it is the output layer's weight too"
    return "it has an adapter" if setup.adapted(shape.embedding) else ""


def records(recipe: Recipe, engine: str, policy: str) -> bool:
    """Whether a run records its micro-batches, as far as its recipe tells: they are to be (memory.cuda_graphs), and
    nothing speaks against it. `policy`: what train.checkpointing stands for."""
    return bool(recipe.memory.cuda_graphs) and not why_not_recorded(recipe, engine, policy)


def why_not_recorded(recipe: Recipe, engine: str, policy: str) -> str:
    """What a run finds in its model and refuses (train/static.py), as far as its recipe tells; "": nothing."""
    if recipe.lora.dropout:
        return "lora.dropout draws random numbers"
    if recipe.memory.stream_layers:
        return "memory.stream_layers waits for copies from host memory"
    if recipe.model.quantization == "int8":
        return "int8 products ask the GPU for outliers"
    if policy == "unsloth":
        return "unsloth's checkpointing waits for its copies"
    if engine == "unsloth":
        off = recipe.kernels.mode == "off"
        return "unsloth's loss waits for the GPU, and kernels.mode is off" if off else ""
    return "" if _chunked(recipe, engine) else "TRL's loss waits for the GPU"


def _why_not_packed(recipe: Recipe, shape: Shape, bfloat16: bool) -> str:
    """Why packed rows are not recorded on the unsloth engine, as engines/packed.py finds it in the model."""
    in_window = 0 < shape.window < recipe.model.seq_len_tokens
    # Flash attention began with the GPUs that have bfloat16.
    half = recipe.model.dtype != "float32" and bfloat16
    if shape.model_type in FUSED - {"gemma2"} and half and not in_window:
        return ""
    return "unsloth reads the lengths of packed rows from the GPU"


def _kernels(recipe: Recipe, engine: str) -> bool:
    """fastlora's run the LoRA layers."""
    mode = recipe.kernels.mode
    return mode == "all" or (engine == "peft" and mode != "off")


def _chunked(recipe: Recipe, engine: str) -> bool:
    wanted = recipe.train.chunked_loss
    return _kernels(recipe, engine) if wanted is None else wanted


def policy_of(recipe: Recipe, engine: str) -> Policy:
    """What train.checkpointing stands for on a GPU."""
    wanted = recipe.train.checkpointing
    if wanted == "auto":
        return "unsloth" if engine == "unsloth" else "full"
    return wanted


def memory_problems(
    recipe: Recipe, engine: str, policy: str | None, *, streams: bool
) -> Iterator[str]:
    """A line for each thing that [memory] asks for and `engine` cannot do with train.checkpointing = `policy` (None: it
    has none such). `streams`: it has memory.stream_layers."""
    memory = recipe.memory
    if memory.keep_attention_layers and policy == "unsloth":
        yield (
            "memory.keep_attention_layers: unsloth's own checkpointing keeps a layer or computes all of it again; "
            'set train.checkpointing = "offload", which is fastlora\'s'
        )
    for key in ("keep_dequantized", "dense_layers"):
        if getattr(memory, key) and recipe.model.quantization != "nf4":
            yield f'memory.{key}: only 4-bit weights are dequantized; set model.quantization = "nf4", or leave it out'
        elif getattr(memory, key) and recipe.lora.dora:
            yield f"memory.{key}: DoRA's are made for each use; set lora.dora = false, or leave it out"
    if memory.keep_dequantized and recipe.model.quantization == "nf4" and policy == "unsloth":
        yield (
            "memory.keep_dequantized: unsloth's own checkpointing dequantizes them once more; set "
            'train.checkpointing = "offload", which is fastlora\'s'
        )
    if not memory.stream_layers:
        return
    if not streams:
        why = recipe.lora.why_not_unsloth
        mend = (
            f"{why}: leave one of the two out" if why else 'set engine = "unsloth", or leave it out'
        )
        yield f"memory.stream_layers: the {engine} engine cannot stream weights; {mend}"
        return
    if policy == "none":
        yield (
            "memory.stream_layers: without checkpointing, backward needs all layers' weights to stay; set "
            'train.checkpointing = "unsloth", "offload" or "full"'
        )
    if recipe.model.quantization == "int8":
        yield (
            "memory.stream_layers: unsloth streams 16-bit and nf4 weights, int8 ones not; set "
            'model.quantization = "nf4"'
        )


def _target_problems(setup: Setup, shape: Shape, why_not_unsloth: str) -> Iterator[str]:
    if setup.targets == "all-linear":
        return
    known = [one.name for one in (*shape.linears, shape.embedding, shape.head)]
    for target in setup.targets:
        if target.rpartition(".")[2] not in known:
            yield f"lora.target_modules: the model has no {target}; it has {', '.join(known)}"
    if setup.engine == "unsloth" and why_not_unsloth:
        yield f'lora.target_modules: {why_not_unsloth}; leave it out, or set engine = "peft"'


def _not_measured(setup: Setup, shape: Shape) -> list[str]:
    """Where the prediction stands on counting alone."""
    found = []
    if setup.engine == "unsloth" and (
        shape.model_type not in FUSED or setup.dora or setup.targets != "all-linear"
    ):
        found.append(
            "unsloth's fused kernels do not cover all of these layers: counted as PEFT's, not measured"
        )
    if setup.quantization == "int8" or setup.item == 4:
        found.append("only nf4 in 16-bit arithmetic has been measured")
    if setup.keep_attention_layers and not setup.kernels:
        found.append("keep_attention_layers without fastlora's kernels: counted, not measured")
    if setup.stream_layers and not setup.kernels:
        found.append("stream_layers without fastlora's kernels: counted, not measured")
    if setup.dora or setup.dropout:
        found.append("DoRA and dropout keep more activations: counted, not measured")
    return found
