"""Which kernel runs each LoRA layer: unsloth's fused one, fastlora's, or PEFT's plain layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from fastlora.engines.base import Announce, Engine, resolve_dtype
from fastlora.engines.embedding import embedding_line, embedding_to_host
from fastlora.engines.kept import keep_as_asked
from fastlora.engines.memory import GIB, cap_memory, pinned_bytes
from fastlora.engines.packed import keep_rows_apart
from fastlora.engines.unsloth import fused_layers, group_qkv, why_not_fused, without_fused_lora
from fastlora.errors import EngineError
from fastlora.plan.working import CONTEXT, page_table_bytes
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Kernel = Literal["unsloth fused", "fastlora", "PEFT"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which kernels are to run."""

    ours: bool
    """fastlora's, on what unsloth does not fuse."""
    why_not_ours: str = ""
    unsloths: bool = True
    """False takes its fused ones out."""
    dtype: torch.dtype | None = None
    """In which the model is to compute; None: not known."""


@dataclass(frozen=True, slots=True)
class Engaged:
    """LoRA layers of one kind that one kernel runs for one reason."""

    kind: str
    """Last part of the layers' names, as q_proj."""
    count: int
    kernel: Kernel
    reason: str
    """Why no faster kernel runs them; for fastlora's, why not unsloth's. Empty where nothing is to say."""


def plan_kernels(recipe: Recipe) -> Plan:
    """What kernels.mode stands for on this machine."""
    import torch
    from fastlora_kernels import dispatch

    mode, cuda, dtype = recipe.kernels.mode, torch.cuda.is_available(), resolve_dtype(recipe.model)
    asked = dispatch.wanted() is not None
    why_not = ""
    if mode == "off":
        why_not = 'kernels.mode = "off"'
    elif not cuda and mode == "auto" and not asked:
        why_not = "fastlora's kernels need a GPU"
    elif not cuda and dtype == torch.float16:
        why_not = "float16 on a CPU, which is trained without autocast"  # their dtypes then differ
    elif cuda and not asked and find_spec("triton") is None:
        why_not = "Triton is not installed"
    return Plan(ours=not why_not, why_not_ours=why_not, unsloths=mode != "all", dtype=dtype)


def load_model(
    engine: Engine, recipe: Recipe, announce: Announce
) -> tuple[PeftModel, list[Engaged]]:
    """The engine's model with the recipe's kernels and checkpointing on it, and what runs its LoRA layers, announced.

    Raises EngineError: as the engine does; its layers cannot be recomputed as asked; and a layer is slow although
    kernels.require_fast is set.
    """
    cap_as_asked(recipe, engine)
    model = engine.load(recipe, announce)
    if recipe.memory.embedding == "host":
        announce(embedding_line(model, embedding_to_host(model)))
    rows = engage(model, engine.name, plan_kernels(recipe))
    for line in lines(rows):
        announce(line)
    if recipe.kernels.require_fast and (problems := list(_slow(rows))):
        raise EngineError("\n".join(problems) + ", or set kernels.require_fast = false")
    keep_as_asked(model, engine, recipe, announce)
    keep_rows_apart(model, engine, recipe, announce)
    return model, rows


def cap_as_asked(recipe: Recipe, engine: Engine, planned: float = 0.0) -> None:
    """memory.vram as a limit of this process. Of what others hold no more counts in than a CUDA context may be.
    `planned`: its bytes as predicted, with page tables of what not PyTorch pins (streamed weights, an embedding)."""
    context = CONTEXT[engine.name] + page_table_bytes(pinned_bytes())
    cap_memory(recipe.memory.vram_gib, max(context, planned) / GIB)


def engage(model: PeftModel, engine: str, plan: Plan) -> list[Engaged]:
    """Put the planned kernels on a model that `engine` loaded; what runs its LoRA layers then, in the
    order of the model. Read off the layers themselves: unsloth's log counts some as fused that are not."""
    from fastlora_kernels import attach
    from peft.tuners.lora import LoraLayer

    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    fused_before = fused_layers(model)
    if fused_before and not plan.unsloths:
        without_fused_lora(model)
    # What unsloth fuses is attached to as well: there ours run whenever its kernels decline a call.
    left = attach(model).by_layer if plan.ours else dict.fromkeys(names, plan.why_not_ours)
    if plan.ours:
        left = {n: left[n] or _other_dtype(model.get_submodule(n), plan.dtype) for n in names}
        if engine == "unsloth":
            group_qkv(model)
    fused = fused_layers(model)
    counts: Counter[tuple[str, Kernel, str]] = Counter()
    for name in names:
        kernel: Kernel = "unsloth fused" if name in fused else "fastlora"
        reasons = []
        if kernel != "unsloth fused":
            if engine == "unsloth":
                taken_out = name in fused_before
                why = (
                    "their fused kernels were taken out"
                    if taken_out
                    else why_not_fused(model, name)
                )
                reasons.append(f"unsloth leaves them: {why}")
            if not plan.ours or left[name]:
                kernel = "PEFT"
                reasons += [left[name]] if left[name] else []
            elif backend := _other_backend():
                reasons.append(backend)
        counts[name.rpartition(".")[2], kernel, "; ".join(reasons)] += 1
    return [Engaged(kind, count, kernel, why) for (kind, kernel, why), count in counts.items()]


def _other_dtype(layer: Any, dtype: torch.dtype | None) -> str:
    """Why a layer that `attach` serves is PEFT's in a run that computes in `dtype`; empty if it is not. A base that was
    quantized beforehand computes in the dtype that its checkpoint says; ours take base, adapter and x in one."""
    its = getattr(layer.base_layer, "compute_dtype", None)
    if None in (its, dtype) or its == dtype:
        return ""
    its, ours = (str(one).removeprefix("torch.") for one in (its, dtype))
    return f"its checkpoint computes in {its}, the run in {ours}"


def lines(rows: Sequence[Engaged]) -> Iterator[str]:
    """For the user: a line for each kernel and reason, the fastest kernel first."""
    for kernel, reason, same in _grouped(rows):
        yield f"kernels: {kernel} {_total(same)} ({_kinds(same)}{'; ' if reason else ''}{reason})"


def loss_line(reason: str | None, why: str = "") -> str:
    """For the user: whose loss, by what `attach_head` said of it."""
    return (
        f"loss: it holds all logits{why} ({reason})"
        if reason
        else "loss: fastlora, without the logits"
    )


def _total(rows: Sequence[Engaged]) -> int:
    return sum(row.count for row in rows)


def _kinds(rows: Sequence[Engaged]) -> str:
    return ", ".join(f"{row.kind} {row.count}" for row in rows)


def _grouped(rows: Sequence[Engaged]) -> Iterator[tuple[Kernel, str, list[Engaged]]]:
    """(kernel, reason, the rows of both)."""
    order: tuple[Kernel, ...] = ("unsloth fused", "fastlora", "PEFT")
    for kernel in order:
        for reason in dict.fromkeys(row.reason for row in rows if row.kernel == kernel):
            same = [row for row in rows if (row.kernel, row.reason) == (kernel, reason)]
            yield kernel, reason, same


def _other_backend() -> str:
    """What runs in place of Triton on a GPU, if anything."""
    import torch
    from fastlora_kernels import dispatch

    if asked := dispatch.wanted():
        return f"FASTLORA_KERNELS={asked}"
    return "" if torch.cuda.is_available() else "their reference in PyTorch, on a CPU"


# A piece of the reason -> how to mend it. The first that is in it counts.
_REMEDIES = {
    "dropout": "set lora.dropout = 0",
    "rank above": "set lora.rank to 256 or less",
    "base layer is trained too": 'set lora.bias = "none"',
    "8-bit": 'set model.quantization = "nf4"',
    "its checkpoint computes in": "set model.dtype to its",
    'kernels.mode = "off"': 'set kernels.mode = "auto"',
    "need a GPU": "train on a GPU",
    "Triton": "pip install triton",
    "DoRA": "set lora.dora = false",
}


def remedy(reason: str, otherwise: str) -> str:
    """How to mend why something fast does not run; `otherwise` where nothing is known."""
    return next((mend for piece, mend in _REMEDIES.items() if piece in reason), otherwise)


def _slow(rows: Sequence[Engaged]) -> Iterator[str]:
    """A line for each reason for which layers run in PEFT's plain form."""
    for kernel, reason, same in _grouped(rows):
        if kernel == "PEFT":
            names = ", ".join(row.kind for row in same)
            mend = remedy(reason, f"leave {names} out of lora.target_modules")
            yield (
                f"kernels.require_fast: PEFT's plain layer runs {_total(same)} LoRA layers ({_kinds(same)}): "
                f"{reason}; {mend}"
            )
