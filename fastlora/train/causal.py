"""Attention of rows that are padded on the right: causal, and no mask for the padding.

transformers looks into the mask of each batch whether anything is padded, and waits for the GPU to tell; where
something is, it makes a mask of rows x tokens x tokens, with which PyTorch has no flash attention. But of a row that is
padded on the right no token looks at the padding, and what the padding computes has no label.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastlora.engines.base import Engine
from fastlora.engines.unsloth import rows_as_long_as_they_are
from fastlora.plan.setup import FUSED

_NAME = "fastlora_causal"


def _mask(
    *,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    kv_length: int,
    **named: Any,
) -> torch.Tensor | None:
    if allow_is_causal_skip and (local_size is None or kv_length < local_size):
        return None
    # A sliding window that is shorter than the rows, or an architecture with a pattern of its own.
    mask: torch.Tensor | None = sdpa_mask(
        kv_length=kv_length, local_size=local_size, allow_is_causal_skip=False, **named
    )
    return mask


def rows_as_they_are(model: Any, engine: Engine) -> AbstractContextManager[None]:
    """Within it attention does nothing for the padding of rows that are padded on the right to few lengths. unsloth's
    own forwards, given labels, take all padding for such already, and add some of their own."""
    own = engine.name == "unsloth" and model.config.model_type in FUSED
    return rows_as_long_as_they_are() if own else right_padded(model)


@contextmanager
def right_padded(model: Any) -> Iterator[None]:
    """Within it, a model of transformers with PyTorch's attention, flex attention too, takes every padding for one on
    the right. Others stay as they are."""
    config = model.config
    if config._attn_implementation == "flex_attention":
        with _flex_without_padding():
            yield
        return
    if config._attn_implementation != "sdpa":
        yield
        return
    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(_NAME, ALL_ATTENTION_FUNCTIONS["sdpa"])
        AttentionMaskInterface.register(_NAME, _mask)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


@contextmanager
def _flex_without_padding() -> Iterator[None]:
    """Within it the mask of flex attention, which unsloth gives Gemma 3, is made of positions alone. transformers looks
    whether anything is padded while a graph is recorded too. Under its own name, since unsloth's attention asks for it.
    """
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    theirs = masks["flex_attention"]

    def mask(*, attention_mask: Any = None, **named: Any) -> Any:
        return theirs(attention_mask=None, **named)

    masks["flex_attention"] = mask
    try:
        yield
    finally:
        del masks["flex_attention"]
        if masks["flex_attention"] is not theirs:  # it had been set for transformers' masks alone
            masks["flex_attention"] = theirs
