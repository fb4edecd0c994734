"""The ops in plain PyTorch, as their equations stand: what a kernel is measured and tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastlora_kernels.ops.four_bit import FourBit


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    lora_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + b + scaling (x A^T B^T + beta), all in x's type. LoRA, Hu et al. 2021 (arXiv:2106.09685), 4.1.

    x (..., K), weight (N, K) dense, bias (N), lora_a (R, K), lora_b (N, R), lora_bias beta (N) -> (..., N).
    """
    delta = x @ lora_a.to(x.dtype).T @ lora_b.to(x.dtype).T
    if lora_bias is not None:
        delta = delta + lora_bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias) + scaling * delta


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """y = m / |W + s B A| (x W^T + s (x A^T) B^T) + b, the norm of each row held constant in backward.

    DoRA, Liu et al. 2024 (arXiv:2402.09353), sections 4.1 and 4.3. magnitude (N); the rest as in lora_linear.
    """
    with torch.no_grad():
        norm = torch.linalg.vector_norm(weight.float() + scaling * (lora_b @ lora_a).float(), dim=1)
    y: torch.Tensor = lora_linear(x, weight, None, lora_a, lora_b, scaling)
    y = y * (magnitude / norm).to(x.dtype)
    return y if bias is None else y + bias


def row_norms(
    weight: FourBit | torch.Tensor,
    fold: tuple[torch.Tensor, torch.Tensor, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """|W + scaling B A| of each row, (N), in float32; A and scaling B rounded to `dtype` first."""
    a, b, scaling = fold
    dense = (
        weight.float() if isinstance(weight, torch.Tensor) else dequantize(weight, torch.float32)
    )
    norms: torch.Tensor = torch.linalg.vector_norm(dense + _product(a, b, scaling, dtype), dim=1)
    return norms


def _product(a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """scaling B A, (N, K), in float32, of what is rounded to `dtype` first."""
    return (scaling * b.float()).to(dtype).float() @ a.to(dtype).float()


def dequantize(
    weight: FourBit,
    dtype: torch.dtype,
    fold: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """c (code[q] absmax + scaling B A), (N, K), in float32 and rounded once to `dtype`; see ops/dequantize.py."""
    packed = weight.codes.view(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1).long()
    absmax = weight.absmax
    if weight.nested_absmax is not None:
        assert weight.nested_table is not None
        assert weight.offset is not None
        outer = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: absmax.numel()]
        absmax = weight.nested_table[absmax.long()] * outer + weight.offset
    scale = absmax.repeat_interleave(weight.blocksize)[: codes.numel()]
    dense = (weight.table[codes] * scale).view(weight.shape)
    if fold is not None:
        a, b, scaling = fold
        dense = dense + _product(a, b, scaling, dtype)
    if row_scale is not None:
        dense = dense * row_scale[:, None]
    return dense.to(dtype)


def lora_head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
    labels: torch.Tensor,
    *,
    shift: bool = False,
    num_items: torch.Tensor | float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """sum_t (logsumexp_v z_tv - z_t,label(t)) / n with all logits z (T, V) at once; see ops/head_loss.py."""
    if lora_a is None or lora_b is None:
        logits = torch.nn.functional.linear(hidden, weight, bias)
    else:
        logits = lora_linear(hidden, weight, bias, lora_a, lora_b, scaling)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if shift:
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels = labels.reshape(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), labels, reduction="sum", ignore_index=ignore_index
    )
    return total / ((labels != ignore_index).sum() if num_items is None else num_items)


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    gradient: bool,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Loss of each row (C), in float32; with `gradient`, logits (C, V) <- (softmax - onehot) times the slope of
    z = c tanh(k logits / c). Both 0 where the label is ignore_index."""
    ignored = labels == ignore_index
    labels = labels.masked_fill(ignored, 0)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = torch.logsumexp(z, dim=1)
    losses = (lse - z.gather(1, labels[:, None]).squeeze(1)).masked_fill(ignored, 0)
    if gradient:
        g = torch.exp(z - lse[:, None])
        g[torch.arange(len(labels), device=labels.device), labels] -= 1
        if softcap is not None:
            g *= 1 - (z / softcap) ** 2
        logits.copy_(g.masked_fill_(ignored[:, None], 0) * logit_scale)
    return losses


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """y = W[ids] + scaling A^T[ids] B^T, in weight's type. A's column `padding_idx` gets no gradient.

    ids (...), weight (V, K), lora_a (R, V), lora_b (K, R) -> (..., K).
    """
    down = torch.nn.functional.embedding(ids, lora_a.T, padding_idx=padding_idx)
    rows = torch.nn.functional.embedding(ids, weight)
    return (rows + scaling * (down @ lora_b.T)).to(weight.dtype)


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """x / (1 - p) where a uniform number of the seed's own generator is at least p, else 0."""
    generator = torch.Generator(x.device)
    generator.manual_seed(int(seed))
    drawn = torch.rand(x.shape, generator=generator, device=x.device)
    return torch.where(drawn >= p, x / (1 - p), 0).to(x.dtype)


def glu(
    gate: torch.Tensor, up: torch.Tensor, activation: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """f(gate) up, in at least float32 and rounded once to `dtype`, or gate's."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_activation(gate.to(wide), activation) * up.to(wide)).to(dtype or gate.dtype)


def glu_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    activation: str,
) -> None:
    """Writes dgate and dup, which may be gate and up, and h over dh."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    gate_, up_, dh_ = gate.to(wide), up.to(wide), dh.to(wide)
    value, slope = _activation(gate_, activation), _slope(gate_, activation)
    # Each of dh_, gate_ and up_ may be what is written to.
    h, dgate_, dup_ = value * up_, dh_ * up_ * slope, dh_ * value
    dgate.copy_(dgate_)
    dup.copy_(dup_)
    dh.copy_(h)


def _activation(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate)


def _slope(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """f'(gate), by what torch's autograd calls: inside an op of torch's there is no autograd."""
    ones = torch.ones_like(gate)
    slope: torch.Tensor
    if activation == "silu":
        slope = torch.ops.aten.silu_backward(ones, gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        slope = torch.ops.aten.gelu_backward(ones, gate, approximate=approximate)
    return slope
