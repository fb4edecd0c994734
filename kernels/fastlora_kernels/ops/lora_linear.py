"""Linear layers with LoRA adapters beside them, one or several on the same x.

    y_i = x W_i^T + b_i + S_i B_i^T + s_i beta_i,  S_i = s_i D_i(x) A_i^T
    dx = sum_i g_i W_i + D_i(U_i A_i),  U_i = s_i g_i B_i,  g_i = dL/dy_i
    dA_i = U_i^T D_i(x),  dB_i = g_i^T S_i,  dbeta_i = s_i sum_t g_i

LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1; D_i is dropout, if any (ops/dropout.py), and beta_i the bias of
B_i. The products of rank R are taken first, so that no (N, K) delta is formed; the A_i stand one below the other, so
that x is read once for all S_i and once for all dA_i, and dx is summed up in place. A 4-bit W_i is dequantized in each
direction; above a number of tokens s B A is folded into it, which makes y and dx a product each, and S is first
made in backward. There one read of each g_i gives U_i and dB_i, or one read of x, where it is wider, S and dA_i
(ops/skinny.py). An 8-bit W_i is bitsandbytes' own product forward.

Saved for backward: x once, A and B as they are, and, where there was no fold, S (tokens x ranks) and a seed for each
dropout. In a repetition whose backward comes at once, it may also be given the dequantized W_i (unneeded.py).
Shapes: T tokens, K inputs, N outputs, R rank, or the ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import frexp
from typing import Any, NamedTuple

import torch

from fastlora_kernels import attention
from fastlora_kernels.dense import kept_matrix
from fastlora_kernels.first_order import first_order
from fastlora_kernels.ops.cast import cast_into
from fastlora_kernels.ops.dequantize import Fold, dequantize
from fastlora_kernels.ops.dropout import draw_seeds, dropout
from fastlora_kernels.ops.eight_bit import EightBit
from fastlora_kernels.ops.four_bit import FourBit
from fastlora_kernels.ops.skinny import expand, in_one_pass, product, served, up_and_gradient
from fastlora_kernels.unneeded import recomputing

Weight = torch.Tensor | FourBit | EightBit
"""Frozen, (N, K): dense in any float dtype, a Params4bit or its FourBit, or a layer of 8-bit weights."""
Frozen = torch.Tensor | FourBit | EightBit
"""The same, made ready for one direction (see `frozen`)."""


class Projection(NamedTuple):
    """One linear layer and its adapter; see lora_linear for shapes and dtypes."""

    weight: Weight
    bias: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    lora_bias: torch.Tensor | None = None
    dropout: float = 0.0


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    lora_bias: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """x W^T + b + scaling (D(x) A^T B^T + lora_bias); gradients for x, A, B and lora_bias, none for W and b.

    x (..., K); weight (N, K) dense, or a Params4bit or 8-bit layer of that shape; bias (N); lora_a (R, K), lora_b
    (N, R) and lora_bias (N) in any float dtype, in which their gradients come back; dropout in [0, 1), drawn anew from
    torch's generator. Computed and returned, (..., N), in x's dtype.
    Raises ValueError: shapes that do not fit, or a 4-bit layout that FourBit.of does not know.
    """
    projection = Projection(weight, bias, lora_a, lora_b, scaling, lora_bias, dropout)
    return lora_linears(x, (projection,))[0]


def lora_linears(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """What lora_linear gives for each of `projections`, with one read of x for all of them.

    Raises ValueError: see lora_linear.
    """
    fixed, adapters = [], []
    for one in projections:
        weight = frozen(one.weight)
        fitting("lora_linear", x, weight, one.lora_a, one.lora_b)
        fixed.append((weight, one.bias, one.scaling, one.dropout))
        adapters += [one.lora_a, one.lora_b, one.lora_bias]
    ys: tuple[torch.Tensor, ...] = LoraLinears.apply(x, fixed, *adapters)
    return ys


def frozen(weight: Weight) -> Frozen:
    """Raises ValueError: a 4-bit layout that is not served."""
    if isinstance(weight, FourBit | EightBit):
        return weight
    quantized = FourBit.of(weight)
    if quantized is None and weight.dtype == torch.uint8:
        raise ValueError("a quantized weight of a layout that is not served")
    return weight if quantized is None else quantized


def source(weight: Frozen) -> Weight:
    """What `frozen` is made of again in backward: no tensor that may be moved or replaced until then. A FourBit of
    no source stays what it is."""
    if isinstance(weight, FourBit) and weight.source is not None:
        return weight.source  # type: ignore[no-any-return]
    return weight


def fitting(
    op: str, x: torch.Tensor, weight: Frozen, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> tuple[int, int]:
    """(N, K). Raises ValueError: shapes that do not fit."""
    n, k = weight.shape
    r = lora_a.shape[0]
    if x.shape[-1] != k or lora_a.shape != (r, k) or lora_b.shape != (n, r):
        raise ValueError(
            f"{op}: x {tuple(x.shape)}, weight {(n, k)}, lora_a {tuple(lora_a.shape)} and "
            f"lora_b {tuple(lora_b.shape)} do not fit; expected (..., K), (N, K), (R, K), (N, R)"
        )
    return n, k


def folds(tokens: int, n: int, k: int, rank: int) -> bool:
    """Whether to fold s B A into a dequantized W: reading and writing y and dx once more (T N + T K) then
    costs more than the rank-R products on W (N K). At 4096 x 4096 from 2,048 tokens on, at rank 64 from 3,277: on
    an H200 a layer of 4096 x 14336 with 4,096 tokens of rank 64 takes 1.066 times its floor without a fold, 1.118
    with one; one of 4096 x 4096 the same, and more memory."""
    return tokens * (n + k) >= n * k * max(1.0, rank / 40)


def dense(
    weight: Frozen,
    dtype: torch.dtype,
    fold: Fold | None = None,
    row_scale: torch.Tensor | None = None,
    cast: Fold | None = None,
) -> torch.Tensor:
    """The matrix (N, K); `fold` and `row_scale` (see dequantize) are for 4-bit weights alone. `cast`: the fold with A
    and B in `dtype`, if they are at hand; taken where they have fewer bytes and no bit changes."""
    if isinstance(weight, FourBit):
        kept_NK = kept_matrix(weight, dtype, fold) if row_scale is None else None
        if kept_NK is not None:
            return kept_NK
        if fold and cast and _rounds_alike(fold, dtype):
            fold = cast
        return dequantize(weight, dtype, fold, row_scale)
    assert fold is None
    assert row_scale is None
    return weight.dense(dtype) if isinstance(weight, EightBit) else weight.to(dtype)


def _rounds_alike(fold: Fold, dtype: torch.dtype) -> bool:
    """Whether A and B are wider than `dtype`, and scaling B is rounded to it alike before and after the scaling: by a
    power of two, but in float16, which has fewer bits for what is below 6e-5, as B is in the first steps."""
    a_RK, b_NR, scaling = fold
    wider = min(a_RK.element_size(), b_NR.element_size()) > dtype.itemsize
    return wider and dtype != torch.float16 and abs(frexp(scaling)[0]) == 0.5


def shaped(y_TN: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """(*lead, N). Not a view: autograd lets nobody write to a view that was made in a Function."""
    if len(lead) == 1:
        return y_TN
    y: torch.Tensor = torch.ops.aten._unsafe_view.default(y_TN, (*lead, y_TN.shape[1]))
    return y


class LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fixed: Any, *adapters: Any) -> tuple[torch.Tensor, ...]:
        x_TK = x.reshape(-1, x.shape[-1])
        given = attention.given(LoraLinears)
        if given is None:
            keep = recomputing.keeps_dequantized and ctx.needs_input_grad[0]
            ys, *made = outputs(ctx, x_TK, x.shape[:-1], fixed, adapters, keep)
            attention.taken(LoraLinears, ys)
        else:
            made = without_outputs(ctx, len(x_TK), lambda: x_TK, fixed, adapters)
            ys = list(given)
        ctx.save_for_backward(x, *made, *adapters)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    # x A^T is saved as a number, not as a function of x and A: a second derivative through it would be wrong.
    @staticmethod
    @first_order
    def backward(ctx: Any, *gs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, down_TR, seeds, *adapters = ctx.saved_tensors
        wants_x, _, *wants = ctx.needs_input_grad
        gradients = Gradients(ctx, x.dtype, adapters, gs, wants, down_TR, seeds)
        dx_TK = gradients.of_x() if wants_x else None
        found = gradients.of_adapters(x.reshape(-1, x.shape[-1]))
        return None if dx_TK is None else dx_TK.view(x.shape), None, *found


def outputs(
    ctx: Any,
    x_TK: torch.Tensor,
    lead: torch.Size,
    fixed: Any,
    adapters: Sequence[Any],
    keep: bool = False,
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """Every y_i, (*lead, N); S and the seeds, if made. `adapters`: A, B and its bias of each in turn. `keep`: what is
    made of 4-bit weights, for the gradient of x."""
    dtype = x_TK.dtype
    remember(ctx, x_TK.shape[0], fixed, adapters)
    down_TR = seeds = None
    low: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(fixed)
    if not ctx.fold:
        down_TR, seeds, bs = low_rank(ctx, x_TK, adapters)
        low = [*zip(strips(down_TR, ctx.ranks), bs, strict=True)]
    ys = []
    for i, (weight, bias_N, scaling, _) in enumerate(fixed):
        a_RK, b_NR, beta_N = adapters[3 * i : 3 * i + 3]
        bias_N = None if bias_N is None else bias_N.to(dtype)
        if beta_N is not None:
            beta_N = scaling * beta_N.to(dtype)
        fold = (a_RK, b_NR, scaling) if ctx.fold else None
        if isinstance(weight, FourBit):
            weight = dense(weight, dtype, fold)
            ctx.dequantized[i] = weight if keep else None
        ys.append(output(lead, x_TK, weight, bias_N, beta_N, low[i]))
        del weight  # before the next one is made
    return ys, down_TR, seeds


def without_outputs(
    ctx: Any,
    tokens: int,
    make_x_TK: Callable[[], torch.Tensor],
    fixed: Any,
    adapters: Sequence[Any],
) -> list[torch.Tensor | None]:
    """S and the seeds: what `outputs` makes besides the y_i. With a fold nothing is computed, x neither."""
    remember(ctx, tokens, fixed, adapters)
    if ctx.fold:
        return [None, None]
    down_TR, seeds, _ = low_rank(ctx, make_x_TK(), adapters)
    return [down_TR, seeds]


def remember(ctx: Any, tokens: int, fixed: Any, adapters: Sequence[Any]) -> None:
    """What backward must know that is no tensor."""
    ctx.ranks = [b_NR.shape[1] for b_NR in adapters[1::3]]
    ctx.weights, ctx.scalings, ctx.ps = [], [], []
    ctx.fold, n, k = True, 0, 0
    for weight, _, scaling, p in fixed:
        # The weight as it is, not its data: one that is streamed in is another tensor by backward.
        ctx.weights.append(source(weight))
        ctx.scalings.append(scaling)
        ctx.ps.append(p)
        outputs_each, k = weight.shape
        n += outputs_each
        ctx.fold = ctx.fold and not p and isinstance(weight, FourBit)
    ctx.fold = ctx.fold and folds(tokens, n, k, max(ctx.ranks))
    ctx.dequantized = [None] * len(fixed)  # the matrix (N, K) of each that `outputs` keeps


def strips(wide_TR: torch.Tensor, ranks: Sequence[int]) -> Sequence[torch.Tensor]:
    """The columns of each, (T, rank)."""
    return (wide_TR,) if len(ranks) == 1 else wide_TR.split_with_sizes(ranks, 1)


def low_rank(
    ctx: Any, x_TK: torch.Tensor, adapters: Sequence[Any]
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """S, the seeds, and each B in x's dtype."""
    a_RK, bs = in_one_dtype(adapters, x_TK.dtype)
    seeds = draw_seeds(ctx.ps, x_TK.device)
    return down(ctx, x_TK, a_RK, seeds), seeds, bs


def in_one_dtype(
    adapters: Sequence[Any], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Every A, one below the other, and each B, contiguous."""
    lower, upper = list(adapters[::3]), list(adapters[1::3])
    given = [*lower, *upper]
    if len(lower) == 1 and all(one.dtype == dtype and one.is_contiguous() for one in given):
        return lower[0], upper
    starts: list[int] = []
    end = rows = 0
    for one in lower:
        starts.append(end)
        end += one.numel()
        rows += one.shape[0]
    for one in upper:
        end = -(-end // 16) * 16  # what the fast kernels of products and of the cast ask for
        starts.append(end)
        end += one.numel()
    flat = given[0].new_empty(end, dtype=dtype)
    cast_into(flat, starts, given)
    k = lower[0].shape[1]
    # Where a slice and a view would be two calls.
    bs = [
        flat.as_strided(one.shape, (one.shape[1], 1), start)
        for start, one in zip(starts[len(lower) :], upper, strict=True)
    ]
    return flat.as_strided((rows, k), (k, 1)), bs


class Gradients:
    """Of one call of `outputs`. That of x is first, where both are wanted: x may be made anew from it (ops/glu.py).

    `dtype`: x's. `adapters`, `down_TR` and `seeds`: as they were given to `outputs` and came out of it; without S
    it is made again. `wants`: whether each of `adapters` is to have a gradient.
    """

    def __init__(
        self,
        ctx: Any,
        dtype: torch.dtype,
        adapters: Sequence[Any],
        gs: Sequence[torch.Tensor | None],
        wants: Sequence[bool],
        down_TR: torch.Tensor | None,
        seeds: torch.Tensor | None,
    ) -> None:
        self.ctx, self.dtype, self.adapters, self.wants = ctx, dtype, adapters, wants
        self.down_TR, self.seeds = down_TR, seeds
        self.up_TR: torch.Tensor | None = None
        self.a_RK, self.bs = in_one_dtype(adapters, dtype)
        self.gs = [None if g is None else g.reshape(-1, g.shape[-1]).contiguous() for g in gs]
        self.given = [g_TN for g_TN in self.gs if g_TN is not None]
        """None where nothing was made of an output."""
        self.found: list[torch.Tensor | None] = [None] * len(adapters)

    def of_x(self) -> torch.Tensor | None:
        """sum_i g_i W_i + D_i(U_i A_i), (T, K)."""
        ctx = self.ctx
        if not self.given:
            return None
        dx_TK = None
        if not ctx.fold:
            dx_TK = expanded(ctx, self._up(), self.a_RK, self.seeds)
        for i, g_TN in enumerate(self.gs):
            weight_NK = ctx.dequantized[i]
            ctx.dequantized[i] = None  # a second backward makes its own
            if g_TN is None:
                continue
            if weight_NK is None:
                fold = cast = None
                if ctx.fold:
                    fold = (*self.adapters[3 * i : 3 * i + 2], ctx.scalings[i])
                    a_RK = self.a_RK.split_with_sizes(ctx.ranks)[i]
                    cast = (a_RK, self.bs[i], ctx.scalings[i])
                weight_NK = dense(frozen(ctx.weights[i]), self.dtype, fold, cast=cast)
            dx_TK = torch.mm(g_TN, weight_NK) if dx_TK is None else dx_TK.addmm_(g_TN, weight_NK)
        return dx_TK

    def of_adapters(self, x_TK: torch.Tensor) -> list[torch.Tensor | None]:
        """dA_i = U_i^T D_i(x), dB_i and dbeta_i, where wanted, each in its own dtype."""
        ctx, found = self.ctx, self.found
        if not self.given:
            return found
        da_RK = None
        if self._reads_x_once(x_TK):
            up_TR = self._up()  # without dB, since S is not there: each g is read once more below
            self.down_TR = torch.empty_like(up_TR)
            da_RK = in_one_pass(
                x_TK, self.a_RK.T, up_TR, ctx.scalings[0], self.down_TR, torch.float32
            ).T
        elif self.down_TR is None and any(self.wants):
            self.down_TR = down(ctx, x_TK, self.a_RK, self.seeds)
        up_TR = self._up()
        if da_RK is None and self.seeds is None and any(self.wants[::3]):
            da_RK = product(up_TR.T, x_TK)  # for all, unless each has a dropout of its own
        end = 0
        for i, (g_TN, rank) in enumerate(zip(self.gs, ctx.ranks, strict=True)):
            block, end = slice(end, end + rank), end + rank
            if g_TN is None:
                continue
            wants_a, wants_b, wants_beta = self.wants[3 * i : 3 * i + 3]
            a_RK, b_NR, beta_N = self.adapters[3 * i : 3 * i + 3]
            if wants_a and da_RK is not None:
                da_i_RK = da_RK if len(ctx.ranks) == 1 else da_RK[block]
                found[3 * i] = in_dtype(da_i_RK, a_RK.dtype)
            elif wants_a:
                dropped_TK = dropout(x_TK, ctx.ps[i], self.seeds[i])  # type: ignore[index]
                found[3 * i] = in_dtype(product(up_TR[:, block].T, dropped_TK), a_RK.dtype)
            if wants_b and found[3 * i + 1] is None:
                assert self.down_TR is not None
                found[3 * i + 1] = in_dtype(product(g_TN.T, self.down_TR[:, block]), b_NR.dtype)
            if wants_beta:
                dbeta_N = ctx.scalings[i] * g_TN.sum(
                    dim=0, dtype=torch.promote_types(g_TN.dtype, torch.float32)
                )
                found[3 * i + 2] = dbeta_N.to(beta_N.dtype)
        return found

    def _reads_x_once(self, x_TK: torch.Tensor) -> bool:
        """Whether S and dA come of one read of x, as it is the wider one in front of down_proj. Else U and dB come of
        one of each g: not both, since dB takes S and dA takes U."""
        if self.down_TR is not None or self.seeds is not None or not any(self.wants[::3]):
            return False
        if len(set(self.ctx.scalings)) > 1 or x_TK.shape[1] <= sum(g.shape[1] for g in self.given):
            return False
        return served(x_TK, self.a_RK.shape[0])

    def _up(self) -> torch.Tensor:
        """U, (T, R); and each dB with it, of the same read of g, if S is there by then."""
        if self.up_TR is not None:
            return self.up_TR
        ctx = self.ctx
        self.up_TR = self.a_RK.new_empty(self.given[0].shape[0], self.a_RK.shape[0])
        ups = strips(self.up_TR, ctx.ranks)
        downs = None if self.down_TR is None else strips(self.down_TR, ctx.ranks)
        for i, (g_TN, b_NR, up_TR) in enumerate(zip(self.gs, self.bs, ups, strict=True)):
            if g_TN is None:
                up_TR.zero_()
                continue
            down_TR = None if downs is None else downs[i]
            db_dtype = self.adapters[3 * i + 1].dtype if self.wants[3 * i + 1] else None
            self.found[3 * i + 1] = up_and_gradient(
                g_TN, b_NR, down_TR, ctx.scalings[i], up_TR, db_dtype
            )
        return self.up_TR


def down(
    ctx: Any, x_TK: torch.Tensor, a_RK: torch.Tensor, seeds: torch.Tensor | None
) -> torch.Tensor:
    """S_i = s_i D_i(x) A_i^T side by side, (T, R): one product for all, where they have one scaling and no dropout."""
    if seeds is None and len(set(ctx.scalings)) == 1:
        return scaled_product(x_TK, a_RK.T, ctx.scalings[0])
    down_TR = x_TK.new_empty(x_TK.shape[0], a_RK.shape[0])
    downs, each = strips(down_TR, ctx.ranks), a_RK.split_with_sizes(ctx.ranks)
    for i, (p, scaling) in enumerate(zip(ctx.ps, ctx.scalings, strict=True)):
        dropped_TK = x_TK if seeds is None else dropout(x_TK, p, seeds[i])
        downs[i].addmm_(dropped_TK, each[i].T, beta=0, alpha=scaling)
    return down_TR


def expanded(
    ctx: Any, up_TR: torch.Tensor, a_RK: torch.Tensor, seeds: torch.Tensor | None
) -> torch.Tensor:
    """sum_i D_i(U_i A_i), (T, K): likewise."""
    if seeds is None:
        dx_TK = up_TR.new_empty(up_TR.shape[0], a_RK.shape[1])
        expand(dx_TK, up_TR, a_RK.T, 1.0)
        return dx_TK
    ups, each = strips(up_TR, ctx.ranks), a_RK.split_with_sizes(ctx.ranks)
    first, *others = (dropout(torch.mm(ups[i], each[i]), p, seeds[i]) for i, p in enumerate(ctx.ps))
    for other in others:
        first += other
    return first


def output(
    lead: torch.Size,
    x_TK: torch.Tensor,
    weight: torch.Tensor | EightBit,
    bias_N: torch.Tensor | None,
    beta_N: torch.Tensor | None,
    low: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """y, (*lead, N), with `low`, S (T, R) and B, unless they are folded into the weight; beta_N is scaled already."""
    if isinstance(weight, EightBit):
        assert low is not None
        y_TN = weight.linear(x_TK)  # with its bias
        y_TN.addmm_(low[0], low[1].T)
        return shaped(y_TN if beta_N is None else y_TN.add_(beta_N), lead)
    if beta_N is not None:
        bias_N = beta_N if bias_N is None else bias_N + beta_N
    weight_KN = in_dtype(weight, x_TK.dtype).T
    y = x_TK.new_empty(*lead, weight_KN.shape[1])
    y_TN = y.view(-1, weight_KN.shape[1])
    adapters = [] if low is None else [(low[0], low[1].T, 1.0)]
    add_up(y_TN, bias_N, *adapters, (x_TK, weight_KN, 1.0))
    return y


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`to` takes some microseconds to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def add_up(
    out: torch.Tensor,
    bias: torch.Tensor | None,
    *products: tuple[torch.Tensor, torch.Tensor, float],
) -> None:
    """out = bias + the sum of scaling left right. S B^T first: the large product adds to it as it writes. Afterwards it
    would read and write `out` once more."""
    (left, right, scaling), *others = products
    expand(out, left, right.T, scaling, bias)
    for left, right, scaling in others:
        out.addmm_(left, right, alpha=scaling)


def scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    if scaling == 1:
        return torch.mm(left, right)
    # With beta=0 what is there is not read, NaN neither.
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=scaling)
