"""Dropout whose mask is a function of a seed, so that backward, which needs it again, keeps the seed alone.

    D(x)_j = x_j / (1 - p) where u_j >= p, else 0;  u_j uniform in [0, 1), from the seed and j

Dropout, Srivastava et al. 2014; D is linear and its own transpose. The seed is drawn from torch's generator, whose
state a checkpointed forward restores: its recomputation has the same mask. On a GPU u is Philox (Salmon et al. 2011)
of seed and place; the reference seeds a generator of torch, so that their masks differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora_kernels import reference
from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.launch import cdiv, launch
from fastlora_kernels.triton_or_not import jit, tl

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK = 2048


@jit
def _dropout(x_ptr, seed_ptr, out_ptr, size, p, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    kept = tl.rand(tl.load(seed_ptr), place) >= p
    x = tl.load(x_ptr + place, mask=inside & kept, other=0.0).to(tl.float32)
    out = x / (1.0 - tl.cast(p, tl.float32))
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def draw_seeds(ps: Sequence[float], device: torch.device) -> torch.Tensor | None:
    """A seed for each p, from torch's generator of `device`; None, and no draw, where all of them are 0."""
    return torch.randint(2**31, (len(ps),), device=device) if any(ps) else None


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """D(x) in its dtype; x itself where p is 0. seed: int64, one number."""
    if p == 0:
        return x
    if choose_backend(x.device, BACKENDS) == "reference":
        return reference.dropout(x, p, seed)
    x = x.contiguous()
    out, size = torch.empty_like(x), x.numel()
    if size:
        launch(_dropout, (cdiv(size, BLOCK),), (x, seed, out), (size, p), {"BLOCK": BLOCK})
    return out
