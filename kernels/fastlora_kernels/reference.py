"""The ops in plain PyTorch, as their equations stand: what a kernel is measured and tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastlora_kernels.ops.dequantize import FourBit


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """y = x W^T + b + scaling (x A^T) B^T, all in x's type. LoRA, Hu et al. 2021 (arXiv:2106.09685), 4.1.

    x (..., K), weight (N, K) dense, bias (N), lora_a (R, K), lora_b (N, R) -> (..., N).
    """
    down = x @ lora_a.to(x.dtype).T
    return torch.nn.functional.linear(x, weight, bias) + scaling * (down @ lora_b.to(x.dtype).T)


def dequantize(
    weight: FourBit,
    dtype: torch.dtype,
    fold: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """code[q] absmax + scaling B A, (N, K), in float32 and rounded once to `dtype`; see ops/dequantize.py."""
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).view(-1).long()
    absmax = weight.absmax
    if weight.nested_absmax is not None:
        assert weight.nested_table is not None
        assert weight.offset is not None
        outer = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: absmax.numel()]
        absmax = weight.nested_table[absmax.long()] * outer + weight.offset
    scale = absmax.repeat_interleave(weight.blocksize)[: codes.numel()]
    dense = (weight.table[codes] * scale).view(weight.shape)
    if fold is not None:
        a, b, scaling = fold
        dense = dense + scaling * (b.to(dtype).float() @ a.to(dtype).float())
    return dense.to(dtype)
