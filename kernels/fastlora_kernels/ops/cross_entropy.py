"""The loss of each row of logits, and in their place its gradient, with the products of an adapter that read it.

    softcapped: z = c tanh(k logits / c), else z = k logits;  loss = logsumexp_v z_v - z_label
    g = (softmax(z) - onehot) dz/d(logits);  U = g B,  dB = g^T S

Softcapping, Gemma 2 (arXiv:2408.00118), 2; LoRA, Hu et al. 2021 (arXiv:2106.09685), 4.1. A row's loss takes one program
and one read. g is written in tiles, strip by strip of the vocabulary, and while a tile is there its part of U and dB is
taken (as in ops/skinny.py, whose sums these are), which spares reading g once more. Float32, in a fixed order.
Shapes: C rows, V vocabulary, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora_kernels import reference
from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.launch import launch, power_of_2
from fastlora_kernels.ops import skinny
from fastlora_kernels.triton_or_not import jit, tl

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK_V = 8192
"""Of a row, for its loss."""
TILES = ((64, 256, 8, 2), (64, 128, 8, 2), (32, 128, 4, 2))
"""Rows, logits, warps, and tiles that are loaded ahead: the first that fits into a processor's shared memory."""
ALONE = (64, 256, 8, 2)
"""Without an adapter, in 16 bits."""


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
def _row_losses(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, n_columns, row_stride, ignored, logit_scale, softcap,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    scale, cap = tl.cast(logit_scale, tl.float32), tl.cast(softcap, tl.float32)
    # A label outside the vocabulary makes the loss NaN; it must not read another row's logit.
    known = (label >= 0) & (label < n_columns)
    chosen = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32) * scale
    if SOFTCAP:
        chosen = cap * _tanh(chosen / cap)
    highest = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, n_columns, BLOCK_V):
        v_V = start + tl.arange(0, BLOCK_V)
        z_V = tl.load(row_ptr + v_V, mask=v_V < n_columns, other=0.0).to(tl.float32) * scale
        if SOFTCAP:
            z_V = cap * _tanh(z_V / cap)
        z_V = tl.where(v_V < n_columns, z_V, -float("inf"))
        higher = tl.maximum(highest, tl.max(z_V, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z_V - higher), axis=0)
        highest = higher
    lse = highest + tl.log(total)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, tl.where(label != ignored, lse - chosen, 0.0))


@jit
def _gradient(
    logits_ptr, labels_ptr, lse_ptr, b_ptr, down_ptr, up_parts_ptr, db_parts_ptr,
    n_rows, n_columns, row_stride, rows_each, ignored, logit_scale, softcap,
    SOFTCAP: tl.constexpr, UP: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """g in place of some rows of a strip; dB's part of them, if RANK, and U's, if UP."""
    v_V = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_V = v_V < n_columns
    scale, cap = tl.cast(logit_scale, tl.float32), tl.cast(softcap, tl.float32)
    r_R = tl.arange(0, BLOCK_R)
    inside_VR = inside_V[:, None] & (r_R[None, :] < RANK)
    place_VR = v_V.to(tl.int64)[:, None] * RANK + r_R[None, :]
    if UP:
        b_VR = tl.load(b_ptr + place_VR, mask=inside_VR, other=0.0)
        up_part = up_parts_ptr + tl.program_id(0).to(tl.int64) * n_rows * RANK
    if RANK > 0:
        db_VR = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
    first = tl.program_id(1) * rows_each
    for start in range(first, tl.minimum(first + rows_each, n_rows), BLOCK_C):
        c_C = start + tl.arange(0, BLOCK_C)
        inside_C = c_C < n_rows
        label_C = tl.load(labels_ptr + c_C, mask=inside_C, other=-1)
        lse_C = tl.load(lse_ptr + c_C, mask=inside_C, other=0.0)
        inside_CV = inside_C[:, None] & inside_V[None, :]
        place_CV = logits_ptr + c_C.to(tl.int64)[:, None] * row_stride + v_V[None, :]
        z_CV = tl.load(place_CV, mask=inside_CV, other=0.0).to(tl.float32) * scale
        slope = scale
        if SOFTCAP:
            slope *= _tanh_slope(z_CV / cap)
            z_CV = cap * _tanh(z_CV / cap)
        # The minimum is for columns outside, which could overflow.
        g_CV = tl.exp(tl.minimum(z_CV - lse_C[:, None], 0.0))
        g_CV -= tl.where(v_V[None, :] == label_C[:, None], 1.0, 0.0)
        counts_CV = inside_CV & (label_C != ignored)[:, None]
        g_CV = tl.where(counts_CV, g_CV * slope, 0.0).to(logits_ptr.dtype.element_ty)
        tl.store(place_CV, g_CV, mask=inside_CV)
        if RANK > 0:
            inside_CR = inside_C[:, None] & (r_R[None, :] < RANK)
            place_CR = c_C.to(tl.int64)[:, None] * RANK + r_R[None, :]
            down_CR = tl.load(down_ptr + place_CR, mask=inside_CR, other=0.0)
            db_VR += tl.dot(tl.trans(g_CV), down_CR, input_precision="ieee")
            if UP:
                up_CR = tl.dot(g_CV, b_VR, input_precision="ieee")
                tl.store(up_part + place_CR, up_CR, mask=inside_CR)
    if RANK > 0:
        db_part = db_parts_ptr + tl.program_id(1).to(tl.int64) * n_columns * RANK
        tl.store(db_part + place_VR, db_VR, mask=inside_VR)


class Products(NamedTuple):
    """What is to be made of g: all of its type but dB = g^T S (V, R), which is given back in float32. U = g B (C, R)
    is written into `up`. B (V, R) and S (C, R), contiguous."""

    b: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor


def row_losses(
    logits: torch.Tensor, labels: torch.Tensor, shape: Shape, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """(C) each, in float32: the loss of each row of `logits` (C, V; rows may lie apart), and logsumexp of its z. labels
    (C), each in [0, V) or ignore_index, where the loss is 0."""
    if choose_backend(logits.device, BACKENDS) == "reference":
        return reference.row_losses(logits, labels, *shape, ignore_index)
    loss_C, lse_C = torch.empty((2, logits.shape[0]), dtype=torch.float32, device=logits.device)
    block = min(BLOCK_V, power_of_2(logits.shape[1]))
    launch(
        _row_losses,
        (logits.shape[0],),
        (logits, labels, loss_C, lse_C),
        (logits.shape[1], logits.stride(0), ignore_index, *_factors(shape)),
        {"SOFTCAP": shape.softcap is not None, "BLOCK_V": block},
        num_warps=8 if block > 1024 else 4,
    )
    return loss_C, lse_C


def gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    shape: Shape,
    ignore_index: int = -100,
    products: Products | None = None,
) -> torch.Tensor | None:
    """g in place of `logits`, as above; 0 in rows that are ignored. dB, if products are asked for."""
    backend = choose_backend(logits.device, BACKENDS)
    if backend == "reference":
        reference.logit_gradient_(logits, labels, lse, *shape, ignore_index)
        return None if products is None else _products(logits, products)
    rank = 0 if products is None else products.b.shape[1]
    fused = rank if rank <= 64 and (backend == "interpret" or logits.element_size() == 2) else 0
    with_up = fused <= 32  # at rank 64 its parts are half as large as g
    (rows, columns), device = logits.shape, logits.device
    block_c, block_v, warps, stages = tile(skinny.room(device), logits.element_size(), fused)
    strips, chunks, rows_each = skinny.cut(
        rows, columns, block_c, block_v, skinny.processors(device)
    )
    b, down, up_parts, db_parts = logits, logits, None, logits
    if products is not None and fused:
        b, down = products.b.contiguous(), products.down
        db_parts = torch.empty((chunks, columns, rank), dtype=torch.float32, device=device)
        if with_up:
            up_parts = torch.empty((strips, rows, rank), dtype=torch.float32, device=device)
    launch(
        _gradient,
        (strips, chunks),
        (logits, labels, lse, b, down, db_parts if up_parts is None else up_parts, db_parts),
        (rows, columns, logits.stride(0), rows_each, ignore_index, *_factors(shape)),
        {"SOFTCAP": shape.softcap is not None, "UP": up_parts is not None,
         "RANK": fused, "BLOCK_R": max(16, power_of_2(max(1, fused))),
         "BLOCK_C": block_c, "BLOCK_V": block_v},
        num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    if products is None:
        return None
    if not fused:
        return _products(logits, products)
    if up_parts is None:
        torch.mm(logits, b, out=products.up)
    db = db_parts[0]
    if up_parts is not None or chunks > 1:
        db = torch.empty((columns, rank), dtype=torch.float32, device=device)
        skinny.sum_up(up_parts, db_parts, 1.0, products.up, db)
    return db


def _factors(shape: Shape) -> tuple[float, float]:
    return float(shape.logit_scale), float(shape.softcap or 1.0)


def _products(g: torch.Tensor, products: Products) -> torch.Tensor:
    torch.mm(g, products.b, out=products.up)
    return skinny.product(g.T, products.down)


def tile(room: int, size: int, rank: int) -> tuple[int, int, int, int]:
    """Of TILES, for logits of `size` bytes. tests/kernels/test_compile.py holds it to what is compiled."""
    if size > 2:
        return TILES[-1]
    if not rank:
        return ALONE
    wide = max(16, power_of_2(rank))
    for block_c, block_v, warps, stages in TILES:
        ahead = stages * block_c * (block_v + wide)
        if 2 * (ahead + block_c * block_v + block_v * wide) + 4096 <= room:
            return block_c, block_v, warps, stages
    return TILES[-1]
