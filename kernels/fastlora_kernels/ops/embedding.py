"""An embedding with a LoRA adapter: rows of W + s (B A)^T, looked up.

    y = W[ids] + s S B^T,  S = A^T[ids]
    dB = s g^T S,  dA^T[v] = s sum over ids_t = v of g_t B,  with g = dL/dy

LoRA, Hu et al. 2021 (arXiv:2106.09685), 4.1, as PEFT's lora.Embedding lays A and B out. The wide product is added in
place by the matrix product itself where W is of the product's dtype. dA is summed in float32, in a fixed order; it is
no more than T x R numbers, so that a kernel would win nothing.
Saved: ids and S. Shapes: T tokens, V vocabulary, K outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora_kernels.first_order import first_order


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """W[ids] + scaling A^T[ids] B^T; gradients for A and B, in their own dtypes, none for W.

    ids (...) integers; weight (V, K); lora_a (R, V), lora_b (K, R). The product is taken in `dtype`, else weight's.
    Returns (..., K) in weight's dtype. A's column `padding_idx` gets no gradient, as in torch.nn.Embedding.
    Raises ValueError: shapes that do not fit. IndexError, on a CPU: an id outside [0, V).
    """
    (v, k), r = weight.shape, lora_a.shape[0]
    if lora_a.shape != (r, v) or lora_b.shape != (k, r):
        raise ValueError(
            f"lora_embedding: weight {(v, k)}, lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not "
            "fit; expected (V, K), (R, V), (K, R)"
        )
    with torch.autocast(ids.device.type, enabled=False):
        y: torch.Tensor = LoraEmbedding.apply(
            ids.reshape(-1), weight, lora_a, lora_b, scaling, padding_idx, dtype or weight.dtype
        )
    return y.reshape(*ids.shape, k)


class LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids_T: torch.Tensor,
        weight_VK: torch.Tensor,
        a_RV: torch.Tensor,
        b_KR: torch.Tensor,
        scaling: float,
        padding_idx: int | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        y_TK = torch.nn.functional.embedding(ids_T, weight_VK)
        down_TR = torch.nn.functional.embedding(ids_T, a_RV.T).to(dtype)
        b = b_KR.to(dtype)
        if y_TK.dtype == dtype:
            y_TK.addmm_(down_TR, b.T, alpha=scaling)
        else:
            y_TK = torch.add(y_TK, down_TR @ b.T, alpha=scaling).to(y_TK.dtype)
        ctx.scaling, ctx.padding_idx = scaling, padding_idx
        ctx.save_for_backward(ids_T, a_RV, b_KR, down_TR)
        return y_TK

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ids_T, a_RV, b_KR, down_TR = ctx.saved_tensors
        dtype, scaling = down_TR.dtype, ctx.scaling
        _, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        g_TK = gradients[0].to(dtype)
        da_RV = db_KR = None
        if wants_a:
            up_TR = (g_TK @ b_KR.to(dtype)).to(torch.promote_types(dtype, torch.float32)) * scaling
            da_RV = _summed(up_TR, ids_T, a_RV.shape[1], ctx.padding_idx).T.to(a_RV.dtype)
        if wants_b:
            db_KR = (g_TK.T @ down_TR).to(b_KR.dtype) * scaling
        return None, None, da_RV, db_KR, None, None, None


def _summed(
    rows_TR: torch.Tensor, ids_T: torch.Tensor, size: int, padding_idx: int | None
) -> torch.Tensor:
    """Row v of the answer, (V, R), is the sum of the rows whose id is v."""
    if not rows_TR.is_cuda:
        padding = -1 if padding_idx is None else padding_idx
        total: torch.Tensor = torch.ops.aten.embedding_dense_backward(
            rows_TR, ids_T, size, padding, False
        )
        return total
    # On a GPU that one gives other last bits each time; this one sorts the ids.
    total = rows_TR.new_zeros(size, rows_TR.shape[1])
    total.index_put_((ids_T,), rows_TR, accumulate=True)
    if padding_idx is not None:
        total[padding_idx] = 0
    return total
