"""The recipe: one typed section per part of a run. Units live in the names.

Every section refuses unknown keys and coerces nothing ("16" is not 16), because a mistyped or
mistaken key that is silently ignored costs its user an evening.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fastlora.recipe.findings import KINDS, selected
from fastlora.recipe.units import gib_of

DataFormat = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text"]
MixUnit = Literal["tokens", "rows"]
"""What a share of a mix is counted in: supervised tokens, or rows."""

TEMPLATE_TYPES = (".jinja", ".j2")


def trained_whole_by_unsloth(target: str) -> str:
    """Said of an output layer or input embedding among lora.target_modules."""
    return f"unsloth trains {target} whole, not with LoRA"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    name: str = Field(min_length=1)
    """A Hub id, or the path of a folder that holds a model."""
    revision: str | None = None
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen base is stored; nf4 is QLoRA's 4-bit NormalFloat with double quantization."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type; auto is bfloat16 where the GPU has it, else float16, and float32 on a CPU."""
    seq_len_tokens: int = Field(default=2048, ge=8)
    trust_remote_code: bool = False


class LoraSection(Section):
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed adaptation (Liu et al. 2024); Unsloth's fused kernels do not cover it."""
    bias: Literal["none", "all", "lora_only"] = "none"

    @model_validator(mode="after")
    def _check(self) -> LoraSection:
        if self.target_modules == []:
            raise ValueError('target_modules: the list is empty; name modules or say "all-linear"')
        return self

    @property
    def why_not_unsloth(self) -> str:
        """Which of target_modules is an output layer or input embedding, by the names that unsloth knows these by; "":
        none is."""
        named = () if self.target_modules == "all-linear" else self.target_modules
        ends = [target.rpartition(".")[2] for target in named]
        found = next((end for end in ends if end in ("lm_head", "embed_tokens")), None)
        return trained_whole_by_unsloth(found) if found else ""


class SourceSection(Section):
    path: str = Field(min_length=1)
    """A .jsonl, .json, .csv or .parquet file, or a Hub data set id."""
    format: Literal["auto"] | DataFormat = "auto"
    columns: dict[str, str] = {}
    """Renames: the field fastlora looks for -> the column that holds it, e.g. output = "answer"."""
    split: str = "train"
    """Hub data sets only, as are the next two; slices such as "train[:5000]" work."""
    subset: str | None = None
    revision: str | None = None
    weight: float | None = Field(default=None, gt=0)
    """Its share of its mix is weight / sum of weights. The mix is the largest in which no row comes twice."""


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _sources(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


Source = Annotated[SourceSection, BeforeValidator(_source)]


class RehearsalSection(Section):
    source: Annotated[list[Source], BeforeValidator(_sources), Field(min_length=1)]
    """General examples, one source or a list, mixed in so that the model does not forget what it could do before."""
    share: float = Field(gt=0, lt=1)
    """Their part of all that is trained on; less where their rows do not suffice, since none is repeated."""
    by: MixUnit = "tokens"


def _weights_problem(key: str, sources: Sequence[SourceSection]) -> str | None:
    without = [place for place, source in enumerate(sources) if source.weight is None]
    if without and len(without) < len(sources):
        return (
            f"{key}[{without[0]}]: has no weight, while another has; give all of them one, or none"
        )
    return None


class DataSection(Section):
    sources: list[Source] = Field(min_length=1)
    weights_by: MixUnit | None = None
    """What the weights of sources are counted in: data.rehearsal.by where there is rehearsal, else tokens."""
    rehearsal: RehearsalSection | None = None
    eval_sources: list[Source] = []
    eval_split: int | float = Field(default=0, ge=0)
    """Held out from each source and rehearsal, by its part of the mix: a fraction if below 1, else a number of rows
    in all; 0 holds out none."""
    template: str = Field(default="tokenizer", min_length=1)
    """`tokenizer`: its own chat template; `none`: prompt and completion as they stand; or a .jinja file."""
    supervise: Literal["completion", "all"] = "completion"
    packing: bool = False
    on_bad_row: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.eval_sources and self.eval_split:
            raise ValueError("eval_split: give either eval_split or eval_sources, not both")
        if isinstance(self.eval_split, float) and self.eval_split == 1:
            raise ValueError("eval_split: 1.0 may mean one row or all of them; write 1 for one row")
        if self.eval_split >= 1 and self.eval_split != int(self.eval_split):
            raise ValueError(
                "eval_split: a number of rows must be whole; a fraction must be below 1"
            )
        problems = [_weights_problem("sources", self.sources)]
        if self.template not in ("tokenizer", "none") and not self.template.endswith(
            TEMPLATE_TYPES
        ):
            problems.append(
                f'template: {self.template!r} is neither "tokenizer", which is the model\'s own, "none" nor a .jinja '
                "file; no template comes by name: put another one into a file"
            )
        if self.rehearsal:
            problems.append(_weights_problem("rehearsal.source", self.rehearsal.source))
        if any(source.weight is not None for source in self.eval_sources):
            problems.append("eval_sources: a weight means nothing here; every held-out row counts")
        if self.weights_by and not self.weighted:
            problems.append("weights_by: no source has a weight")
        elif self.weights_by and self.rehearsal and self.weights_by != self.rehearsal.by:
            problems.append("weights_by: a mix has one unit; data.rehearsal.by names it")
        if found := [problem for problem in problems if problem]:
            raise ValueError("\n".join(found))
        return self

    @property
    def weighted(self) -> bool:
        rehearsed = self.rehearsal.source if self.rehearsal else []
        return any(source.weight is not None for source in (*self.sources, *rehearsed))

    @property
    def mix_unit(self) -> MixUnit:
        return self.rehearsal.by if self.rehearsal else self.weights_by or "tokens"

    @property
    def has_eval(self) -> bool:
        return bool(self.eval_sources) or self.eval_split > 0


class TrainSection(Section):
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    micro_batch: int = Field(default=2, ge=1)
    """Sequences per forward pass. Not given, a run on a GPU may choose others with as many per optimizer step."""
    accumulation: int | None = Field(default=None, ge=1)
    effective_batch: int | None = Field(default=None, ge=1)
    """Sequences per optimizer step: micro_batch x accumulation. Give one of the two."""
    lr: float = Field(default=2e-4, gt=0)
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """The part of all steps over which the learning rate rises from 0."""
    optimizer: Literal["adamw_8bit", "paged_adamw_8bit", "adamw"] = "adamw_8bit"
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    log_every_steps: int = Field(default=1, ge=1)
    eval_every_steps: int | None = Field(default=None, ge=1)
    save_every_steps: int | None = Field(default=None, ge=1)
    """Unset, both happen at the end of every epoch."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest so many stay on disk; the best one stays as well."""
    keep_best: bool = False
    """The adapter is the one with the lowest loss on the held-out rows, not the last."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a lower loss."""
    checkpointing: Literal["auto", "unsloth", "offload", "full", "none"] = "auto"
    """What layers compute again in backward instead of keeping it. full: all but each layer's input; offload: what is
    kept for it is in host memory meanwhile; unsloth: the same by unsloth's own code; none: nothing. auto is the
    fastest that fits by plan's figures (memory.vram), and where nothing surely does unsloth's on its engine and full on
    the other; on a CPU it is none. memory.keep_layers and keep_attention_layers lie in between."""
    chunked_loss: bool | None = None
    """peft engine: take the loss in chunks of the labelled tokens, without ever holding the logits. Measured on an H100
    with 4,096 tokens of 128,256 logits: 13.8 ms and 0.3 GiB instead of 20.9 ms and 6.9. Unset: where fastlora's kernels
    run, and always with an adapter on the output layer. The unsloth engine has its own way of it."""
    seed: int = Field(default=3407, ge=0, le=2**32 - 1)
    """Up to what NumPy takes."""

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        problems = []
        if self.epochs is not None and self.steps is not None:
            problems.append("epochs: give either epochs or steps, not both")
        if self.accumulation is not None and self.effective_batch is not None:
            problems.append("accumulation: give either accumulation or effective_batch, not both")
        if self.effective_batch is not None and self.effective_batch % self.micro_batch:
            problems.append(
                f"effective_batch: {self.effective_batch} is not a multiple of micro_batch ({self.micro_batch})"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def accumulation_steps(self) -> int:
        if self.effective_batch is not None:
            return self.effective_batch // self.micro_batch
        return self.accumulation or 1


Metric = Literal["exact_match", "json_valid", "chrf", "rouge_l"]
_ANSWERED_ROWS = 8


class MemorySection(Section):
    """What is kept on the GPU. None of it changes what is learnt."""

    vram: str | None = None
    """The most that the run may take of the GPU, context and all, such as "12GiB"; "auto" is what is free. What the
    recipe leaves open among train.micro_batch (at the same effective batch), train.checkpointing, the next five keys
    and dense_layers is then chosen: the fastest, by `fastlora plan`'s figures, that fits. Unset, no limit is set,
    streaming and embedding stay, and the others are chosen for 0.9 of what is free; all but train.micro_batch only
    where train.checkpointing is auto."""
    keep_layers: int | None = Field(default=None, ge=0)
    """So many of the last layers keep all that their backward needs, and compute nothing again."""
    keep_attention_layers: int | None = Field(default=None, ge=0)
    """So many layers before those keep attention's output and those of its projections, so that of their products gate
    and up alone are computed again; where fastlora's kernels do not run the projections, attention's output alone."""
    keep_dequantized: bool | None = None
    """Keep what a layer that is computed again makes of its 4-bit weights until its backward, which comes at once, so
    that they are dequantized twice a step and not three times. Where fastlora's kernels and checkpointing run."""
    stream_layers: int | None = Field(default=None, ge=0)
    """So many layers' frozen weights are in host memory, and come to the GPU when their turn comes."""
    embedding: Literal["gpu", "host"] | None = None
    """Where the input embedding is. host: in pinned host memory, from which the GPU reads the rows of a micro-batch's
    tokens over the bus. One that has an adapter, or is the output layer's weight too, stays on the GPU. Unset,
    memory.vram chooses; without it, it is on the GPU, unless unsloth moves it in its own way (docs/memory.md)."""
    cuda_graphs: bool | None = None
    """Record a micro-batch's forward and backward once for each shape, and replay them, so that the GPU never waits
    for Python. Rows are then padded to few lengths. Unset, a run on a GPU does so where it is predicted to save more
    time than the padding costs."""
    dense_layers: int | None = Field(default=None, ge=0)
    """So many of the last layers' 4-bit weights are dequantized once a step, and not in each micro-batch: 2 bytes a
    weight. With fastlora's kernels (kernels.mode) and memory.cuda_graphs alone."""

    @model_validator(mode="after")
    def _check(self) -> MemorySection:
        if self.vram not in (None, "auto") and gib_of(self.vram) is None:
            raise ValueError(
                f'vram: {self.vram!r} is not an amount of memory; write "12GiB", or "auto"'
            )
        return self

    @property
    def vram_gib(self) -> float | None:
        """None: not given, or auto."""
        return None if self.vram is None else gib_of(self.vram)


class EvalSection(Section):
    """Prompts answered greedily by the model before and after training, side by side in comparison.json."""

    rows: int | None = Field(default=None, ge=0)
    """So many held-out rows, evenly spread; unset, 8 of them where there are any."""
    prompts: str | list[str] = []
    """More prompts: a list of texts, or a data file whose rows may lack the answer."""
    metrics: list[Metric] = []
    """Taken of both answers, against the row's own; chrf and rouge_l need `pip install 'fastlora[metrics]'`."""
    max_new_tokens: int = Field(default=64, ge=1)
    max_minutes: float = Field(default=10, gt=0)
    """Before and after training each: prompts not reached by then are left out."""

    @property
    def held_out_rows(self) -> int:
        return _ANSWERED_ROWS if self.rows is None else self.rows


class KernelsSection(Section):
    mode: Literal["auto", "off", "all"] = "auto"
    """Where fastlora's kernels run. auto: on a GPU, every LoRA layer that unsloth does not fuse, and on the peft
    engine every one they can serve; on a CPU, where they are for tests alone, none unless FASTLORA_KERNELS
    is set. off: none. all: as auto, with unsloth's fused LoRA kernels taken out first, and on a CPU too. A run that
    has auto takes all by itself where micro-batches are recorded (memory.cuda_graphs), and off where unsloth fuses no
    layer and the GPU is predicted to wait for Python."""
    require_fast: bool = False
    """Refuse to train where PEFT's plain layer would run any LoRA layer, or where, unless train.chunked_loss is false,
    the loss would hold all logits."""


class CheckSection(Section):
    """Limits and gates of `fastlora check`. A run whose recipe sets a gate checks every row before the model loads."""

    min_answer_chars: int = Field(default=1, ge=1)
    max_answer_chars: int | None = Field(default=None, ge=1)
    min_answer_tokens: int | None = Field(default=None, ge=1)
    """Supervised tokens of a row, with the one that ends the answer."""
    max_answer_tokens: int | None = Field(default=None, ge=1)
    near_similarity: float = Field(default=0.8, ge=0.7, le=1)
    """From which Jaccard similarity of their three-word pieces on two texts are near duplicates."""
    require_no: list[str] = []
    """Gate: kinds of finding, or first words of kinds, that may not occur, e.g. ["leakage", "duplicate_pair"]."""
    max_share: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Gate: the share of all rows that kinds of finding may have, e.g. { near = 0.02 }."""
    max_lost_answer_tokens_share: float | None = Field(default=None, ge=0, le=1)
    """Gate: the share of the supervised tokens that model.seq_len_tokens may cut off."""

    @model_validator(mode="after")
    def _check(self) -> CheckSection:
        problems = []
        for key, names in (("require_no", self.require_no), ("max_share", [*self.max_share])):
            for name in names:
                if not selected(name):
                    near = difflib.get_close_matches(name, KINDS, n=1)
                    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KINDS)}"
                    problems.append(f"{key}: no finding is named {name!r}; {hint}")
        for unit in ("chars", "tokens"):
            least, most = (getattr(self, f"{end}_answer_{unit}") for end in ("min", "max"))
            if least and most and least > most:
                problems.append(
                    f"min_answer_{unit}: {least} is above max_answer_{unit} ({most}), which no answer meets"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def has_gates(self) -> bool:
        lost = self.max_lost_answer_tokens_share is not None
        return bool(self.require_no or self.max_share) or lost


class OutputSection(Section):
    dir: str = Field(min_length=1)
    """Each run gets a new numbered folder in it."""
    merge: Literal["none", "16bit"] = "none"
    export: list[Literal["f16", "bf16", "q8_0", "q4_k_m"]] = []
    """GGUF files to make of the adapter and its base, each with a Modelfile for Ollama."""
    report_to: list[Literal["tensorboard", "wandb"]] = []


AdvisedKey = Literal[
    "all", "data.sources", "data.eval_split", "data.rehearsal", "train.lr", "train.epochs", "train.effective_batch",
    "train.eval_every_steps", "lora.rank", "lora.alpha", "lora.dropout", "model.seq_len_tokens",
]  # fmt: skip


class AdviceSection(Section):
    ignore: list[AdvisedKey] = []
    """Keys about which no advice is wanted, e.g. ["train.lr"]; ["all"] for none at all."""


class Recipe(Section):
    engine: Literal["auto", "unsloth", "peft"] = "auto"
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    check: CheckSection = CheckSection()
    train: TrainSection = TrainSection()
    kernels: KernelsSection = KernelsSection()
    memory: MemorySection = MemorySection()
    eval: EvalSection = EvalSection()
    output: OutputSection
    advice: AdviceSection = AdviceSection()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = []
        if not self.data.has_eval:
            wants = {
                "train.keep_best": self.train.keep_best,
                "train.early_stopping_patience": self.train.early_stopping_patience,
                "train.eval_every_steps": self.train.eval_every_steps,
                "eval.rows": self.eval.rows,
                "eval.metrics": self.eval.metrics and not self.eval.prompts,
            }
            problems += [
                f"{key}: needs held-out rows; set data.eval_split or data.eval_sources"
                for key, wanted in wants.items()
                if wanted
            ]
        if self.eval.metrics and self.eval.rows == 0 and not self.eval.prompts:
            problems.append("eval.metrics: no prompt is answered; set eval.rows or eval.prompts")
        if self.kernels.require_fast and self.kernels.mode == "off" and self.engine == "peft":
            problems.append(
                'kernels.require_fast: with engine = "peft" and kernels.mode = "off" no layer is fast; '
                'set kernels.mode = "auto"'
            )
        if self.model.quantization != "none" and self.lora.bias != "none":
            problems.append(
                f"lora.bias: {self.lora.bias!r} trains base biases, which a quantized base keeps frozen; "
                'set lora.bias = "none" or model.quantization = "none"'
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
