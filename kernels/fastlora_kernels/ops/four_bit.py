"""The 4-bit weight of bitsandbytes, as our kernels take it.

w_nk = code[q_nk] absmax_{block(nk)}, absmax_j = code8[p_j] absmax8_{block8(j)} + offset with double quantization

QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), section 3; the layout is bitsandbytes': two codes a byte, the first in
the high half, rows one behind the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._C import DisableTorchFunctionSubclass


class FourBit(NamedTuple):
    """What bitsandbytes keeps of an (N, K) weight. Made anew for each direction: the tensors may be moved or
    replaced in between (weights that are streamed in)."""

    source: Any
    """The Params4bit, for FourBit.of in backward; None where the tensors are saved themselves (ops/registered.py)."""
    codes: torch.Tensor
    """uint8, N K / 2 of them."""
    absmax: torch.Tensor
    """A scale for each block of `blocksize` weights: float32, or uint8 when `nested`."""
    table: torch.Tensor
    """float32, 16: the values of the codes."""
    shape: tuple[int, int]
    blocksize: int
    nested_absmax: torch.Tensor | None = None
    """float32, a scale for each block of `nested_blocksize` scales."""
    nested_table: torch.Tensor | None = None
    """float32, 256."""
    nested_blocksize: int = 1
    offset: torch.Tensor | None = None
    """float32, added to each scale."""

    @classmethod
    def of(cls, weight: Any) -> FourBit | None:
        """From a bitsandbytes Params4bit; None if it is not quantized yet, or in a layout of another kind
        (codes not in bytes, packed for a CPU's kernel, an odd number of inputs)."""
        state = getattr(weight, "quant_state", None)
        if state is None:
            return None
        # A Params4bit answers each question about itself through Python, at several microseconds apiece.
        with DisableTorchFunctionSubclass():
            if weight.dtype != torch.uint8:
                return None
            codes = weight.data
        n, *rest = state.shape
        if (
            len(rest) != 1
            or rest[0] % 2
            or not codes.is_contiguous()
            or getattr(state, "packing_format_for_cpu", False)
        ):
            return None
        given = (weight, codes, state.absmax, state.code, (n, rest[0]), state.blocksize)
        if not state.nested:
            return cls(*given)
        nested = state.state2
        return cls(*given, nested.absmax, nested.code, nested.blocksize, state.offset)
