"""The loss of a language model from its last hidden states, with a LoRA adapter on the output layer or without.

    z = k (h W^T + b + s S B^T),  S = h A^T,  softcapped: z <- c tanh(z / c)
    loss = sum_t (logsumexp_v z_tv - z_t,label(t)) / n
    g = (softmax(z) - onehot) dz/d(h W^T),  dh = g W + s (g B) A,  dA = s (g B)^T h,  dB = s g^T S;  all times 1/n

LoRA, Hu et al. 2021 (arXiv:2106.09685), 4.1; softcapping, Gemma 2 (arXiv:2408.00118), 2. That gradients may be
taken chunk by chunk in the forward pass, as the loss is one number: Hsu et al. 2024 (Liger, arXiv:2410.10989), 3.2.

Rows without a label are dropped before any product; how many are left is asked of the device, which waits for it.
Where that must not be (a CUDA graph), the caller says how many labels there are at most: so many rows are taken, the
labelled ones first, and those without a label count 0. The rows go in equal chunks of at most
max(1, LOGITS_BYTES / (V x bytes of a logit)) rows through one buffer, which holds logits and then g in the compute
dtype; maximum, sum, loss and softmax are float32. g is kept without 1/n, which in float16 could make it vanish: n and
the upstream gradient come in during backward, in float32. dA, dB, dW and db are summed over the chunks in float32.
g B and g^T S come of one read of g, where that is faster (ops/skinny.py).

Memory beside inputs and outputs: the buffer; dh of the labelled rows (N x K); 2 x chunk x K; the sums; their parts of
one read, in float32: chunk x R for each 512 of V (256 or 128 where a processor has less shared memory than Hopper's,
ops/skinny.py), and V x R for each program that shares such a strip: one from V = 67,000 on. Without Triton
also three times the buffer in float32.
Deterministic: no atomics, a fixed order. Shapes: T tokens, N of them labelled, C in a chunk, K inputs, V vocabulary,
R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastlora_kernels import reference
from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.first_order import first_order
from fastlora_kernels.launch import launch, power_of_2
from fastlora_kernels.ops.lora_linear import add_up, dense, frozen
from fastlora_kernels.ops.skinny import product, up_and_gradient
from fastlora_kernels.triton_or_not import jit, tl

BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
LOGITS_BYTES = 2**28
"""1,046 rows of Llama 3's 128,256 logits in 16 bits: enough for the products to be bound by arithmetic."""
BLOCK_V = 16384
ALIGNED = 64
"""Rows of the buffer begin at multiples of so many logits: products and kernel then load whole vectors, at any V."""


class Shape(NamedTuple):
    """What becomes of h W^T + ... before the softmax."""

    logit_scale: float
    softcap: float | None


@jit
def _tanh(x):
    u = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - u) / (1.0 + u)
    square = x * x  # near zero 1 - u cancels, and four terms of the series do better
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -t, t))


@jit
def _tanh_slope(x):
    """1 - tanh^2, which cancels where it is small, in another form."""
    u = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * u / ((1.0 + u) * (1.0 + u))


@jit
def _cross_entropy(
    logits_ptr, labels_ptr, loss_ptr, n_columns, row_stride, ignored, logit_scale, softcap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    counts = label != ignored
    scale, cap = tl.cast(logit_scale, tl.float32), tl.cast(softcap, tl.float32)
    # A label outside the vocabulary makes the loss NaN; it must not read another row's logit.
    known = (label >= 0) & (label < n_columns)
    chosen = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32) * scale
    if SOFTCAP:
        chosen = cap * _tanh(chosen / cap)
    # A maximum and a sum for each eight logits, which one thread holds: until the end none waits for another.
    highest_G = tl.full((BLOCK_V // 8,), -float("inf"), tl.float32)
    total_G = tl.zeros((BLOCK_V // 8,), tl.float32)
    for start in range(0, n_columns, BLOCK_V):
        v_V = start + tl.arange(0, BLOCK_V)
        z_V = tl.load(row_ptr + v_V, mask=v_V < n_columns, other=0.0).to(tl.float32) * scale
        if SOFTCAP:
            z_V = cap * _tanh(z_V / cap)
        z_V = tl.where(v_V < n_columns, z_V, -float("inf"))
        z_G8 = tl.reshape(z_V, (BLOCK_V // 8, 8))
        higher_G = tl.maximum(highest_G, tl.max(z_G8, axis=1))
        from_G = tl.where(higher_G == -float("inf"), 0.0, higher_G)  # -inf from -inf is NaN
        sum_G = tl.sum(tl.exp(z_G8 - from_G[:, None]), axis=1)
        total_G = total_G * tl.exp(highest_G - from_G) + sum_G
        highest_G = higher_G
    highest = tl.max(highest_G, axis=0)
    lse = highest + tl.log(tl.sum(total_G * tl.exp(highest_G - highest), axis=0))
    tl.store(loss_ptr + row, tl.where(counts, lse - chosen, 0.0))
    if GRADIENT:
        # What exp does not overflow for.
        outside: tl.constexpr = 0.0 if SOFTCAP else -float("inf")
        for start in range(0, n_columns, BLOCK_V):
            v_V = start + tl.arange(0, BLOCK_V)
            z_V = tl.load(row_ptr + v_V, mask=v_V < n_columns, other=outside).to(tl.float32) * scale
            slope_V = tl.full((BLOCK_V,), 1.0, tl.float32) * scale
            if SOFTCAP:
                slope_V *= _tanh_slope(z_V / cap)
                z_V = cap * _tanh(z_V / cap)
            g_V = (tl.exp(z_V - lse) - tl.where(v_V == label, 1.0, 0.0)) * slope_V
            g_V = tl.where(counts, g_V, 0.0)
            tl.store(row_ptr + v_V, g_V.to(logits_ptr.dtype.element_ty), mask=v_V < n_columns)


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shape: Shape,
    gradient: bool,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The loss of each row of `logits` (C, V; rows may lie apart), (C) in float32; with `gradient`, that of its logits
    takes their place. labels (C), each in [0, V) or ignore_index, where both are 0."""
    if choose_backend(logits.device, BACKENDS) == "reference":
        return reference.cross_entropy_(logits, labels, *shape, gradient, ignore_index)
    loss_C = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block = max(1024, min(BLOCK_V, power_of_2(logits.shape[1])))
    launch(
        _cross_entropy,
        (logits.shape[0],),
        (logits, labels, loss_C),
        (logits.shape[1], logits.stride(0), ignore_index, float(shape.logit_scale),
         float(shape.softcap or 1.0)),
        {"SOFTCAP": shape.softcap is not None, "GRADIENT": gradient, "BLOCK_V": block},
        num_warps=max(4, block // 512),
    )  # fmt: skip
    return loss_C


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
    most_labels: int | None = None,
) -> torch.Tensor:
    """The loss above, a float32 number; gradients for hidden, weight, bias, A and B, in their own dtypes.

    hidden (..., K); weight (V, K) dense, or a Params4bit of that shape; bias (V); lora_a (R, K) and lora_b (V, R), or
    neither; labels (...). Label t belongs to hidden t; with `shift`, to hidden t - 1 of the same row, as transformers
    means it. The sum is divided by num_items, or by the number of labels: of none at all the mean is then NaN, as in
    transformers, and the sum over num_items 0; every gradient is 0 in both cases.
    The products are of autocast's dtype where that is on, else of hidden's.

    With most_labels, nothing waits for the device, and so many rows cost what they cost with labels. The caller answers
    for it that no more are labelled: the loss would go past the rest without a word.

    Raises ValueError: shapes that do not fit, one of A and B without the other, a 4-bit layout that FourBit.of does not
    know, a softcap that is not positive. A label outside [0, V) makes the loss NaN on a GPU, and raises on a CPU.
    """
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_head_loss: lora_a and lora_b go together")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"lora_head_loss: softcap {softcap} is not positive")
    _check(hidden, weight, bias, lora_a, lora_b, labels)
    if shift:
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    device = hidden.device
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    labels_T = labels.reshape(-1).to(device)
    ignored_T = labels_T == ignore_index
    if most_labels is None:
        rows_N = (~ignored_T).nonzero().squeeze(1)
    else:
        # In the order of nonzero, and all of them different, since backward writes to them.
        rows_N = ignored_T.to(torch.uint8).argsort(stable=True)[:most_labels]
    if num_items is None:
        num_items = len(rows_N) if most_labels is None else (~ignored_T).sum()
    if not isinstance(num_items, torch.Tensor):
        num_items = torch.full((), num_items, dtype=torch.float64, device=device)  # without a wait
    with torch.autocast(device.type, enabled=False):
        loss: torch.Tensor = HeadLoss.apply(
            hidden.reshape(-1, hidden.shape[-1]), weight, bias, lora_a, lora_b, scaling, labels_T[rows_N], rows_N,
            num_items.to(device), Shape(logit_scale, softcap), ignore_index, dtype, torch.is_grad_enabled(),
        )  # fmt: skip
    return loss


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    labels: torch.Tensor,
) -> None:
    v, k = frozen(weight).shape
    r = 0 if lora_a is None else lora_a.shape[0]
    fits = hidden.shape[-1] == k and labels.shape == hidden.shape[:-1]
    fits = fits and (bias is None or bias.shape == (v,))
    if lora_a is not None and lora_b is not None:
        fits = fits and lora_a.shape == (r, k) and lora_b.shape == (v, r)
    if not fits:
        given = [None if t is None else tuple(t.shape) for t in (bias, lora_a, lora_b)]
        raise ValueError(
            f"lora_head_loss: hidden {tuple(hidden.shape)}, weight {(v, k)}, bias {given[0]}, lora_a {given[1]}, "
            f"lora_b {given[2]} and labels {tuple(labels.shape)} do not fit; expected (..., K), (V, K), (V), (R, K), "
            "(V, R), (...)"
        )


def _and(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total.add_(more)


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TK: torch.Tensor,
        weight: torch.Tensor,
        bias_V: torch.Tensor | None,
        a_RK: torch.Tensor | None,
        b_VR: torch.Tensor | None,
        scaling: float,
        labels_N: torch.Tensor,
        rows_N: torch.Tensor,
        items: torch.Tensor,
        shape: Shape,
        ignore_index: int,
        dtype: torch.dtype,
        trains: bool,
    ) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        device, items = hidden_TK.device, items.to(wide)
        weight_VK = dense(frozen(weight), dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        a, b = (None if t is None else t.to(dtype) for t in (a_RK, b_VR))
        (v, k), n = weight_VK.shape, len(rows_N)
        wants = [trains and needed for needed in ctx.needs_input_grad[:5]]
        dw_VK = dbias_V = da_RK = db_VR = None
        dh_NK = torch.empty((n, k), dtype=dtype, device=device) if wants[0] else None
        losses_N = torch.empty(n, dtype=wide, device=device)

        limit = max(1, LOGITS_BYTES // (v * dtype.itemsize))
        chunks = max(1, -(-n // limit))
        columns = -(-v // ALIGNED) * ALIGNED
        buffer = torch.empty((-(-n // chunks), columns), dtype=dtype, device=device)[:, :v]
        start = 0
        for rows_C in rows_N.tensor_split(chunks) if n else ():
            here = slice(start, start := start + len(rows_C))
            h_CK = hidden_TK.index_select(0, rows_C).to(dtype)
            logits_CV = buffer[: len(rows_C)]
            products = [(h_CK, weight_VK.T, 1.0)]
            if a is not None and b is not None:
                down_CR = h_CK @ a.T
                products.insert(0, (down_CR, b.T, scaling))
            add_up(logits_CV, bias, *products)
            losses_N[here] = cross_entropy_(
                logits_CV, labels_N[here], shape, any(wants), ignore_index
            )
            g_CV = logits_CV  # by now
            if dh_NK is not None:
                torch.mm(g_CV, weight_VK, out=dh_NK[here])
            if a is not None and b is not None and any((wants[0], *wants[3:])):
                up_CR = torch.empty_like(down_CR)
                wanted = wide if wants[4] else None
                found = up_and_gradient(g_CV, b, down_CR, 1.0, up_CR, wanted)
                if dh_NK is not None:
                    dh_NK[here].addmm_(up_CR, a, alpha=scaling)
                if wants[3]:
                    da_RK = _and(da_RK, product(up_CR.T, h_CK))
                if found is not None:
                    db_VR = _and(db_VR, found)
            if wants[1]:
                dw_VK = _and(dw_VK, product(g_CV.T, h_CK))
            if wants[2] and bias_V is not None:
                dbias_V = _and(dbias_V, g_CV.sum(dim=0, dtype=wide))
        sums = [
            torch.zeros(t.shape, dtype=wide, device=device)  # no row has a label
            if found is None and wanted and t is not None
            else found
            for found, t, wanted in zip(
                (dw_VK, dbias_V, da_RK, db_VR),
                (weight_VK, bias_V, a_RK, b_VR),
                wants[1:],
                strict=True,
            )
        ]
        ctx.tokens, ctx.scaling, ctx.limit = hidden_TK.shape[0], scaling, limit
        ctx.dtypes = [
            None if t is None else t.dtype for t in (hidden_TK, weight, bias_V, a_RK, b_VR)
        ]
        ctx.save_for_backward(rows_N, items, dh_NK, *sums)
        return losses_N.sum() / items

    # The gradients are numbers by now, no functions of the inputs.
    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_N, items, dh_NK, *sums = ctx.saved_tensors
        # Without labels nothing depends on anything, and 1 / items may be infinite.
        factor = torch.where(items == 0, 0.0, gradients[0] / items)
        dh_TK = None
        if dh_NK is not None:
            whole = (ctx.tokens, dh_NK.shape[1])
            make = dh_NK.new_empty if len(rows_N) == ctx.tokens else dh_NK.new_zeros
            dh_TK = make(whole, dtype=ctx.dtypes[0])
            for start in range(0, len(rows_N), ctx.limit):
                here = slice(start, start + ctx.limit)
                scaled_CK = dh_NK.new_empty(dh_NK[here].shape, dtype=dh_TK.dtype)
                # By a float32 factor: one rounded to 16 bits would be off by the same 0.2 % everywhere. A vector, since
                # the type of a number would not count.
                torch.mul(dh_NK[here], factor.view(1), out=scaled_CK)
                dh_TK.index_copy_(0, rows_N[here], scaled_CK)
        factors = (factor, factor, factor * ctx.scaling, factor * ctx.scaling)
        rest = [
            None if total is None else (total * times).to(dtype)
            for total, times, dtype in zip(sums, factors, ctx.dtypes[1:], strict=True)
        ]
        return dh_TK, *rest, *([None] * 8)
