"""Attention of rows that are packed one behind another, by where each of them ends and without a mask.

transformers keeps packed rows apart by a mask of tokens x tokens, with which PyTorch has no flash attention. Its flash
attention takes the rows' cumulative lengths instead (FlashAttention-2, Dao 2023, arXiv:2307.08691; what flash-attn
calls varlen): a tensor on the GPU that nobody has to read, so that a CUDA graph can record it. A row of no tokens
computes nothing, and so their number can be one that stays.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from fastlora.engines.base import CUMULATIVE_LENGTHS, PACKED_LENGTHS
from fastlora.errors import EngineError

# What torch.nn.attention.varlen calls, whose arguments are others in each of PyTorch 2.10 to 2.13.
_flash = torch.ops.aten._flash_attention_forward

_ROW_OF_WORKSPACE = 128
"""Tokens by which each row lengthens backward's sums of dq, whose elements are counted in 32 bits."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of each row to itself: (1, tokens, heads, head size) of query (1, heads, tokens, head size) and
    of key and value, which may have fewer heads.

    `ends`: (rows + 1,) int32, 0 and where each row ends, the last one at `tokens`; of a row, only as many tokens as
    `longest` are computed. In 16 bits, those of autocast where it is on.
    Raises EngineError: more rows than backward can count.
    """
    _, heads, tokens, size = query.shape
    rows = len(ends) - 1
    if (tokens + _ROW_OF_WORKSPACE * rows) * heads * -(-size // 32) * 32 >= 2**31:
        raise EngineError(
            f"data.packing: {rows:,} rows in {tokens:,} tokens are too many for one forward; lower train.micro_batch"
        )
    before, kind = query.dtype, query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (each[0].transpose(0, 1).to(dtype) for each in (query, key, value))
    given = (longest, longest, 0.0, True, False)  # no dropout, causal, no debugging mask
    out: torch.Tensor = _flash(q, k, v, ends, ends, *given, scale=scale)[0]
    return (out if torch.is_autocast_enabled(kind) else out.to(before)).unsqueeze(0)


def transformers_serves_packed_rows(base: Any, longest: int) -> None:
    """Let `base`, a model of transformers with PyTorch's attention, take CUMULATIVE_LENGTHS for packed rows of at most
    `longest` tokens. Calls without them are what they were."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"fastlora_packed_{longest}"
    unmasked = f"{name}_unmasked"  # with no function for a mask, transformers makes none
    served = partial(_attention, ALL_ATTENTION_FUNCTIONS["sdpa"], longest)
    # Both names are the same attention, so that a layer that is computed again in backward, when the forward of the
    # model is over, is what it was.
    AttentionInterface.register(name, served)
    AttentionInterface.register(unmasked, served)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = base.config
    config._attn_implementation = name

    def before(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given.get(CUMULATIVE_LENGTHS) is not None:
            config._attn_implementation = unmasked

    def after(*_: Any) -> None:
        config._attn_implementation = name

    decoder = getattr(base, base.base_model_prefix)
    decoder.register_forward_pre_hook(before, with_kwargs=True)
    decoder.register_forward_hook(after, always_call=True)


def _attention(
    sdpa: Any,
    longest: int,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls an attention function."""
    ends = given.get(CUMULATIVE_LENGTHS)
    if ends is None:
        found: tuple[torch.Tensor, None] = sdpa(module, query, key, value, attention_mask, **given)
        return found
    return attend(query, key, value, ends, longest, given.get("scaling")), None


class PackedRows(NamedTuple):
    """In the place of what unsloth's attention knows of packed rows, (lengths, where they end, the longest), for which
    it would read the lengths from the GPU."""

    lengths: torch.Tensor
    ends: torch.Tensor
    longest: int


def unsloth_serves_packed_rows(longest: int) -> None:
    """Let unsloth's attention of the architectures in FUSED, but for gemma2, take CUMULATIVE_LENGTHS for packed rows of
    at most `longest` tokens. Calls without them are what they were.

    Its forwards ask two functions by name: what is known of packed rows, and attention. Both get a wrapper in the
    modules which have such a forward.
    """
    from unsloth.models import llama, mistral, qwen3

    for module in (llama, mistral, qwen3):
        for name, wrapper in (
            ("get_packed_info_from_kwargs", partial(_packed_rows, longest)),
            ("run_attention", _unsloths_attention),
        ):
            theirs = getattr(module, name)
            theirs = getattr(theirs, "fastlora_theirs", theirs)
            ours: Any = partial(wrapper, theirs)
            ours.fastlora_theirs = theirs
            setattr(module, name, ours)


def _packed_rows(longest: int, theirs: Any, given: dict[str, Any], *rest: Any, **named: Any) -> Any:
    ends = given.get(CUMULATIVE_LENGTHS)
    if ends is None:
        return theirs(given, *rest, **named)
    return PackedRows(given[PACKED_LENGTHS], ends, longest)


def _unsloths_attention(theirs: Any, *, config: Any, context: Any, Q: Any, K: Any, V: Any) -> Any:
    """Q, K, V: (1, heads, tokens, head size); gives (1, tokens, heads, head size), as unsloth's."""
    rows = context.seq_info
    if not isinstance(rows, PackedRows):
        return theirs(config=config, context=context, Q=Q, K=K, V=V)
    scale = (config.flash_varlen_kwargs or {}).get("softmax_scale")
    return attend(Q, K, V, rows.ends, rows.longest, scale)
