"""The products of an adapter with a large matrix on one side, and on the other no more than the rank.

    U = s g B,  dB = g^T S,  and with x, A^T and U in the places of g, B and S:  S = s x A^T,  dA^T = x^T U

Both of a pair read the same matrix, (T, N), which is most of their time. One kernel takes both from a single read: a
program walks down some tokens of a strip of outputs, keeps its part of dB in registers, and writes its part of U for
each block of tokens. A second kernel sums up the parts of both in a fixed order, in float32: no atomics, so that a
result is the same each time. Cf. LoRAFusion (arXiv:2510.00206), which fuses them too.

    y = bias + s S B^T

writes one, which is all of its time: cuBLAS takes 14.0 us where 10.1 are enough, at 4096 x 4096 and rank 16 (H200).
Shapes: T tokens, N outputs, R rank, P parts.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.launch import cdiv, launch, power_of_2
from fastlora_kernels.triton_or_not import jit, tl, triton

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK_T, WARPS = 64, 8
TILES = ((512, 3), (256, 3), (128, 3), (128, 2))
"""Outputs, and blocks of tokens that are loaded ahead; the first that fits into a processor's shared memory, and the
widest for 8,192 outputs and more alone: the fastest of 30 on an H200 (docs/log.md), one program for each processor."""
EXPANDED = (64, 128, 4)
"""Tokens, outputs, warps: the fastest of 48 on an H200."""
BLOCK_SUM, PARTS_AT_ONCE = 256, 16
"""Loads that wait for nothing: one part after the other would take the memory's latency for each."""


@jit
def _up_and_gradient(
    g_ptr, b_ptr, down_ptr, up_parts_ptr, db_parts_ptr,
    n_tokens, n_columns, down_stride, b_stride_n, b_stride_r, tokens_each,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r_R = tl.arange(0, BLOCK_R)
    inside_NR = (n_N[:, None] < n_columns) & (r_R[None, :] < RANK)
    b_place_NR = n_N.to(tl.int64)[:, None] * b_stride_n + r_R[None, :] * b_stride_r
    b_NR = tl.load(b_ptr + b_place_NR, mask=inside_NR, other=0.0)
    up_part = up_parts_ptr + tl.program_id(0).to(tl.int64) * n_tokens * RANK
    db_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first = tl.program_id(1) * tokens_each
    for start in range(first, tl.minimum(first + tokens_each, n_tokens), BLOCK_T):
        t_T = start + tl.arange(0, BLOCK_T)
        g_TN = tl.load(
            g_ptr + t_T.to(tl.int64)[:, None] * n_columns + n_N[None, :],
            mask=(t_T[:, None] < n_tokens) & (n_N[None, :] < n_columns),
            other=0.0,
        )
        inside_TR = (t_T[:, None] < n_tokens) & (r_R[None, :] < RANK)
        down_TR = tl.load(
            down_ptr + t_T.to(tl.int64)[:, None] * down_stride + r_R[None, :],
            mask=inside_TR,
            other=0.0,
        )
        db_NR += tl.dot(tl.trans(g_TN), down_TR, input_precision="ieee")
        up_TR = tl.dot(g_TN, b_NR, input_precision="ieee")
        up_place_TR = t_T.to(tl.int64)[:, None] * RANK + r_R[None, :]
        tl.store(up_part + up_place_TR, up_TR, mask=inside_TR)
    db_part = db_parts_ptr + tl.program_id(1).to(tl.int64) * n_columns * RANK
    db_place_NR = n_N.to(tl.int64)[:, None] * RANK + r_R[None, :]
    tl.store(db_part + db_place_NR, db_NR, mask=inside_NR)


@jit
def _expand(
    down_ptr, b_ptr, bias_ptr, y_ptr,
    n_tokens, n_columns, down_stride, y_stride, b_stride_n, b_stride_r, scaling,
    BIAS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_T1 = t_T.to(tl.int64)[:, None]
    r_R = tl.arange(0, BLOCK_R)
    inside_TR = (t_T[:, None] < n_tokens) & (r_R[None, :] < RANK)
    down_TR = tl.load(down_ptr + row_T1 * down_stride + r_R[None, :], mask=inside_TR, other=0.0)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_RN = tl.load(
        b_ptr + n_N.to(tl.int64)[None, :] * b_stride_n + r_R[:, None] * b_stride_r,
        mask=(n_N[None, :] < n_columns) & (r_R[:, None] < RANK),
        other=0.0,
    )
    y_TN = tl.cast(scaling, tl.float32) * tl.dot(down_TR, b_RN, input_precision="ieee")
    if BIAS:
        y_TN += tl.load(bias_ptr + n_N, mask=n_N < n_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + row_T1 * y_stride + n_N[None, :],
        y_TN.to(y_ptr.dtype.element_ty),
        mask=(t_T[:, None] < n_tokens) & (n_N[None, :] < n_columns),
    )


@jit
def _sum_block(
    parts_ptr, out_ptr, block, parts, size, row_stride, column_stride, scaling,
    RANK: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    place_B = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total_B = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, AT_ONCE):
        part_P = first + tl.arange(0, AT_ONCE)
        part_PB = tl.load(
            parts_ptr + part_P.to(tl.int64)[:, None] * size + place_B[None, :],
            mask=(part_P[:, None] < parts) & (place_B[None, :] < size),
            other=0.0,
        )
        total_B += tl.sum(part_PB, axis=0)
    out_B = (scaling * total_B).to(out_ptr.dtype.element_ty)
    out_place_B = place_B // RANK * row_stride + place_B % RANK * column_stride
    tl.store(out_ptr + out_place_B, out_B, mask=place_B < size)


@jit
def _sum_parts(
    up_parts_ptr, db_parts_ptr, up_ptr, db_ptr,
    up_blocks, up_parts, up_size, up_stride, db_parts, db_size, db_stride_n, db_stride_r, scaling,
    RANK: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Both sums in one launch: the first programs U's, the others dB's."""
    block = tl.program_id(0)
    if block < up_blocks:
        scaling = tl.cast(scaling, tl.float32)
        _sum_block(up_parts_ptr, up_ptr, block, up_parts, up_size, up_stride, 1, scaling,
                   RANK, BLOCK, AT_ONCE)  # fmt: skip
    else:
        block -= up_blocks
        _sum_block(db_parts_ptr, db_ptr, block, db_parts, db_size, db_stride_n, db_stride_r, 1.0,
                   RANK, BLOCK, AT_ONCE)  # fmt: skip


def one_pass(tokens: int, n: int, rank: int) -> bool:
    """Whether one read of g with parts to sum up beats two products of cuBLAS, by the GPU's time: on an H200 9 us
    against 14 at 4096 x 1024 and rank 16, 41 against 64 at 4096 x 14336, nothing at rank 64. Both ways are two launches
    for the host."""
    return rank <= 32 and tokens * n >= 2**22


def served(g: torch.Tensor, rank: int) -> bool:
    """Whether in_one_pass is the way for g, (T, N)."""
    backend = choose_backend(g.device, BACKENDS)
    # In float32 its tiles do not fit into shared memory; the interpreter has no such limit, and no bfloat16.
    fits = backend == "interpret" or (backend == "triton" and g.element_size() == 2)
    return fits and g.is_contiguous() and one_pass(g.shape[0], g.shape[1], rank)


def expand(
    out: torch.Tensor,
    down: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
) -> None:
    """bias + scaling S B^T, written into `out` (T, N). S (T, R), B (N, R) and bias (N) of its dtype, of any
    strides; the kernel takes rows of `out` and S that lie apart, and any B. Summed in float32, rounded once."""
    (tokens, n), rank = out.shape, b.shape[1]
    by_hand = expanded_by_hand(tokens, n, rank) and out.element_size() == 2
    by_hand = by_hand and out.stride(1) == down.stride(1) == 1
    by_hand = by_hand and (bias is None or bias.is_contiguous())
    if not by_hand or choose_backend(out.device, BACKENDS) == "reference":
        if bias is None:
            out.addmm_(down, b.T, beta=0, alpha=scaling)  # what is there is not read, NaN neither
        else:
            torch.addmm(bias, down, b.T, alpha=scaling, out=out)
        return
    block_t, block_n, warps = EXPANDED
    launch(
        _expand,
        (cdiv(tokens, block_t), cdiv(n, block_n)),
        (down, b, down if bias is None else bias, out),
        (tokens, n, down.stride(0), out.stride(0), *b.stride(), float(scaling)),
        {"BIAS": bias is not None, "RANK": rank, "BLOCK_R": max(16, power_of_2(rank)),
         "BLOCK_T": block_t, "BLOCK_N": block_n},
        num_warps=warps,
    )  # fmt: skip


def expanded_by_hand(tokens: int, n: int, rank: int) -> bool:
    """Whether a kernel of ours beats cuBLAS by more than its launch costs Python: on an H200 10.1 us against 14.0 at
    4096 x 4096 and rank 16, 31.8 against 42.0 at 4096 x 14336; at rank 64 it saves 2, which layers did not show."""
    return rank <= 32 and tokens * n >= 2**24


def up_and_gradient(
    g: torch.Tensor,
    b: torch.Tensor,
    down: torch.Tensor | None,
    scaling: float,
    up: torch.Tensor,
    dtype: torch.dtype | None,
) -> torch.Tensor | None:
    """dB = g^T S, (N, R), in `dtype`, and U = scaling g B written into `up`, (T, R).

    g (T, N) and b (N, R) contiguous; down, S (T, R), and up may be strips of columns of a wider matrix; all in one
    dtype. Summed in float32. Without S, or with dtype None, dB is None.
    """
    if down is None or dtype is None:
        up.addmm_(g, b, beta=0, alpha=scaling)
        return None
    if served(g, b.shape[1]):
        return in_one_pass(g, b, down, scaling, up, dtype)
    up.addmm_(g, b, beta=0, alpha=scaling)
    return product(g.T, down).to(dtype)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right, in float32 for 16-bit ones; a GPU gives it as it was summed up, not rounded in between."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


@cache
def processors(device: torch.device) -> int:
    """How many programs run at once, one on each; of a CPU, an H100's."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def room(device: torch.device) -> int:
    """Shared memory that a program may have, in bytes; of a CPU, an A100's."""
    if device.type != "cuda":
        return 163 * 1024
    utils = triton.runtime.driver.active.utils  # who refuses a kernel that takes more
    return int(utils.get_device_properties(device.index or 0)["max_shared_mem"])


def tile(room: int, n: int, rank: int) -> tuple[int, int]:
    """Of TILES, for N outputs in 16 bits. tests/kernels/test_compile.py holds it to what is compiled."""
    wide = power_of_2(max(16, rank))
    for block_n, stages in TILES:
        ahead = stages * BLOCK_T * (block_n + wide)
        if 2 * (ahead + block_n * wide) + 4096 <= room and (block_n <= 256 or n >= 8192):
            return block_n, stages
    return TILES[-1]


def in_one_pass(
    g: torch.Tensor,
    b: torch.Tensor,
    down: torch.Tensor,
    scaling: float,
    up: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See up_and_gradient; for 16-bit types and ranks up to 64. Here b may be a transposed matrix, and dB is then
    one, too."""
    (tokens, n), rank = g.shape, b.shape[1]
    strips, chunks, tokens_each, blocks, options = _cut(
        tokens, n, rank, room(g.device), processors(g.device)
    )
    up_parts = g.new_empty(strips, tokens, rank, dtype=torch.float32)
    db_parts = g.new_empty(chunks, n, rank, dtype=torch.float32)
    launch(
        _up_and_gradient,
        (strips, chunks),
        (g, b, down, up_parts, db_parts),
        (tokens, n, down.stride(0), *b.stride(), tokens_each),
        blocks,
        **options,
    )
    db = torch.empty_strided((n, rank), b.stride(), dtype=dtype, device=g.device)
    up_size, db_size = tokens * rank, n * rank
    up_blocks = cdiv(up_size, BLOCK_SUM)
    launch(
        _sum_parts,
        (up_blocks + cdiv(db_size, BLOCK_SUM),),
        (up_parts, db_parts, up, db),
        (up_blocks, strips, up_size, up.stride(0), chunks, db_size, *db.stride(), float(scaling)),
        {"RANK": rank, "BLOCK": BLOCK_SUM, "AT_ONCE": PARTS_AT_ONCE},
    )
    return db


@lru_cache(1024)
def _cut(
    tokens: int, n: int, rank: int, room: int, processors: int
) -> tuple[int, int, int, dict[str, int], dict[str, int]]:
    """Strips of outputs, chunks of tokens, tokens of a chunk; what is compiled in, and the launch's options, neither to
    be written to."""
    block_n, stages = tile(room, n, rank)
    strips = cdiv(n, block_n)
    chunks = max(1, min(cdiv(tokens, BLOCK_T), processors // strips))
    tokens_each = cdiv(cdiv(tokens, chunks), BLOCK_T) * BLOCK_T
    blocks = {
        "RANK": rank,
        "BLOCK_R": max(16, power_of_2(rank)),
        "BLOCK_T": BLOCK_T,
        "BLOCK_N": block_n,
    }
    options = {"num_warps": WARPS, "num_stages": stages}
    return strips, cdiv(tokens, tokens_each), tokens_each, blocks, options
