"""A 4-bit weight as the dense matrix that it stands for, with the adapter's product folded in if asked for.

W'_nk = code[q_nk] absmax_{block(nk)} + scaling (B A)_nk

Scales that are themselves quantized are absmax_j = code8[p_j] absmax8_{block8(j)} + offset (double quantization).
QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), section 3; the layout is bitsandbytes': two codes a byte, the
first in the high half, rows one behind the other.

The fold is right only here: code times absmax lies off the 16-bit grid, so that the rounding of the sum dithers
and a small delta survives on average; on a 16-bit base it would be rounded away.

Shapes: N outputs, K inputs, R rank, H bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastlora_kernels import reference
from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.triton_or_not import jit, tl, triton

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK_N, BLOCK_K = 64, 128


@dataclass(frozen=True, slots=True)
class FourBit:
    """What bitsandbytes keeps of an (N, K) weight. Made anew for each use: the tensors may be moved or
    replaced between two calls (weights that are streamed in)."""

    codes: torch.Tensor
    """uint8, N K / 2."""
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
        if (
            state is None
            or weight.dtype != torch.uint8
            or getattr(state, "packing_format_for_cpu", False)
            or len(state.shape) != 2
            or state.shape[1] % 2
        ):
            return None
        nested = state.state2 if state.nested else None
        return cls(
            codes=weight.data.view(-1),
            absmax=state.absmax,
            table=state.code,
            shape=(state.shape[0], state.shape[1]),
            blocksize=state.blocksize,
            nested_absmax=nested.absmax if nested else None,
            nested_table=nested.code if nested else None,
            nested_blocksize=nested.blocksize if nested else 1,
            offset=state.offset if nested else None,
        )


@jit
def _dequantize(
    codes_ptr, absmax_ptr, table_ptr, nested_absmax_ptr, nested_table_ptr, offset_ptr, a_ptr, b_ptr, out_ptr,
    n_rows, n_bytes, scaling,
    NESTED: tl.constexpr, FOLD: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_NH = (n_N[:, None] < n_rows) & (h_H[None, :] < n_bytes)
    byte_NH = n_N.to(tl.int64)[:, None] * n_bytes + h_H[None, :]  # 64 bits: 2^31 weights are 16 GB
    packed_NH = tl.load(codes_ptr + byte_NH, mask=inside_NH, other=0).to(tl.int32)
    # Both weights of a byte have the same scale: blocks are even.
    block_NH = byte_NH * 2 // BLOCKSIZE
    if NESTED:
        code_NH = tl.load(absmax_ptr + block_NH, mask=inside_NH, other=0).to(tl.int32)
        outer_NH = tl.load(
            nested_absmax_ptr + block_NH // NESTED_BLOCKSIZE, mask=inside_NH, other=0.0
        )
        scale_NH = tl.load(nested_table_ptr + code_NH) * outer_NH + tl.load(offset_ptr)
    else:
        scale_NH = tl.load(absmax_ptr + block_NH, mask=inside_NH, other=0.0)
    high_NH = tl.load(table_ptr + (packed_NH >> 4)) * scale_NH
    low_NH = tl.load(table_ptr + (packed_NH & 15)) * scale_NH
    weight_NK = tl.interleave(high_NH, low_NH)

    k_K = tl.program_id(1) * (2 * BLOCK_H) + tl.arange(0, 2 * BLOCK_H)
    inside_NK = (n_N[:, None] < n_rows) & (k_K[None, :] < 2 * n_bytes)
    if FOLD:
        r_R = tl.arange(0, PADDED_RANK)
        b_NR = tl.load(
            b_ptr + n_N.to(tl.int64)[:, None] * RANK + r_R[None, :],
            mask=(n_N[:, None] < n_rows) & (r_R[None, :] < RANK),
            other=0.0,
        )
        a_RK = tl.load(
            a_ptr + r_R.to(tl.int64)[:, None] * (2 * n_bytes) + k_K[None, :],
            mask=(r_R[:, None] < RANK) & (k_K[None, :] < 2 * n_bytes),
            other=0.0,
        )
        dtype = (
            out_ptr.dtype.element_ty
        )  # as everywhere: A and B are cast to x's type for the products
        delta_NK = tl.dot(b_NR.to(dtype), a_RK.to(dtype), input_precision="ieee")
        weight_NK += tl.cast(scaling, tl.float32) * delta_NK
    out_NK = out_ptr + n_N.to(tl.int64)[:, None] * (2 * n_bytes) + k_K[None, :]
    tl.store(out_NK, weight_NK.to(out_ptr.dtype.element_ty), mask=inside_NK)


def dequantize(
    weight: FourBit,
    dtype: torch.dtype,
    fold: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """The dense (N, K) matrix in `dtype`; with `fold` = (A (R, K), B (N, R), scaling), W + scaling B A.

    Computed in float32, rounded once. A and B contiguous, of any float type; they are rounded to `dtype` first.
    Raises ValueError: a backend that is not there (see dispatch).
    """
    if choose_backend(weight.codes.device, BACKENDS) == "reference":
        return reference.dequantize(weight, dtype, fold)
    n, k = weight.shape
    out_NK = torch.empty((n, k), dtype=dtype, device=weight.codes.device)
    a, b, scaling = fold or (weight.table, weight.table, 0.0)
    rank = a.shape[0] if fold else 16
    nested = weight.nested_absmax is not None
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K))
    _dequantize[grid](
        weight.codes, weight.absmax, weight.table,
        weight.nested_absmax if nested else weight.absmax,
        weight.nested_table if nested else weight.table,
        weight.offset if nested else weight.table,
        a, b, out_NK, n, k // 2, scaling,
        NESTED=nested, FOLD=fold is not None, RANK=rank, PADDED_RANK=max(16, triton.next_power_of_2(rank)),
        BLOCKSIZE=weight.blocksize, NESTED_BLOCKSIZE=weight.nested_blocksize,
        BLOCK_N=BLOCK_N, BLOCK_H=BLOCK_K // 2,
    )  # fmt: skip
    return out_NK
