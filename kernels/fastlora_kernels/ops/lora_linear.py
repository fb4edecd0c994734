"""A linear layer with a LoRA adapter beside it.

    y = x W^T + b + s S B^T,  S = x A^T
    dx = g W + s (g B) A,  dA = s (g B)^T x,  dB = s g^T S,  with g = dL/dy

LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1. The products of rank R are taken first, so that no (N, K)
delta is formed, and the two wide ones are added in place by the matrix product itself. A 4-bit W is dequantized
in each direction; above a number of tokens s B A is folded into it, which makes each direction a single product.
Saved for backward: x once, and S (tokens x rank). Shapes: T tokens, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastlora_kernels.ops.dequantize import Fold, FourBit, dequantize

Weight = torch.Tensor
"""Dense (N, K), or a 4-bit weight of bitsandbytes, which knows its own shape."""


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """x W^T + b + scaling (x A^T) B^T; gradients for x, A and B, none for W and b.

    x (..., K); weight (N, K) and bias (N) in x's dtype, or weight a Params4bit of that shape; lora_a (R, K) and
    lora_b (N, R) in any float dtype, in which their gradients come back. Returns (..., N) in x's dtype.
    Raises ValueError: shapes that do not fit, or a 4-bit layout that FourBit.of does not know.
    """
    n, k = fitting("lora_linear", x, weight, lora_a, lora_b)
    y: torch.Tensor = LoraLinear.apply(x.reshape(-1, k), weight, bias, lora_a, lora_b, scaling)
    return y.reshape(*x.shape[:-1], n)


def fitting(
    op: str, x: torch.Tensor, weight: Weight, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> tuple[int, int]:
    """(N, K). Raises ValueError: see lora_linear."""
    quantized = FourBit.of(weight)
    if quantized is None and weight.dtype == torch.uint8:
        raise ValueError(f"{op}: a quantized weight of a layout that is not served")
    n, k = weight.shape if quantized is None else quantized.shape
    r = lora_a.shape[0]
    if x.shape[-1] != k or lora_a.shape != (r, k) or lora_b.shape != (n, r):
        raise ValueError(
            f"{op}: x {tuple(x.shape)}, weight {(n, k)}, lora_a {tuple(lora_a.shape)} and "
            f"lora_b {tuple(lora_b.shape)} do not fit; expected (..., K), (N, K), (R, K), (N, R)"
        )
    return n, k


def folds(tokens: int, n: int, k: int) -> bool:
    """Whether to fold s B A into a dequantized W: reading and writing y and dx once more (T N + T K) then
    costs more than the rank-R products on W (N K). At 4096 x 4096 from 2,048 tokens on."""
    return tokens * (n + k) >= n * k


def dense(
    weight: Weight,
    dtype: torch.dtype,
    fold: Fold | None = None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The matrix (N, K); `fold` and `row_scale` (see dequantize) are for 4-bit weights alone."""
    quantized = FourBit.of(weight)
    if quantized is None:
        assert fold is None
        assert row_scale is None
        return weight
    return dequantize(quantized, dtype, fold, row_scale)


class LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight: Weight,
        bias_N: torch.Tensor | None,
        a_RK: torch.Tensor,
        b_NR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        dtype = x_TK.dtype
        a, b = a_RK.to(dtype), b_NR.to(dtype)
        down_TR = x_TK @ a.T
        ctx.fold = weight.dtype == torch.uint8 and folds(x_TK.shape[0], b.shape[0], a.shape[1])
        weight_NK = dense(weight, dtype, (a, b, scaling) if ctx.fold else None)
        y_TN = torch.nn.functional.linear(x_TK, weight_NK, bias_N)
        if not ctx.fold:
            y_TN.addmm_(down_TR, b.T, alpha=scaling)
        # The weight as it is, not its data: a weight that is streamed in is another tensor by backward.
        ctx.weight, ctx.scaling = weight, scaling
        ctx.save_for_backward(x_TK, a_RK, b_NR, down_TR)
        return y_TN

    # x A^T is saved as a number, not as a function of x and A: a second derivative through it would be wrong.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TN,) = gradients
        x_TK, a_RK, b_NR, down_TR = ctx.saved_tensors
        dtype, scaling = x_TK.dtype, ctx.scaling
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        a, b = a_RK.to(dtype), b_NR.to(dtype)
        up_TR = g_TN @ b
        dx_TK = da_RK = db_NR = None
        if wants_x:
            weight_NK = dense(ctx.weight, dtype, (a, b, scaling) if ctx.fold else None)
            dx_TK = g_TN @ weight_NK
            if not ctx.fold:
                dx_TK.addmm_(up_TR, a, alpha=scaling)
        if wants_a:
            da_RK = (up_TR.T @ x_TK).to(a_RK.dtype) * scaling
        if wants_b:
            db_NR = (g_TN.T @ down_TR).to(b_NR.dtype) * scaling
        return dx_TK, None, None, da_RK, db_NR, None
