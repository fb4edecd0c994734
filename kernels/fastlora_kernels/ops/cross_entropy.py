"""The loss of each row of logits, and in their place its gradient; with a LoRA adapter's part of them or without.

    z = k (logits + s S B^T),  softcapped: z <- c tanh(z / c)
    loss = logsumexp_v z_v - z_label,  g = (softmax(z) - onehot) dz/d(logits)

LoRA, Hu et al. 2021 (arXiv:2106.09685), 4.1; softcapping, Gemma 2 (arXiv:2408.00118), 2. The adapter's logits are
made in registers, where the others are read: written to memory they would be written and read once more for a product
that takes a hundredth of the time. Two kernels, over tiles of rows and strips of columns: the first gives maximum, sum
and the label's logit of each strip, the second puts them together and writes g. Float32 throughout, in a fixed order.
Shapes: C rows, V vocabulary, R rank, P strips.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora_kernels import reference
from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.launch import cdiv, launch, power_of_2
from fastlora_kernels.ops.skinny import processors
from fastlora_kernels.triton_or_not import jit, tl

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK_C, WARPS, STAGES = 64, 4, 2
BLOCK_BYTES = 256
"""Of a tile's row."""
MOST_STRIPS, PROGRAMS_EACH = 64, 4
"""Strips whose parts one program puts together at once; programs for each processor."""


class Shape(NamedTuple):
    """What becomes of h W^T + ... before the softmax."""

    logit_scale: float
    softcap: float | None


@jit
def _tanh(x):
    u = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - u) / (1.0 + u)
    square = x * x  # near zero 1 - u cancels, and four terms of the series do better
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -t, t))


@jit
def _tanh_slope(x):
    """1 - tanh^2, which cancels where it is small, in another form."""
    u = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * u / ((1.0 + u) * (1.0 + u))


@jit
def _logits(
    logits_ptr, down_ptr, b_ptr, c_C, v_V, n_rows, n_columns, row_stride, scaling, logit_scale,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of k (logits + s S B^T) in float32, (C, V)."""
    row_C = c_C.to(tl.int64)[:, None]
    inside_CV = (c_C[:, None] < n_rows) & (v_V[None, :] < n_columns)
    z_CV = tl.load(logits_ptr + row_C * row_stride + v_V[None, :], mask=inside_CV, other=0.0)
    z_CV = z_CV.to(tl.float32)
    if RANK > 0:
        scaling = tl.cast(scaling, tl.float32)
        for start in tl.static_range(0, PADDED_RANK, BLOCK_R):
            r_R = start + tl.arange(0, BLOCK_R)
            down_CR = tl.load(
                down_ptr + row_C * RANK + r_R[None, :],
                mask=(c_C[:, None] < n_rows) & (r_R[None, :] < RANK),
                other=0.0,
            )
            b_VR = tl.load(
                b_ptr + v_V.to(tl.int64)[:, None] * RANK + r_R[None, :],
                mask=(v_V[:, None] < n_columns) & (r_R[None, :] < RANK),
                other=0.0,
            )
            z_CV += scaling * tl.dot(down_CR, tl.trans(b_VR), input_precision="ieee")
    return z_CV * tl.cast(logit_scale, tl.float32)


@jit
def _finite(highest):
    """What is subtracted before exp: of logits that are all -inf 0, since -inf from -inf is NaN."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@jit
def _statistics(
    logits_ptr, down_ptr, b_ptr, labels_ptr, parts_ptr,
    n_rows, n_columns, row_stride, columns_each, scaling, logit_scale, softcap,
    SOFTCAP: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of each row of a strip: the highest z, the sum of exp(z - highest), and the label's z, or 0; (3, P, C)."""
    c_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = c_C < n_rows
    label_C = tl.load(labels_ptr + c_C, mask=inside_C, other=-1)
    cap = tl.cast(softcap, tl.float32)
    highest_C = tl.full((BLOCK_C,), -float("inf"), tl.float32)
    total_C = tl.zeros((BLOCK_C,), tl.float32)
    chosen_C = tl.zeros((BLOCK_C,), tl.float32)
    first = tl.program_id(1) * columns_each
    for start in range(first, tl.minimum(first + columns_each, n_columns), BLOCK_V):
        v_V = start + tl.arange(0, BLOCK_V)
        z_CV = _logits(
            logits_ptr, down_ptr, b_ptr, c_C, v_V, n_rows, n_columns, row_stride, scaling, logit_scale,
            RANK, PADDED_RANK, BLOCK_R,
        )  # fmt: skip
        if SOFTCAP:
            z_CV = cap * _tanh(z_CV / cap)
        chosen_C += tl.sum(tl.where(v_V[None, :] == label_C[:, None], z_CV, 0.0), axis=1)
        z_CV = tl.where(v_V[None, :] < n_columns, z_CV, -float("inf"))
        higher_C = tl.maximum(highest_C, tl.max(z_CV, axis=1))
        from_C = _finite(higher_C)
        total_C = total_C * tl.exp(highest_C - from_C) + tl.sum(tl.exp(z_CV - from_C[:, None]), axis=1)
        highest_C = higher_C
    part_C = parts_ptr + tl.program_id(1).to(tl.int64) * n_rows + c_C
    size = tl.num_programs(1).to(tl.int64) * n_rows
    tl.store(part_C, highest_C, mask=inside_C)
    tl.store(part_C + size, total_C, mask=inside_C)
    tl.store(part_C + 2 * size, chosen_C, mask=inside_C)


@jit
def _cross_entropy(
    logits_ptr, down_ptr, b_ptr, labels_ptr, parts_ptr, loss_ptr,
    n_rows, n_columns, row_stride, columns_each, parts, ignored, scaling, logit_scale, softcap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = c_C < n_rows
    label_C = tl.load(labels_ptr + c_C, mask=inside_C, other=-1)
    counts_C = inside_C & (label_C != ignored)
    p_P = tl.arange(0, BLOCK_P)
    part_PC = parts_ptr + p_P.to(tl.int64)[:, None] * n_rows + c_C[None, :]
    inside_PC = (p_P[:, None] < parts) & inside_C[None, :]
    size = tl.cast(parts, tl.int64) * n_rows
    highest_PC = tl.load(part_PC, mask=inside_PC, other=-float("inf"))
    total_PC = tl.load(part_PC + size, mask=inside_PC, other=0.0)
    from_C = _finite(tl.max(highest_PC, axis=0))
    total_C = tl.sum(total_PC * tl.exp(highest_PC - from_C[None, :]), axis=0)
    lse_C = from_C + tl.log(tl.where(inside_C, total_C, 1.0))
    if tl.program_id(1) == 0:
        chosen_C = tl.sum(tl.load(part_PC + 2 * size, mask=inside_PC, other=0.0), axis=0)
        # A label outside the vocabulary makes the loss NaN.
        known_C = (label_C >= 0) & (label_C < n_columns)
        loss_C = tl.where(known_C, lse_C - chosen_C, float("nan"))
        tl.store(loss_ptr + c_C, tl.where(counts_C, loss_C, 0.0), mask=inside_C)
    if GRADIENT:
        cap = tl.cast(softcap, tl.float32)
        first = tl.program_id(1) * columns_each
        for start in range(first, tl.minimum(first + columns_each, n_columns), BLOCK_V):
            v_V = start + tl.arange(0, BLOCK_V)
            z_CV = _logits(
                logits_ptr, down_ptr, b_ptr, c_C, v_V, n_rows, n_columns, row_stride, scaling, logit_scale,
                RANK, PADDED_RANK, BLOCK_R,
            )  # fmt: skip
            slope = tl.cast(logit_scale, tl.float32)
            if SOFTCAP:
                slope *= _tanh_slope(z_CV / cap)
                z_CV = cap * _tanh(z_CV / cap)
            g_CV = tl.exp(tl.minimum(z_CV - lse_C[:, None], 0.0))  # columns outside could overflow
            g_CV -= tl.where(v_V[None, :] == label_C[:, None], 1.0, 0.0)
            g_CV = tl.where(counts_C[:, None], g_CV * slope, 0.0)
            tl.store(
                logits_ptr + c_C.to(tl.int64)[:, None] * row_stride + v_V[None, :],
                g_CV.to(logits_ptr.dtype.element_ty),
                mask=inside_C[:, None] & (v_V[None, :] < n_columns),
            )


Adapter = tuple[torch.Tensor, torch.Tensor, float]
"""S (C, R), B (V, R), both of the logits' type, and s."""


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shape: Shape,
    gradient: bool,
    adapter: Adapter | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The loss of each row of `logits` (C, V; rows may lie apart), (C) in float32; with `gradient`, that of its logits
    takes their place. labels (C), each in [0, V) or ignore_index, where both are 0."""
    if choose_backend(logits.device, BACKENDS) == "reference":
        return reference.cross_entropy_(logits, labels, *shape, gradient, adapter, ignore_index)
    rows, columns = logits.shape
    loss_C = torch.empty(rows, dtype=torch.float32, device=logits.device)
    down, b, scaling = adapter or (logits, logits, 0.0)
    rank = b.shape[1] if adapter else 0
    block_v = min(BLOCK_BYTES // logits.element_size(), max(16, power_of_2(columns)))
    blocks = cdiv(rows, BLOCK_C)
    strips = max(1, min(MOST_STRIPS, PROGRAMS_EACH * processors(logits.device) // blocks))
    columns_each = cdiv(cdiv(columns, strips), block_v) * block_v
    strips = cdiv(columns, columns_each)
    block_r = min(64, max(16, power_of_2(max(1, rank))))
    compiled = {"RANK": rank, "PADDED_RANK": cdiv(rank, block_r) * block_r, "BLOCK_R": block_r}
    compiled |= {"BLOCK_C": BLOCK_C, "BLOCK_V": block_v}
    capped = {"SOFTCAP": shape.softcap is not None}
    parts = torch.empty((3, strips, rows), dtype=torch.float32, device=logits.device)
    numbers = (rows, columns, logits.stride(0), columns_each)
    factors = (float(scaling), float(shape.logit_scale), float(shape.softcap or 1.0))
    tensors = (logits, down.contiguous(), b.contiguous(), labels, parts)
    launch(
        _statistics,
        (blocks, strips),
        tensors,
        (*numbers, *factors),
        capped | compiled,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    launch(
        _cross_entropy,
        (blocks, strips if gradient else 1),
        (*tensors, loss_C),
        (*numbers, strips, ignore_index, *factors),
        capped | {"GRADIENT": gradient} | compiled | {"BLOCK_P": power_of_2(strips)},
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return loss_C
