"""Small tensors, such as the A and B of a layer, in another dtype, in one launch.

torch._foreach_copy_ gives 65,536 numbers to a program, and so takes three times as long on a GPU: an A has no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.launch import cdiv, launch
from fastlora_kernels.triton_or_not import jit, tl

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK = 1024
MOST = 6
"""Tensors at once: A and B of q, k and v."""


@jit
def _copy(from_ptr, to_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(from_ptr + place, mask=place < size, other=0.0)
    tl.store(to_ptr + place, values.to(to_ptr.dtype.element_ty), mask=place < size)


@jit
def _cast(
    ptr_0, ptr_1, ptr_2, ptr_3, ptr_4, ptr_5, out_ptr,
    start_0, start_1, start_2, start_3, start_4, start_5,
    size_0, size_1, size_2, size_3, size_4, size_5,
    BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    if which == 0:
        _copy(ptr_0, out_ptr + start_0, size_0, BLOCK)
    elif which == 1:
        _copy(ptr_1, out_ptr + start_1, size_1, BLOCK)
    elif which == 2:
        _copy(ptr_2, out_ptr + start_2, size_2, BLOCK)
    elif which == 3:
        _copy(ptr_3, out_ptr + start_3, size_3, BLOCK)
    elif which == 4:
        _copy(ptr_4, out_ptr + start_4, size_4, BLOCK)
    else:
        _copy(ptr_5, out_ptr + start_5, size_5, BLOCK)


def cast_into(out: torch.Tensor, starts: Sequence[int], given: Sequence[torch.Tensor]) -> None:
    """Each of `given`, of any shape and float dtype, in the dtype of `out`, a vector, from its start on."""
    backend = choose_backend(out.device, BACKENDS)
    served = len(given) <= MOST and all(one.is_contiguous() for one in given)
    if backend == "reference" or not served:
        parts = [
            out[start : start + one.numel()].view(one.shape)
            for start, one in zip(starts, given, strict=True)
        ]
        torch._foreach_copy_(parts, list(given))
        return
    sizes = [one.numel() for one in given]
    missing = MOST - len(given)
    none = [0] * missing
    launch(
        _cast,
        (cdiv(max(sizes), BLOCK), len(given)),
        (*given, *[given[0]] * missing, out),
        (*starts, *none, *sizes, *none),
        {"BLOCK": BLOCK},
    )
