"""The products of an adapter that read a large matrix: tall, and no wider than the rank.

    U = s g B,  dB = g^T S

Both read g, (T, N), which is most of their time. One kernel takes both from a single read: a program walks down some
tokens of a strip of outputs, keeps its part of dB in registers, and writes its part of U for each block of tokens.
The parts are then summed up in a fixed order, in float32: no atomics, so that a result is the same each time.
Cf. LoRAFusion (arXiv:2510.00206), which fuses them too. Shapes: T tokens, N outputs, R rank, P parts.
"""

from __future__ import annotations

import torch

from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.launch import cdiv, launch, power_of_2
from fastlora_kernels.triton_or_not import jit, tl

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK_T, BLOCK_N, BLOCK_SUM = 64, 256, 1024
STAGES, PROGRAMS = 3, 132
"""The fastest of those tried on an H100 (docs/log.md): one program for each of its processors."""


@jit
def _up_and_gradient(
    g_ptr, b_ptr, down_ptr, up_parts_ptr, db_parts_ptr, n_tokens, n_columns, down_stride, tokens_each,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r_R = tl.arange(0, BLOCK_R)
    inside_NR = (n_N[:, None] < n_columns) & (r_R[None, :] < RANK)
    place_NR = n_N.to(tl.int64)[:, None] * RANK + r_R[None, :]
    b_NR = tl.load(b_ptr + place_NR, mask=inside_NR, other=0.0)
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
    tl.store(db_part + place_NR, db_NR, mask=inside_NR)


@jit
def _sum_parts(
    parts_ptr, out_ptr, parts, size, out_stride, scaling, RANK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptr = parts_ptr + place
    for _ in range(parts):
        total += tl.load(part_ptr, mask=place < size, other=0.0)
        part_ptr += size
    out = (tl.cast(scaling, tl.float32) * total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place // RANK * out_stride + place % RANK, out, mask=place < size)


def one_pass(tokens: int, n: int, rank: int) -> bool:
    """Whether one read of g with parts to sum up beats two products of cuBLAS: on an H100 0.077 ms against 0.125 at
    16384 x 4096 and rank 16, nothing at rank 64; below that size its third launch costs the host more than it wins."""
    return rank <= 32 and tokens * n >= 2**26


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
    backend = choose_backend(g.device, BACKENDS)
    # In float32 its tiles do not fit into shared memory; the interpreter has no such limit, and no bfloat16.
    served = backend == "interpret" or (backend == "triton" and g.element_size() == 2)
    if down is None or dtype is None:
        up.addmm_(g, b, beta=0, alpha=scaling)
        return None
    if served and one_pass(g.shape[0], *b.shape):
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


def in_one_pass(
    g: torch.Tensor,
    b: torch.Tensor,
    down: torch.Tensor,
    scaling: float,
    up: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See up_and_gradient; for 16-bit types and ranks up to 64."""
    (tokens, n), rank = g.shape, b.shape[1]
    strips = cdiv(n, BLOCK_N)
    chunks = max(1, min(cdiv(tokens, BLOCK_T), PROGRAMS // strips))
    tokens_each = cdiv(cdiv(tokens, chunks), BLOCK_T) * BLOCK_T
    chunks = cdiv(tokens, tokens_each)
    up_parts = torch.empty((strips, tokens, rank), dtype=torch.float32, device=g.device)
    db_parts = torch.empty((chunks, n, rank), dtype=torch.float32, device=g.device)
    blocks = {
        "BLOCK_R": max(16, power_of_2(rank)),
        "BLOCK_T": BLOCK_T,
        "BLOCK_N": BLOCK_N,
    }
    launch(
        _up_and_gradient,
        (strips, chunks),
        (g, b, down, up_parts, db_parts),
        (tokens, n, down.stride(0), tokens_each),
        {"RANK": rank} | blocks,
        num_warps=8,
        num_stages=STAGES,
    )
    db = torch.empty((n, rank), dtype=dtype, device=g.device)
    for parts, out, factor in ((up_parts, up, scaling), (db_parts, db, 1.0)):
        size = parts[0].numel()
        launch(
            _sum_parts,
            (cdiv(size, BLOCK_SUM),),
            (parts, out),
            (len(parts), size, out.stride(0), float(factor)),
            {"RANK": rank, "BLOCK": BLOCK_SUM},
        )
    return db
