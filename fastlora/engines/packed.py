"""How packed rows are kept apart: by their cumulative lengths where flash attention serves a model, else the engine's
own way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlora.engines.base import Announce, Engine, resolve_checkpointing, resolve_dtype
from fastlora.plan.setup import FUSED, records
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "granite"})
"""Architectures whose attention has nothing but a causal mask and, where config.json says so, a window."""


def keep_rows_apart(model: PeftModel, engine: Engine, recipe: Recipe, announce: Announce) -> None:
    """Where rows are packed and flash attention can keep them apart, let it, and `engine` hand it what it needs.

    On the unsloth engine where micro-batches are to be recorded alone: it has an attention of its own for packed rows,
    which reads their lengths from the GPU.
    """
    import torch

    if not recipe.data.packing:
        return
    unsloth = engine.name == "unsloth"
    if unsloth and not records(recipe, engine.name, resolve_checkpointing(recipe, engine)):
        return
    base = model.get_base_model()
    if reason := why_not(base.config, recipe, engine.name):
        if torch.cuda.is_available():
            how = "unsloth's own attention" if unsloth else "a mask"
            announce(f"data.packing: {how} keeps rows apart, flash attention cannot ({reason})")
        return
    longest = recipe.model.seq_len_tokens
    from fastlora.engines import varlen  # it imports torch

    if unsloth:
        varlen.unsloth_serves_packed_rows(longest)
    else:
        varlen.transformers_serves_packed_rows(base, longest)
    engine.longest_packed = longest


def why_not(config: Any, recipe: Recipe, engine: str) -> str:
    """What of a model, by its configuration, flash attention cannot do for packed rows; "" if it can."""
    longest = recipe.model.seq_len_tokens
    window = getattr(config, "sliding_window", None)
    if getattr(config, "attn_logit_softcapping", None):
        return "attention with softcapping"
    if config.model_type not in PLAIN & (FUSED if engine == "unsloth" else PLAIN):
        return f"not known to serve {config.model_type}"
    if window and window < longest:
        return f"a sliding window of {window:,} tokens in rows of {longest:,}"
    if dropout := getattr(config, "attention_dropout", 0):
        return f"attention_dropout of {dropout}"
    if not has_flash_attention(config, resolve_dtype(recipe.model)):
        return "PyTorch has none for this model on this GPU"
    return ""


def has_flash_attention(config: Any, dtype: torch.dtype) -> bool:
    """Whether PyTorch has it, forward and backward, for heads as `config` says."""
    import torch
    from torch.backends import cuda

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if size % 8:
        return False
    query, key = (
        torch.empty(1, count, 128, size, dtype=dtype, device="cuda", requires_grad=True)
        for count in (heads, config.num_key_value_heads)
    )
    return cuda.can_use_flash_attention(cuda.SDPAParams(query, key, key, None, 0.0, True, True))
