"""Our ops as ops of torch's own, for a model that torch.compile traces.

A compiler that traced the autograd.Functions would find the same dequantized W in forward and backward, and save it: a
whole layer in 16 bits. Here it sees one op each way, and backward's takes the gradient that arrives, so that nothing
dense can be made before. What runs inside are the functions that the autograd.Functions run; saved is what was given,
and S is made again in backward.

Each has three ops. What a model calls, as `lora_linear`, is an autograd.Function and disappears as a compiler looks into
it; what a graph then calls are NAME_forward and NAME_backward, which know nothing of autograd. torch.library.custom_op
would put four functions of Python around each of these calls, some 15 us (benchmarks/host.py).

A frozen weight is passed as its tensors and a layout of numbers (see `taken_apart`). Not served: dropout and 8-bit
weights. A second derivative raises RuntimeError: backward's ops have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastlora_kernels.ops import dora_linear as dora
from fastlora_kernels.ops import glu as gated
from fastlora_kernels.ops import lora_linear as lora
from fastlora_kernels.ops.eight_bit import EightBit
from fastlora_kernels.ops.four_bit import FourBit

Tensors = list[torch.Tensor]
OPS = torch.ops.fastlora
LIBRARY = torch.library.Library("fastlora", "FRAGMENT")
FROZEN = "Tensor[] frozen, int[] layout, Tensor? bias"


def serves(projection: lora.Projection) -> bool:
    """Whether there is an op here for it."""
    return not projection.dropout and not isinstance(projection.weight, EightBit)


def lora_linear(x: torch.Tensor, projection: lora.Projection) -> torch.Tensor:
    """See ops/lora_linear.py."""
    return lora_linears(x, (projection,))[0]


def lora_linears(x: torch.Tensor, projections: Sequence[lora.Projection]) -> Tensors:
    """See ops/lora_linear.py."""
    tensors: Tensors = []
    layouts: list[int] = []
    for weight, bias, a, b, _, beta, _ in projections:
        lora.fitting("lora_linear", x, lora.frozen(weight), a, b)
        frozen, layout = taken_apart(weight)
        tensors += frozen
        layouts += [bias is not None, beta is not None, len(frozen), len(layout), *layout]
    return OPS.lora_linears(  # type: ignore[no-any-return]
        x, tensors, layouts,
        [one.bias for one in projections if one.bias is not None],
        [matrix for one in projections for matrix in (one.lora_a, one.lora_b)],
        [one.lora_bias for one in projections if one.lora_bias is not None],
        [float(one.scaling) for one in projections],
    )  # fmt: skip


def dora_linear(
    x: torch.Tensor,
    weight: lora.Weight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """See ops/dora_linear.py."""
    lora.fitting("dora_linear", x, lora.frozen(weight), lora_a, lora_b)
    y, *_ = OPS.dora_linear(x, *taken_apart(weight), bias, lora_a, lora_b, magnitude, scaling)
    return y  # type: ignore[no-any-return]


def glu(gate: torch.Tensor, up: torch.Tensor | None, activation: gated.Activation) -> torch.Tensor:
    """See ops/glu.py."""
    gated.both_fit("glu", gate, up)
    return OPS.glu(gate, up, activation)  # type: ignore[no-any-return]


def glu_lora_linear(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: gated.Activation,
    projection: lora.Projection,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ops/glu.py."""
    gated.both_fit("glu_lora_linear", gate, up)
    weight, bias, a, b, scaling, beta, _ = projection
    return OPS.glu_lora_linear(  # type: ignore[no-any-return]
        gate, up, activation, dtype, *taken_apart(weight), bias, a, b, beta, scaling
    )


def taken_apart(weight: lora.Weight) -> tuple[Tensors, list[int]]:
    """Tensors and numbers, of which `put_together` makes the weight again; of a dense one, itself and its shape."""
    ready = lora.frozen(weight)
    if not isinstance(ready, FourBit):
        assert isinstance(ready, torch.Tensor)
        return [ready], [*ready.shape]
    tensors = [ready.codes, ready.absmax, ready.table]
    for nested in (ready.nested_absmax, ready.nested_table, ready.offset):
        if nested is not None:
            tensors.append(nested)
    return tensors, [*ready.shape, ready.blocksize, ready.nested_blocksize]


def put_together(tensors: Tensors, layout: Sequence[int]) -> FourBit | torch.Tensor:
    if len(layout) == 2:
        return tensors[0]
    codes, absmax, table, *nested = tensors
    n, k, blocksize, nested_blocksize = layout
    given = (None, codes, absmax, table, (n, k), blocksize)
    if not nested:
        return FourBit(*given)
    nested_absmax, nested_table, offset = nested
    return FourBit(*given, nested_absmax, nested_table, nested_blocksize, offset)


def _register(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any] | None = None
) -> None:
    """fastlora::`name`. With a fake it is an op that graphs have; else `run` calls such ops, and they have those."""
    LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    if fake is None:
        LIBRARY.impl(name, run, "CompositeImplicitAutograd")
        return
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=LIBRARY)


def _wanted(found: Sequence[torch.Tensor | None], wants: Sequence[bool]) -> Tensors:
    """An op returns no None."""
    return [one for one, wanted in zip(found, wants, strict=True) if wanted and one is not None]


def _fake_gradients(of: Sequence[torch.Tensor | None], wants: Sequence[bool]) -> Tensors:
    return [one.new_empty(one.shape) for one in _wanted(of, wants)]


def _placed(gradients: Tensors, wants: Sequence[bool]) -> list[torch.Tensor | None]:
    found = iter(gradients)
    return [next(found) if wanted else None for wanted in wants]


# lora_linears: a list of tensors cannot hold None, so that biases and betas are those that are there


@cache
def _read(layouts: tuple[int, ...]) -> list[tuple[int, int, slice, tuple[int, ...]]]:
    """Of each projection: whether it has a bias and a beta, which tensors its weight is, and their layout."""
    found, first, rest = [], 0, layouts
    while rest:
        has_bias, has_beta, count, size, *_ = rest
        found.append((has_bias, has_beta, slice(first, first + count), rest[4 : 4 + size]))
        first, rest = first + count, rest[4 + size :]
    return found


def _fixed(
    frozen: Tensors, layouts: Sequence[int], scalings: Sequence[float], biases: Tensors
) -> list[Any]:
    """As ops/lora_linear.py has it; backward gives no biases."""
    there = iter(biases)
    return [
        (put_together(frozen[place], layout), next(there, None) if has_bias else None, scaling, 0.0)
        for (has_bias, _, place, layout), scaling in zip(
            _read(tuple(layouts)), scalings, strict=True
        )
    ]


def _threes(layouts: Sequence[int], matrices: Sequence[Any], betas: Sequence[Any]) -> list[Any]:
    """A, B and its bias of each in turn, as ops/lora_linear.py takes them."""
    ab, there = iter(matrices), iter(betas)
    found: list[Any] = []
    for _, has_beta, *_ in _read(tuple(layouts)):
        found += (next(ab), next(ab), next(there) if has_beta else None)
    return found


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layouts: Any, scalings: Any, counts: Any, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        frozen, biases, matrices, betas = _split(tensors, counts)
        ctx.save_for_backward(x, *frozen, *matrices, *betas)
        ctx.layouts, ctx.scalings, ctx.counts = layouts, scalings, counts
        return tuple(
            OPS.lora_linears_forward(x, frozen, layouts, biases, matrices, betas, scalings)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        wants_x, _, _, _, *wanted = ctx.needs_input_grad
        n_frozen, n_biases, n_matrices = ctx.counts
        frozen, _, matrices, betas = _split(tensors, (n_frozen, 0, n_matrices))
        _, _, *wants_each = _split(wanted, ctx.counts)
        threes = _threes(ctx.layouts, *wants_each)
        wants = [wants_x, *map(bool, threes)]  # None: there is no beta
        found = OPS.lora_linears_backward(
            list(gs), x, frozen, ctx.layouts, matrices, betas, ctx.scalings, wants
        )
        dx, *gradients = _placed(found, wants)
        of_matrices = [one for place, one in enumerate(gradients) if place % 3 < 2]
        of_betas = [gradients[n] for n in range(2, len(threes), 3) if threes[n] is not None]
        return dx, None, None, None, *[None] * (n_frozen + n_biases), *of_matrices, *of_betas


def _split(rest: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """What there is of each kind; of the last kind, all that is left."""
    ends = [0, *accumulate(counts), len(rest)]
    return [list(rest[first:end]) for first, end in pairwise(ends)]


def _lora(x, frozen, layouts, biases, matrices, betas, scalings):
    counts = len(frozen), len(biases), len(matrices)
    tensors = *frozen, *biases, *matrices, *betas
    return list(_LoraLinears.apply(x, layouts, scalings, counts, *tensors))


def _lora_forward(x, frozen, layouts, biases, matrices, betas, scalings):
    fixed, adapters = _fixed(frozen, layouts, scalings, biases), _threes(layouts, matrices, betas)
    x_TK = x.reshape(-1, x.shape[-1])
    return lora.outputs(SimpleNamespace(), x_TK, x.shape[:-1], fixed, adapters)[0]


def _lora_fake(x, frozen, layouts, biases, matrices, betas, scalings):
    return [x.new_empty(*x.shape[:-1], b.shape[0]) for b in matrices[1::2]]


def _lora_backward(gs, x, frozen, layouts, matrices, betas, scalings, wants):
    x_TK, adapters = x.reshape(-1, x.shape[-1]), _threes(layouts, matrices, betas)
    ctx = SimpleNamespace()
    lora.remember(ctx, x_TK.shape[0], _fixed(frozen, layouts, scalings, []), adapters)
    gradients = lora.Gradients(ctx, x.dtype, adapters, gs, wants[1:], None, None)
    dx_TK = gradients.of_x() if wants[0] else None
    found = gradients.of_adapters(x_TK)
    if len(gs) > 1:  # every dA is a part of one product, and an op's outputs share no memory
        found[::3] = [None if da is None else da.clone() for da in found[::3]]
    return _wanted([None if dx_TK is None else dx_TK.view(x.shape), *found], wants)


def _lora_backward_fake(gs, x, frozen, layouts, matrices, betas, scalings, wants):
    return _fake_gradients([x, *_threes(layouts, matrices, betas)], wants)


LORA = (
    "(Tensor x, Tensor[] frozen, int[] layouts, Tensor[] biases, Tensor[] matrices, Tensor[] betas, "
    "float[] scalings) -> Tensor[]"
)
_register("lora_linears", LORA, _lora)
_register("lora_linears_forward", LORA, _lora_forward, _lora_fake)
_register(
    "lora_linears_backward",
    "(Tensor[] gs, Tensor x, Tensor[] frozen, int[] layouts, Tensor[] matrices, Tensor[] betas, float[] scalings, "
    "bool[] wants) -> Tensor[]",
    _lora_backward, _lora_backward_fake,
)  # fmt: skip


# dora_linear


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layout: Any, bias: Any, a: Any, b: Any, magnitude: Any,
        scaling: float, *frozen: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        y, *made = OPS.dora_linear_forward(x, frozen, layout, bias, a, b, magnitude, scaling)
        ctx.save_for_backward(x, bias, a, b, magnitude, *made, *frozen)
        ctx.layout, ctx.scaling = layout, scaling
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        return y, *made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, bias, a, b, magnitude, kept_TN, c_N, norm_N, *frozen = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, wants_m, *_ = ctx.needs_input_grad
        wants = [wants_x, wants_a, wants_b, wants_m]
        dx = da = db = dm = None
        if g is not None:
            found = OPS.dora_linear_backward(
                g, x, frozen, ctx.layout, bias, a, b, magnitude, kept_TN, c_N, norm_N, ctx.scaling, wants,
            )  # fmt: skip
            dx, da, db, dm = _placed(found, wants)
        return dx, None, None, da, db, dm, None, *[None] * len(frozen)


def _dora(x, frozen, layout, bias, a, b, magnitude, scaling):
    return _DoraLinear.apply(x, layout, bias, a, b, magnitude, scaling, *frozen)


def _dora_forward(x, frozen, layout, bias, a, b, magnitude, scaling):
    weight = put_together(frozen, layout)
    y, _, *made = dora.output(x, weight, bias, scaling, a, b, magnitude)
    return y, *made


def _dora_fake(x, frozen, layout, bias, a, b, magnitude, scaling):
    lead, n = x.shape[:-1], b.shape[0]
    norm_N = x.new_empty(n, dtype=torch.float32)
    c_N = x.new_empty(n, dtype=torch.promote_types(magnitude.dtype, torch.float32))
    return x.new_empty(*lead, n), x.new_empty(math.prod(lead), n), c_N, norm_N


def _dora_backward(
    g, x, frozen, layout, bias, a, b, magnitude, kept_TN, c_N, norm_N, scaling, wants
):
    saved = (x, bias, a, b, magnitude, None, kept_TN, c_N, norm_N)
    return _wanted(
        dora.gradients_of(g, wants, (put_together(frozen, layout), scaling), saved), wants
    )


def _dora_backward_fake(
    g, x, frozen, layout, bias, a, b, magnitude, kept_TN, c_N, norm_N, scaling, wants
):
    return _fake_gradients((x, a, b, magnitude), wants)


DORA = (
    f"(Tensor x, {FROZEN}, Tensor a, Tensor b, Tensor magnitude, float scaling) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_register("dora_linear", DORA, _dora)
_register("dora_linear_forward", DORA, _dora_forward, _dora_fake)
_register(
    "dora_linear_backward",
    f"(Tensor g, Tensor x, {FROZEN}, Tensor a, Tensor b, Tensor magnitude, "
    "Tensor kept, Tensor c, Tensor norm, float scaling, bool[] wants) -> Tensor[]",
    _dora_backward, _dora_backward_fake,
)  # fmt: skip


# glu


def _width(gate: torch.Tensor, up: torch.Tensor | None) -> int:
    return gate.shape[-1] // (2 if up is None else 1)


def _glu_fake(gate, up, activation):
    return gate.new_empty(*gate.shape[:-1], _width(gate, up))


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, activation: gated.Activation
    ) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return OPS.glu_forward(gate, up, activation)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        found = OPS.glu_backward(dh, gate, up, ctx.activation)
        return found[0], None if up is None else found[1], None


def _glu_backward(dh, gate, up, activation):
    return [one for one in gated.gradients_of(dh, gate, up, activation) if one is not None]


def _glu_backward_fake(dh, gate, up, activation):
    return [one.new_empty(one.shape) for one in (gate, up) if one is not None]


GLU = "(Tensor gate, Tensor? up, str activation) -> Tensor"
_register("glu", GLU, _Glu.apply)
_register("glu_forward", GLU, gated.output, _glu_fake)
_register(
    "glu_backward", "(Tensor dh, Tensor gate, Tensor? up, str activation) -> Tensor[]",
    _glu_backward, _glu_backward_fake,
)  # fmt: skip


# glu_lora_linear


class _GluLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, activation: gated.Activation, dtype: torch.dtype,
        layout: Any, bias: Any, a: Any, b: Any, beta: Any, scaling: float, *frozen: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(gate, up, a, b, beta, *frozen)
        ctx.activation, ctx.dtype, ctx.layout, ctx.scaling = activation, dtype, layout, scaling
        return OPS.glu_lora_linear_forward(  # type: ignore[no-any-return]
            gate, up, activation, dtype, frozen, layout, bias, a, b, beta, scaling
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, a, b, beta, *frozen = ctx.saved_tensors
        wants_gate, wants_up, _, _, _, _, wants_a, wants_b, wants_beta, *_ = ctx.needs_input_grad
        wants_h = wants_gate or wants_up
        wants = [wants_h, wants_h and up is not None, wants_a, wants_b, wants_beta]
        found = OPS.glu_lora_linear_backward(
            g,
            gate,
            up,
            ctx.activation,
            ctx.dtype,
            frozen,
            ctx.layout,
            a,
            b,
            beta,
            ctx.scaling,
            wants,
        )
        dgate, dup, da, db, dbeta = _placed(found, wants)
        return dgate, dup, None, None, None, None, da, db, dbeta, None, *[None] * len(frozen)


def _glu_lora(gate, up, activation, dtype, frozen, layout, bias, a, b, beta, scaling):
    return _GluLoraLinear.apply(
        gate, up, activation, dtype, layout, bias, a, b, beta, scaling, *frozen
    )


def _glu_lora_forward(gate, up, activation, dtype, frozen, layout, bias, a, b, beta, scaling):
    fixed = ((put_together(frozen, layout), bias, scaling, 0.0),)
    ctx = SimpleNamespace(activation=activation, dtype=dtype)
    return gated.lora_output(ctx, gate, up, fixed, (a, b, beta))[0]


def _glu_lora_fake(gate, up, activation, dtype, frozen, layout, bias, a, b, beta, scaling):
    return gate.new_empty(*gate.shape[:-1], b.shape[0], dtype=dtype)


def _glu_lora_backward(g, gate, up, activation, dtype, frozen, layout, a, b, beta, scaling, wants):
    fixed, adapters = ((put_together(frozen, layout), None, scaling, 0.0),), (a, b, beta)
    ctx = SimpleNamespace(activation=activation, dtype=dtype, spent=False)
    lora.remember(ctx, math.prod(gate.shape[:-1]), fixed, adapters)
    made_and_adapters = (None, None, *adapters)
    found = gated.lora_gradients(ctx, made_and_adapters, gate, up, (g,), wants[0], wants[2:])
    return _wanted(found, wants)


def _glu_lora_backward_fake(
    g, gate, up, activation, dtype, frozen, layout, a, b, beta, scaling, wants
):
    return _fake_gradients((gate, up, a, b, beta), wants)


GLU_LORA = (
    f"(Tensor gate, Tensor? up, str activation, ScalarType dtype, {FROZEN}, Tensor a, Tensor b, Tensor? beta, "
    "float scaling) -> Tensor"
)
_register("glu_lora_linear", GLU_LORA, _glu_lora)
_register("glu_lora_linear_forward", GLU_LORA, _glu_lora_forward, _glu_lora_fake)
_register(
    "glu_lora_linear_backward",
    "(Tensor g, Tensor gate, Tensor? up, str activation, ScalarType dtype, Tensor[] frozen, int[] layout, Tensor a, "
    "Tensor b, Tensor? beta, float scaling, bool[] wants) -> Tensor[]",
    _glu_lora_backward, _glu_lora_backward_fake,
)  # fmt: skip
