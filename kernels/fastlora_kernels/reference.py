"""The ops in plain PyTorch: what a kernel is measured and tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class LoraLinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T, with the frozen W and b left without gradients.

    LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1. Backward, with g = dL/dy:
    dx = g W + s (g B) A,  dA = s (g B)^T x,  dB = s g^T (x A^T).
    The rank-R products are taken first, so that no (N, K) delta is ever formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None,
        a_RK: torch.Tensor,
        b_NR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        down_TR = x_TK @ a_RK.to(x_TK.dtype).T
        ctx.save_for_backward(x_TK, weight_NK, a_RK, b_NR, down_TR)
        ctx.scaling = scaling
        y_TN = torch.nn.functional.linear(x_TK, weight_NK, bias_N)
        return y_TN + scaling * (down_TR @ b_NR.to(x_TK.dtype).T)

    # x A^T is saved as a number, not as a function of x and A: a second derivative through it would be wrong.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g_TN,) = gradients
        x_TK, weight_NK, a_RK, b_NR, down_TR = ctx.saved_tensors
        up_TR = ctx.scaling * (g_TN @ b_NR.to(g_TN.dtype))
        dx_TK = g_TN @ weight_NK + up_TR @ a_RK.to(g_TN.dtype)
        da_RK = (up_TR.T @ x_TK).to(a_RK.dtype)
        db_NR = (ctx.scaling * (g_TN.T @ down_TR)).to(b_NR.dtype)
        return dx_TK, None, None, da_RK, db_NR, None
