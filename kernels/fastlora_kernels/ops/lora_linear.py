"""A linear layer with a LoRA adapter beside it."""

from __future__ import annotations

import torch

from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.reference import LoraLinear

BACKENDS: tuple[Backend, ...] = ("reference",)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """x W^T + b + scaling (x A^T) B^T; gradients for x, A and B, none for W and b.

    x (..., K); weight (N, K) and bias (N) in x's dtype; lora_a (R, K) and lora_b (N, R) in any float
    dtype, in which their gradients come back. Returns (..., N) in x's dtype.
    Raises ValueError: shapes that do not fit, or a backend that is not there (see dispatch).
    """
    n, k = weight.shape
    r = lora_a.shape[0]
    if x.shape[-1] != k or lora_a.shape != (r, k) or lora_b.shape != (n, r):
        raise ValueError(
            f"lora_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_a {tuple(lora_a.shape)} and "
            f"lora_b {tuple(lora_b.shape)} do not fit; expected (..., K), (N, K), (R, K), (N, R)"
        )
    choose_backend(x.device, BACKENDS)  # one backend so far; refuses a request for another
    y: torch.Tensor = LoraLinear.apply(x.reshape(-1, k), weight, bias, lora_a, lora_b, scaling)
    return y.reshape(*x.shape[:-1], n)
