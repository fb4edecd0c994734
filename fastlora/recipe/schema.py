"""The recipe: one typed section per part of a run. Units live in the names.

Every section refuses unknown keys and coerces nothing ("16" is not 16), because a mistyped or
mistaken key that is silently ignored costs its user an evening.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fastlora.recipe.findings import KINDS, selected

DataFormat = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text"]


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


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceSection, BeforeValidator(_source)]


class DataSection(Section):
    sources: list[Source] = Field(min_length=1)
    eval_sources: list[Source] = []
    eval_split: int | float = Field(default=0, ge=0)
    """Held out from the sources: a fraction if below 1, else a number of rows; 0 holds out none."""
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
        return self

    @property
    def has_eval(self) -> bool:
        return bool(self.eval_sources) or self.eval_split > 0


class TrainSection(Section):
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    micro_batch: int = Field(default=2, ge=1)
    """Sequences per forward pass."""
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
    checkpointing: Literal["auto", "unsloth", "full", "none"] = "auto"
    """Gradient checkpointing; auto is unsloth's on its engine, full on other GPUs, none on a CPU."""
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


class EvalSection(Section):
    exact_match_rows: int = Field(default=0, ge=0)
    """Held-out rows answered greedily before and after training and compared word for word."""
    max_new_tokens: int = Field(default=64, ge=1)


class KernelsSection(Section):
    mode: Literal["auto", "off", "all"] = "auto"
    """Where fastlora's kernels run. auto: on a GPU, every LoRA layer that unsloth does not fuse, and on the peft
    engine every one they can serve; on a CPU, where they are for tests alone, none unless FASTLORA_KERNELS
    is set. off: none. all: as auto, with unsloth's fused LoRA kernels taken out first, and on a CPU too."""
    require_fast: bool = False
    """Refuse to train where PEFT's plain layer would run any LoRA layer."""


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
    report_to: list[Literal["tensorboard", "wandb"]] = []


class Recipe(Section):
    engine: Literal["auto", "unsloth", "peft"] = "auto"
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    check: CheckSection = CheckSection()
    train: TrainSection = TrainSection()
    kernels: KernelsSection = KernelsSection()
    eval: EvalSection = EvalSection()
    output: OutputSection

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = []
        if not self.data.has_eval:
            wants = {
                "train.keep_best": self.train.keep_best,
                "train.early_stopping_patience": self.train.early_stopping_patience,
                "train.eval_every_steps": self.train.eval_every_steps,
                "eval.exact_match_rows": self.eval.exact_match_rows,
            }
            problems += [
                f"{key}: needs held-out rows; set data.eval_split or data.eval_sources"
                for key, wanted in wants.items()
                if wanted
            ]
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
