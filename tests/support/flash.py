"""PyTorch's flash attention over cumulative lengths, which a CPU does not have, from its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """(tokens, heads, head size) as aten::_flash_attention_forward, which never looks at lengths on the host either.

    What it would leave as memory was is NaN: tokens of a row from `longest` on, and behind the last row.
    """
    assert ends is key_ends
    assert ends.dtype == torch.int32
    assert (longest, dropout, causal, debug) == (longest_key, 0.0, True, False)
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    place = torch.arange(len(query), device=query.device)
    row = torch.searchsorted(ends[1:].long(), place, right=True)
    seen = (row[:, None] == row[None]) & (place[:, None] >= place[None])
    groups = query.shape[1] // key.shape[1]
    k, v = (
        each.repeat_interleave(groups, dim=1, output_size=query.shape[1]) for each in (key, value)
    )
    scores = torch.einsum("ihd,jhd->hij", query.float(), k.float())
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("hij,jhd->ihd", weights, v.float()).to(query.dtype)
    at = place - torch.gather(ends.long(), 0, row.clamp(max=len(ends) - 1))
    computed = (row < len(ends) - 1) & (at < longest)
    return torch.where(computed[:, None, None], out, torch.nan), scores.logsumexp(-1)


def pretend_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows are then kept apart as on a GPU."""

    def has(config: Any, dtype: Any) -> bool:
        return True

    monkeypatch.setattr("fastlora.engines.packed.has_flash_attention", has)
    monkeypatch.setattr("fastlora.engines.varlen._flash", flash)
