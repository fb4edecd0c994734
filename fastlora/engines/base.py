"""What the trainer asks of an engine, and what the engines share."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastlora.errors import EngineError
from fastlora.recipe.schema import ModelSection, Recipe, trained_whole_by_unsloth

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Announce = Callable[[str], None]
"""Tells the user and the manifest about a choice or a fallback."""
PACKED_LENGTHS = "packed_seq_lengths"
"""unsloth's model input for packed rows: int32, (rows,)."""
CUMULATIVE_LENGTHS = "cu_seq_lens_q"
"""The model input, named as transformers names it, that says where packed rows end: int32, (rows + 1,), from 0 on."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    needs_cuda: bool
    checkpointing: tuple[str, ...]
    """Values of train.checkpointing that it has, the default on a GPU first."""
    streams_layers: bool = False
    """Whether it has memory.stream_layers."""


class Engine(Protocol):
    name: str
    capabilities: Capabilities
    longest_packed: int
    """Of packed rows that come with CUMULATIVE_LENGTHS, the most tokens that the model takes of one
    (engines/packed.py); 0: they come without."""

    def prepare(self) -> None:
        """Import the framework. Before transformers, trl and peft, which it may patch."""

    def load(self, recipe: Recipe, announce: Announce) -> PeftModel:
        """The base, quantized as the recipe says, with a new adapter in float32.

        Raises EngineError: the model cannot be found, or the engine cannot do what is asked.
        """

    def packed_inputs(self, seq_lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        """Model inputs that keep the rows of one packed sequence (batch 1) from attending to each other."""

    def generating(self, model: PeftModel) -> AbstractContextManager[None]:
        """Within it the model generates; after it the model trains on."""

    def layers_are_recomputed(self, model: PeftModel) -> None:
        """fastlora's checkpointing is on `model` now: leave it on."""

    def drop_broken_step(self) -> None:
        """Let go of what the framework keeps, outside of the model, of a forward or backward that broke off."""


def prefer_expandable_segments() -> None:
    """Let PyTorch's GPU memory grow in place: without it 12.7 GiB in use took 14.5 of the card, in pieces too
    small to be used again (8B, peft engine). Unsloth asks for the same. Before the first tensor is on the GPU."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def resolve_dtype(model: ModelSection) -> torch.dtype:
    """The compute type that model.dtype stands for on this machine.

    Raises EngineError: bfloat16 on a GPU without it.
    """
    import torch

    cuda = torch.cuda.is_available()
    if model.dtype == "auto":
        if not cuda:
            return torch.float32
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    if (
        model.dtype == "bfloat16"
        and cuda
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise EngineError(
            f'model.dtype: {torch.cuda.get_device_name()} has no bfloat16; set model.dtype = "auto" (float16 there)'
        )
    dtype = getattr(torch, model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resolve_checkpointing(recipe: Recipe, engine: Engine) -> str:
    """The gradient checkpointing that train.checkpointing stands for.

    Raises EngineError: the engine does not have it.
    """
    import torch

    wanted = recipe.train.checkpointing
    if wanted == "auto":
        return engine.capabilities.checkpointing[0] if torch.cuda.is_available() else "none"
    if wanted not in engine.capabilities.checkpointing:
        why = recipe.lora.why_not_unsloth if wanted == "unsloth" else ""
        raise EngineError(
            f"train.checkpointing: the {engine.name} engine has no {wanted!r}; "
            f"it has {', '.join(engine.capabilities.checkpointing)}{why and f', and {why}'}"
        )
    return wanted


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, padding on the right.

    Raises EngineError: it cannot be found.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # the Hub client and the tokenizers raise many unrelated types
        raise EngineError(not_loadable(model.name, error)) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # Labels are masked by position, so padding with EOS teaches nothing wrong.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def target_problems(
    targets: Sequence[str], config: PretrainedConfig, engine: Engine | None, announce: Announce
) -> list[str]:
    """One line for each of lora.target_modules that names no layer of the model, with the nearest that
    do, or one whose adapter could not be trained. Layers are known by the ends of their names,
    as in PEFT. No weight is read: the model is built from its configuration on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # code of the model's own, or too new an architecture
        announce(f"lora.target_modules: not checked before loading ({type(error).__name__})")
        return []
    _forget_classes(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() >= 2
    }
    ends = sorted({name.rpartition(".")[2] for name in layers})
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    problems = []
    for target in targets:
        named = [
            module
            for name, module in layers.items()
            if name == target or name.endswith(f".{target}")
        ]
        if not named:
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            reason = f"the model has no {target}; {hint}It has {', '.join(ends)}"
        elif not any(module is head or module is embedding for module in named):
            continue
        elif engine and engine.name == "unsloth":
            reason = f'{trained_whole_by_unsloth(target)}; leave it out, or set engine = "peft"'
        elif engine and engine.name == "liger" and any(module is head for module in named):
            reason = f"liger takes its loss from {target}'s weight, past an adapter; leave it out"
        else:
            if model.config.tie_word_embeddings:
                announce(
                    "lora.target_modules: embedding and output layer share one weight (tie_word_embeddings); the "
                    f"adapter changes {target} alone, and a merged or exported model holds both"
                )
            continue
        problems.append(f"lora.target_modules: {reason}")
    return problems


def _forget_classes(model: torch.nn.Module) -> None:
    """transformers' packages keep a class that they were asked for. unsloth puts one of its own in its place, but in
    the module, and would then load the model as transformers'."""
    from transformers.utils.import_utils import _LazyModule

    for kind in {type(module) for module in model.modules()}:
        package = sys.modules.get(kind.__module__.rpartition(".")[0])
        if isinstance(package, _LazyModule):
            vars(package).pop(kind.__name__, None)


def not_loadable(name: str, error: Exception) -> str:
    from safetensors import SafetensorError

    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, SafetensorError):
        again = (
            "copy the folder"
            if Path(name).is_dir()
            else f"download it (hf download {name} --force-download)"
        )
        return f"model.name: a weight file of {name} is damaged or incomplete ({reason}); {again} again"
    if Path(name).is_dir():
        if isinstance(error, ValueError) and "backend tokenizer" in reason:
            reason = "no tokenizer.json or other vocabulary is in it"
        return (
            f"model.name: the folder {name} cannot be loaded ({reason}). Copy or download all of the model's files: "
            "config.json, tokenizer and weights"
        )
    if Path(name).is_absolute():
        return (
            f"model.name: {name} cannot be loaded (no such folder). Check the spelling; paths in a recipe are taken "
            "from its own folder, those in --set from here"
        )
    return (
        f"model.name: {name} cannot be loaded ({reason}). Check the spelling of the Hub id or the path; a gated "
        "model needs `hf auth login`; without internet, download it first and give the folder's path."
    )


def where_they_end(seq_lengths: Sequence[int], longest: int) -> dict[str, torch.Tensor]:
    """CUMULATIVE_LENGTHS of packed rows, none of which may be longer than `longest`: what is longer would be left as
    memory was, and nothing say so. 0: the model takes none."""
    import torch

    if not longest:
        return {}
    if max(seq_lengths) > longest:
        raise ValueError(f"a packed row of {max(seq_lengths)} tokens where {longest} are the most")
    return {CUMULATIVE_LENGTHS: torch.tensor([0, *accumulate(seq_lengths)], dtype=torch.int32)}


def new_position_ids(seq_lengths: Sequence[int]) -> torch.Tensor:
    """Positions that start again at every row of a packed sequence: shape (1, sum of lengths)."""
    import torch

    return torch.cat([torch.arange(length) for length in seq_lengths]).unsqueeze(0)
