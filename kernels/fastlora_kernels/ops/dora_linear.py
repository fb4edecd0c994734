"""A linear layer with a DoRA adapter: the rows of W + s B A, each scaled to a learnt magnitude.

    y = c z + b,  z = x W^T + s S B^T,  S = x A^T,  c_n = m_n / |W + s B A|_n
    dx = (c g) W + s ((c g) B) A,  dA = s ((c g) B)^T x,  dB = s (c g)^T S,  dm_n = sum_t g_tn z_tn / |W + s B A|_n

With dropout D (ops/dropout.py) the adapter's change is made of D(x), and W x is what it was, as PEFT has it:
y = (x - D(x)) W^T + c z + b with z of D(x), which costs one product more each way.

DoRA, Liu et al. 2024 (arXiv:2402.09353); the norm is a constant in backward (section 4.3). Its rows are summed
up without W + s B A in memory. On a 4-bit W above a number of tokens c and s B A are folded into it, which makes
forward and dx a product each, and S is first made in backward; else the wide products are scaled once. Saved: x, S if
made, and z, or c z, of which dm is made (a copy: what reads y may overwrite it). Shapes: T tokens, K inputs, N
outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.first_order import first_order
from fastlora_kernels.launch import cdiv, launch
from fastlora_kernels.ops.dequantize import row_norms
from fastlora_kernels.ops.dropout import draw_seeds, dropout
from fastlora_kernels.ops.eight_bit import EightBit
from fastlora_kernels.ops.four_bit import FourBit
from fastlora_kernels.ops.lora_linear import (
    Weight,
    add_up,
    dense,
    fitting,
    folds,
    frozen,
    in_one_dtype,
    shaped,
    source,
)
from fastlora_kernels.ops.skinny import product
from fastlora_kernels.triton_or_not import jit, tl

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK_T, BLOCK_N = 64, 64
Drop = tuple[float, torch.Tensor]
"""p and the seed of a dropout."""


@jit
def _scale_columns(
    z_ptr, c_ptr, bias_ptr, out_ptr, n_tokens, n_columns,
    BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_TN = (t_T[:, None] < n_tokens) & (n_N[None, :] < n_columns)
    place_TN = t_T.to(tl.int64)[:, None] * n_columns + n_N[None, :]
    c_N = tl.load(c_ptr + n_N, mask=n_N < n_columns, other=0.0)
    out_TN = tl.load(z_ptr + place_TN, mask=inside_TN, other=0.0).to(tl.float32) * c_N[None, :]
    if BIAS:
        bias_N = tl.load(bias_ptr + n_N, mask=n_N < n_columns, other=0.0).to(tl.float32)
        out_TN += bias_N[None, :]
    tl.store(out_ptr + place_TN, out_TN.to(out_ptr.dtype.element_ty), mask=inside_TN)


@jit
def _column_dots(
    left_ptr, right_ptr, partial_ptr, n_tokens, n_columns, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_TN = (t_T[:, None] < n_tokens) & (n_N[None, :] < n_columns)
    place_TN = t_T.to(tl.int64)[:, None] * n_columns + n_N[None, :]
    left_TN = tl.load(left_ptr + place_TN, mask=inside_TN, other=0.0).to(tl.float32)
    right_TN = tl.load(right_ptr + place_TN, mask=inside_TN, other=0.0).to(tl.float32)
    partial_N = partial_ptr + tl.program_id(0).to(tl.int64) * n_columns + n_N
    tl.store(partial_N, tl.sum(left_TN * right_TN, axis=0), mask=n_N < n_columns)


def scale_columns(
    z: torch.Tensor, c: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """z (T, N) times c (N, float32) plus bias (N), in float32 and rounded once to z's type."""
    if choose_backend(z.device, BACKENDS) == "reference":
        out = z.float() * c
        return (out if bias is None else out + bias.float()).to(z.dtype)
    out_TN = torch.empty_like(z)
    grid = (cdiv(z.shape[0], BLOCK_T), cdiv(z.shape[1], BLOCK_N))
    tensors = (z, c, c if bias is None else bias, out_TN)
    constants = {"BIAS": bias is not None, "BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N}
    launch(_scale_columns, grid, tensors, tuple(z.shape), constants)
    return out_TN


def column_dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """sum_t left_tn right_tn, (N) in float32: blocks of tokens, then their sums, in a fixed order."""
    if choose_backend(left.device, BACKENDS) == "reference":
        return (left.float() * right.float()).sum(dim=0)
    blocks = cdiv(left.shape[0], BLOCK_T)
    partial = torch.empty((blocks, left.shape[1]), dtype=torch.float32, device=left.device)
    grid = (blocks, cdiv(left.shape[1], BLOCK_N))
    constants = {"BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N}
    launch(_column_dots, grid, (left, right, partial), tuple(left.shape), constants)
    return partial.sum(dim=0)


def dora_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """m / |W + s B A| (x W^T + s (x A^T) B^T) + b; gradients for x, A, B and m, none for W and b.

    magnitude (N) in any float dtype; dropout in [0, 1), of what the adapter changes, drawn anew from torch's generator;
    the rest, and what is raised, as in lora_linear. A dense weight must have an even number of inputs.
    """
    ready = frozen(weight)
    n, _ = fitting("dora_linear", x, ready, lora_a, lora_b)
    if magnitude.shape != (n,):
        raise ValueError(
            f"dora_linear: magnitude {tuple(magnitude.shape)} does not fit; expected ({n},)"
        )
    if isinstance(ready, EightBit):
        raise ValueError("dora_linear: an 8-bit weight is not served")
    fixed = ready, bias, scaling, dropout
    y: torch.Tensor = DoraLinear.apply(x, fixed, lora_a, lora_b, magnitude)
    return y


class DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        fixed: Any,
        a_RK: torch.Tensor,
        b_NR: torch.Tensor,
        magnitude_N: torch.Tensor,
    ) -> torch.Tensor:
        weight, bias_N, scaling, p = fixed
        seeds = draw_seeds((p,), x.device)
        drop = None if seeds is None else (p, seeds[0])
        y, *made = output(x, weight, bias_N, scaling, a_RK, b_NR, magnitude_N, drop)
        ctx.fixed, ctx.drop = (source(weight), scaling), drop
        ctx.save_for_backward(x, a_RK, b_NR, magnitude_N, *made)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wants_x, _, *wants = ctx.needs_input_grad
        dx, *found = gradients_of(
            gradients[0], (wants_x, *wants), ctx.fixed, ctx.saved_tensors, ctx.drop
        )
        return dx, None, *found


def output(
    x: torch.Tensor,
    weight: FourBit | torch.Tensor,
    bias_N: torch.Tensor | None,
    scaling: float,
    a_RK: torch.Tensor,
    b_NR: torch.Tensor,
    magnitude_N: torch.Tensor,
    drop: Drop | None = None,
) -> tuple[Any, ...]:
    """y, (..., N); S if it was made, z or c z, c, and what sum g times the former is divided by for dm."""
    dtype, given_TK = x.dtype, x.reshape(-1, x.shape[-1])
    x_TK = given_TK if drop is None else dropout(given_TK, *drop)
    if isinstance(weight, torch.Tensor):
        weight = weight.to(dtype).contiguous()
    fold = (a_RK, b_NR, scaling)
    norm_N = row_norms(weight, fold, dtype)
    c_N = magnitude_N / norm_N  # in float32, which the norm has
    down_TR = None
    if _folds(weight, x_TK):
        # dm = sum g z / norm = sum g (c z) / m. Of z a small c, of a magnitude near 0, would leave nothing: not folded.
        small_N = c_N.abs() < 2**-10
        folded = dense(weight, dtype, fold, c_N.masked_fill(small_N, 1.0))
        kept_TN = torch.mm(x_TK, folded.T)
        del folded
        y_TN = scale_columns(kept_TN, torch.where(small_N, c_N, 1.0), bias_N)
        divisor_N = torch.where(small_N, norm_N, magnitude_N.float())
    else:
        a, (b,) = in_one_dtype((a_RK, b_NR, None), dtype)
        down_TR = torch.mm(x_TK, a.T)
        kept_TN = x_TK.new_empty(x_TK.shape[0], b.shape[0])
        add_up(kept_TN, None, (down_TR, b.T, scaling), (x_TK, dense(weight, dtype).T, 1.0))
        y_TN = scale_columns(kept_TN, c_N, bias_N)
        divisor_N = norm_N
    if drop is not None:
        y_TN.addmm_(given_TK - x_TK, dense(weight, dtype).T)
    return shaped(y_TN, x.shape[:-1]), down_TR, kept_TN, c_N, divisor_N


def gradients_of(
    g: torch.Tensor,
    wants: Sequence[bool],
    fixed: Any,
    saved: Sequence[Any],
    drop: Drop | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """dx, dA, dB and dm, where wanted. `fixed`: the weight and the scaling; `saved`: x, A, B, m and what `output`
    gave; without S it is made again."""
    weight, scaling = fixed
    x, a_RK, b_NR, magnitude_N, down_TR, kept_TN, c_N, divisor_N = saved
    g_TN = g.reshape(-1, b_NR.shape[0]).contiguous()
    weight, dtype, x_TK = frozen(weight), x.dtype, x.reshape(-1, x.shape[-1])
    if drop is not None:
        x_TK = dropout(x_TK, *drop)
    a, (b,) = in_one_dtype((a_RK, b_NR, None), dtype)
    wants_x, wants_a, wants_b, wants_m = wants
    scale_N1 = (scaling * c_N)[:, None]
    up_TR = torch.mm(g_TN, (b * scale_N1).to(dtype))
    dx_TK = da = db = dm_N = None
    if wants_x and _folds(weight, x_TK):
        folded = dense(weight, dtype, (a_RK, b_NR, scaling), c_N, cast=(a, b, scaling))
        dx_TK = torch.mm(g_TN, folded)
        del folded  # before W comes again
    elif wants_x:
        dx_TK = x_TK.new_empty(x_TK.shape)  # row by row, however x lies
        scaled = scale_columns(g_TN, c_N), dense(weight, dtype), 1.0
        add_up(dx_TK, None, (up_TR, a, 1.0), scaled)
        del scaled
    if dx_TK is not None and drop is not None:
        base_TK = torch.mm(g_TN, dense(weight, dtype))
        dx_TK = dropout(dx_TK.sub_(base_TK), *drop).add_(base_TK)
    if wants_a:
        da = product(up_TR.T, x_TK).to(a_RK.dtype)
    if wants_b:
        down_TR = torch.mm(x_TK, a.T) if down_TR is None else down_TR
        db = (product(g_TN.T, down_TR) * scale_N1).to(b_NR.dtype)
    if wants_m:
        dm_N = (column_dots(g_TN, kept_TN) / divisor_N).to(magnitude_N.dtype)
    return None if dx_TK is None else dx_TK.view(x.shape), da, db, dm_N


def _folds(weight: Weight, x_TK: torch.Tensor) -> bool:
    """As for LoRA at a low rank: without a fold y and g are scaled in passes of their own, which take longer than what
    a high rank adds to the fold."""
    return isinstance(weight, FourBit) and folds(x_TK.shape[0], *weight.shape, rank=1)
