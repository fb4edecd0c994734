"""What a benchmark is made of: suites and arms as they are asked for, rows and gates as they come back."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from fastlora.errors import UsageError
from fastlora.plan.advise import batches
from fastlora.recipe.schema import (
    DataSection,
    KernelsSection,
    LoraSection,
    ModelSection,
    OutputSection,
    Recipe,
    Section,
    TrainSection,
)

SCHEMA_VERSION = 1

# What an arm's name can switch, and on which engines: `unsloth-kernels+graphs` is unsloth without its
# fused LoRA kernels and with CUDA graphs. Those of NUMBERED have a number behind them: `unsloth+keep8`.
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "+fastlora": (("peft", "liger", "unsloth"), "our kernels where the engine has none"),
    "+graphs": (("unsloth",), "decoder layers as CUDA graphs"),
    "+offload": (("peft", "unsloth"), "checkpoints in host memory, by fastlora"),
    "+keep": (("peft", "unsloth"), "layers that are kept whole"),
    "+attention": (("peft", "unsloth"), "layers that keep their attention"),
    "+dequantized": (("peft", "unsloth"), "dequantized weights kept until backward"),
    "+stream": (("unsloth",), "layers whose weights are in host memory"),
    "+hostembed": (("peft", "liger", "unsloth"), "the input embedding in host memory"),
    "+record": (("peft", "unsloth"), "micro-batches as CUDA graphs (memory.cuda_graphs)"),
    "+dense": (("peft", "unsloth"), "layers that are dequantized once a step"),
    "+budget": (("peft", "unsloth"), "memory.vram = --vram-cap, or what is free"),
    "+batch": (("peft", "liger", "unsloth"), "rows of a micro-batch, at the same rows a step"),
    "+packing": (("peft", "liger", "unsloth"), "rows packed instead of padded"),
    "-kernels": (("unsloth",), "without fused LoRA kernels"),
    "-loss": (("unsloth",), "logits kept, loss taken from them"),
    "-offload": (("unsloth",), "checkpoints stay on the GPU"),
    "-checkpointing": (("peft", "liger", "unsloth"), "no gradient checkpointing"),
    "-optimizer": (("peft", "liger", "unsloth"), "AdamW with 32-bit state"),
}
_MEMORY = {
    "+keep": "keep_layers", "+attention": "keep_attention_layers", "+stream": "stream_layers",
    "+dense": "dense_layers",
}  # fmt: skip
"""Key of [memory]."""
NUMBERED = frozenset({*_MEMORY, "+batch"})
_CHECKPOINTS = {"-checkpointing": "none", "-offload": "full", "+offload": "offload"}
"""train.checkpointing"""
ENGINES = ("peft", "liger", "unsloth")


def kind_of(option: str) -> str:
    """Without its number."""
    return option.rstrip("0123456789")


class Arm(BaseModel):
    """An engine with options: `peft`, `unsloth+fastlora`, `unsloth-checkpointing`."""

    model_config = ConfigDict(frozen=True)

    name: str
    engine: str
    options: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Raises UsageError: no such engine, or an option that the engine does not have."""
        engine, *given = re.split(r"(?=[+-])", text.strip())
        if engine not in ENGINES:
            raise UsageError(f"--arms {text}: no engine {engine!r}; known: {', '.join(ENGINES)}")
        options: dict[str, str] = {}
        for option in given:
            name, number = kind_of(option), option.removeprefix(kind_of(option))
            right = name in OPTIONS and bool(number) == (name in NUMBERED)
            if not right or engine not in OPTIONS[name][0]:
                known = [
                    name + ("N" if name in NUMBERED else "")
                    for name, (engines, _) in OPTIONS.items()
                    if engine in engines
                ]
                raise UsageError(
                    f"--arms {text}: {engine} has no option {option!r}; it has {' '.join(known)}"
                )
            if number:
                option = f"{name}{int(number)}"
            if options.setdefault(name, option) != option:
                raise UsageError(f"--arms {text}: {options[name]} and {option} exclude each other")
        if len(both := [name for name in _CHECKPOINTS if name in options]) > 1:
            raise UsageError(f"--arms {text}: {both[0]} and {both[1]} exclude each other")
        if "+dequantized" in options:
            # unsloth compiles layers that are not recorded.
            ours = engine == "peft" or (
                "+record" in options and options.keys() & {"+offload", "-offload", "+budget"}
            )
            if "+fastlora" not in options or "-checkpointing" in options or not ours:
                raise UsageError(
                    f"--arms {text}: +dequantized needs fastlora's kernels and checkpointing; add +fastlora and, on "
                    "unsloth, +record and +offload or -offload"
                )
        if "+dense" in options and not {"+record", "+fastlora"} <= options.keys():
            raise UsageError(
                f"--arms {text}: +dense is for recorded micro-batches and fastlora's kernels; add +record and +fastlora"
            )
        if engine == "peft" and "+record" in options and "+fastlora" not in options:
            raise UsageError(f"--arms {text}: +record needs fastlora's loss; add +fastlora")
        if engine == "unsloth" and "+record" in options:
            if "+graphs" in options:
                raise UsageError(f"--arms {text}: +graphs and +record exclude each other")
            if not options.keys() & {*_CHECKPOINTS, "+budget"}:  # a budget may choose another
                raise UsageError(
                    f"--arms {text}: unsloth's own checkpointing cannot be recorded; add +offload (fastlora's), "
                    "-offload (fastlora's, on the GPU) or -checkpointing"
                )
        # One name for one arm, in whatever order it was typed.
        ordered = [options[name] for name in OPTIONS if name in options]
        return cls(name="".join([engine, *ordered]), engine=engine, options=frozenset(ordered))

    @property
    def packed(self) -> bool:
        return "+packing" in self.options

    @property
    def micro_batch(self) -> int | None:
        """None: the suite's."""
        found = [one.removeprefix("+batch") for one in self.options if kind_of(one) == "+batch"]
        return int(found[0]) if found else None

    def recipe(self, recipe: Recipe, vram_cap_gib: float | None = None) -> Recipe:
        """The recipe as this arm trains it, on a GPU of that size. (Its engine is not the recipe's to name: there is no
        liger in recipes.)"""
        train: dict[str, Any] = {"chunked_loss": None}
        memory: dict[str, Any] = {}
        for option in self.options:
            kind = kind_of(option)
            if kind in _CHECKPOINTS:
                train["checkpointing"] = _CHECKPOINTS[kind]
            if kind in _MEMORY:
                memory[_MEMORY[kind]] = int(option.removeprefix(kind))
        if self.micro_batch is not None:
            rows = recipe.train.micro_batch * recipe.train.accumulation_steps
            given = batches(recipe, self.micro_batch, rows)
            train |= {key.removeprefix("train."): value for key, value in given.items()}
        if "-optimizer" in self.options:
            train["optimizer"] = "adamw"
        if "+dequantized" in self.options:
            memory["keep_dequantized"] = True
        if "+hostembed" in self.options:
            memory["embedding"] = "host"
        if "+record" in self.options:
            memory["cuda_graphs"] = True
        if "+budget" in self.options:
            memory["vram"] = f"{vram_cap_gib}GiB" if vram_cap_gib else "auto"
        return recipe.model_copy(
            update={
                "train": recipe.train.model_copy(update=train),
                "memory": recipe.memory.model_copy(update=memory),
                "data": recipe.data.model_copy(update={"packing": self.packed}),
                "kernels": KernelsSection(mode=self.kernels),
            }
        )

    @property
    def kernels(self) -> Literal["auto", "off", "all"]:
        """What kernels.mode would have them run, for what is planned of the arm."""
        if "+fastlora" in self.options:
            return "all" if "-kernels" in self.options else "auto"
        return "auto" if self.engine == "unsloth" else "off"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that unsloth reads when it is imported or run."""
        found = {}
        if "+graphs" in self.options:
            found["UNSLOTH_BLOCK_CUDAGRAPHS"] = "1"
        if "-loss" in self.options:
            found["UNSLOTH_RETURN_LOGITS"] = "1"
        return found


class Work(Section):
    steps: int = Field(default=30, ge=6)
    """Optimizer steps; with real lengths, those of the packed rows."""
    warmup_steps: int = Field(default=3, ge=1)
    """Left out of the timing: they compile and tune."""
    lengths: Literal["full", "real"] = "full"
    """full: every row has seq_len_tokens; real: the long-tailed lengths of an instruction set."""
    seed: int = 0


class SuiteModel(Section):
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    seq_len_tokens: int = Field(default=2048, ge=8)


class Suite(Section):
    """A pinned comparison: random weights of a true shape, and what is done with them."""

    vram_gib: float = Field(ge=0)
    """What its hungriest arm needs; 0: it runs on a CPU."""
    chosen_by_vram: bool = True
    """Among those that `fastlora bench` without a name chooses from."""
    arms: list[str] = Field(min_length=1)
    parity_layers: int = Field(default=2, ge=1)
    """Depth of the model on which gradients are compared in float32."""
    shape: dict[str, Any]
    """The model's configuration, as in its config.json."""
    model: SuiteModel = SuiteModel()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    work: Work = Work()

    def recipe(self, checkpoint: str) -> Recipe:
        """The suite's settings as a recipe; its data section is never read."""
        return Recipe(
            model=ModelSection(name=checkpoint, **self.model.model_dump()),
            lora=self.lora,
            data=DataSection.model_validate({"sources": ["made by the benchmark"]}),
            train=self.train,
            output=OutputSection(dir="unused"),
        )


class Gate(BaseModel):
    """One check of one arm; `detail` has the figures and the allowance."""

    name: Literal["work", "loss", "gradients", "weights", "memory", "parity", "depth", "trajectory"]
    passed: bool
    detail: str


class Result(BaseModel):
    """Keeps NaN and infinity through JSON, where pydantic writes null and then refuses it as a float:
    the report of a run that diverged would not be readable again."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


class Spread(Result):
    p20: float
    p50: float
    p80: float


class ArmResult(Result):
    """One arm: what it measured, or why it could not. Where a gate is red the speeds are withheld."""

    arm: str
    status: Literal["ok", "red", "oom", "timeout", "failed", "interrupted"]
    detail: str = ""
    """What went wrong, in a line."""
    gates: list[Gate] = []
    tokens_per_s: Spread | None = None
    """Tokens without padding."""
    supervised_tokens_per_s: Spread | None = None
    step_s: Spread | None = None
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    driver_gib: float | None = None
    """The most in use on the GPU as its driver counts, with the CUDA context."""
    host_gib: float | None = None
    """The most of the host's memory at once, loading included: what the process wrote and what is pinned."""
    mfu: float | None = None
    """Share of the measured matrix-product ceiling: forward and dX, 4N FLOPs per token, and attention."""
    hfu: float | None = None
    """The same with what is recomputed."""
    losses: list[float] = []
    load_s: float | None = None
    notes: list[str] = []
    counted: dict[str, Any] = {}
    """Tokens, supervised tokens, padding, optimizer steps, digest of what was fed."""


class LedgerEntry(Result):
    """What one ingredient is worth: the arm that differs in it alone, beside the arm it differs from."""

    ingredient: str
    arm: str
    base: str
    tokens_per_s: float | None
    """None where that arm showed no speed."""
    base_tokens_per_s: float | None
    peak_reserved_gib: float | None
    base_peak_reserved_gib: float | None


Axis = Literal["seq_len_tokens", "micro_batch"]
AXES: tuple[Axis, ...] = get_args(Axis)


class Frontier(Result):
    """The most that fits: the longest row at batch 1, or the largest batch of rows of a length."""

    arm: str
    axis: Axis
    fits: int
    """The largest tried that fitted; 0: not even the smallest."""
    fails: int | None
    """The smallest tried that did not; None: the model's own limit was reached first."""
    tokens_per_s: float | None
    peak_reserved_gib: float | None
    detail: str = ""


class Report(Result):
    """What `fastlora bench --json` prints and report.json holds."""

    schema_version: int = SCHEMA_VERSION
    name: str
    """Suite or recipe."""
    model: str
    status: Literal["passed", "red", "partial"]
    """red: a gate failed; partial: an arm is missing, out of memory, or the benchmark was interrupted."""
    started: str
    seconds: float
    vram_cap_gib: float | None
    settings: dict[str, Any]
    """The recipe as it was run, the work, and the weights' origin."""
    environment: dict[str, Any]
    """machine, driver, versions, commit, dirty, and ceilings in TFLOP/s and GB/s."""
    arms: list[ArmResult]
    ledger: list[LedgerEntry] = []
    frontier: list[Frontier] = []
