"""Our ops as ops of torch's own, for a model that torch.compile traces.

A compiler that traced the autograd.Functions would find the same dequantized W in forward and backward, and save it: a
whole layer in 16 bits. Here it sees one op each way, and backward's takes the gradient that arrives, so that nothing
dense can be made before. What runs inside are the functions that the autograd.Functions run; saved is what was given,
and S is made again in backward. In eager those are faster: an op of this kind takes longer to call.

A frozen weight is passed as its tensors and a layout of numbers (see `taken_apart`). Not served: dropout and 8-bit
weights. A second derivative raises RuntimeError: backward's ops have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fastlora_kernels.ops import dora_linear as dora
from fastlora_kernels.ops import glu as gated
from fastlora_kernels.ops import lora_linear as lora
from fastlora_kernels.ops.eight_bit import EightBit
from fastlora_kernels.ops.four_bit import FourBit

Tensors = list[torch.Tensor]
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
    return torch.ops.fastlora.lora_linears(  # type: ignore[no-any-return]
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
    y, *_ = torch.ops.fastlora.dora_linear(
        x, *taken_apart(weight), bias, lora_a, lora_b, magnitude, scaling
    )
    return y  # type: ignore[no-any-return]


def glu(gate: torch.Tensor, up: torch.Tensor | None, activation: gated.Activation) -> torch.Tensor:
    """See ops/glu.py."""
    gated.both_fit("glu", gate, up)
    return torch.ops.fastlora.glu(gate, up, activation)  # type: ignore[no-any-return]


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
    return torch.ops.fastlora.glu_lora_linear(  # type: ignore[no-any-return]
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
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    op = torch.library.custom_op(f"fastlora::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)


def _wanted(found: Sequence[torch.Tensor | None], wants: Sequence[bool]) -> Tensors:
    """An op returns no None."""
    return [one for one, wanted in zip(found, wants, strict=True) if wanted and one is not None]


def _fake_gradients(of: Sequence[torch.Tensor | None], wants: Sequence[bool]) -> Tensors:
    return [one.new_empty(one.shape) for one in _wanted(of, wants)]


def _placed(gradients: Tensors, wants: Sequence[bool]) -> list[torch.Tensor | None]:
    found = iter(gradients)
    return [next(found) if wanted else None for wanted in wants]


def _remembered(
    tokens: int, weights: Sequence[Any], adapters: Any, scalings: Sequence[float]
) -> Any:
    """ctx as ops/lora_linear.py has it in backward."""
    ctx = SimpleNamespace()
    fixed = [(weight, None, s, 0.0) for weight, s in zip(weights, scalings, strict=True)]
    lora.remember(ctx, tokens, fixed, adapters)
    return ctx


# lora_linears: a list of tensors cannot hold None, so that biases and betas are those that are there


def _weights(tensors: Tensors, layouts: Sequence[int]) -> list[FourBit | torch.Tensor]:
    found, rest = [], list(tensors)
    for _, _, count, layout in _each(layouts):
        found.append(put_together(rest[:count], layout))
        rest = rest[count:]
    return found


def _each(layouts: Sequence[int]) -> Iterator[tuple[int, int, int, list[int]]]:
    """Of each projection: whether it has a bias and a beta, how many tensors its weight is, and their layout."""
    rest = list(layouts)
    while rest:
        has_bias, has_beta, count, size, *rest = rest
        yield has_bias, has_beta, count, rest[:size]
        rest = rest[size:]


def _threes(layouts: Sequence[int], matrices: Sequence[Any], betas: Sequence[Any]) -> list[Any]:
    """A, B and its bias of each in turn, as ops/lora_linear.py takes them."""
    there = iter(betas)
    found: list[Any] = []
    for n, (_, has_beta, *_) in enumerate(_each(layouts)):
        found += [*matrices[2 * n : 2 * n + 2], next(there) if has_beta else None]
    return found


def _lora(x, frozen, layouts, biases, matrices, betas, scalings):
    there = iter(biases)
    fixed = [
        (weight, next(there) if has_bias else None, scaling, 0.0)
        for weight, scaling, (has_bias, *_) in zip(
            _weights(frozen, layouts), scalings, _each(layouts), strict=True
        )
    ]
    x_TK, adapters = x.reshape(-1, x.shape[-1]), _threes(layouts, matrices, betas)
    ys, *_ = lora.outputs(SimpleNamespace(), x_TK, x.shape[:-1], fixed, adapters)
    return ys


def _lora_fake(x, frozen, layouts, biases, matrices, betas, scalings):
    return [x.new_empty(*x.shape[:-1], b.shape[0]) for b in matrices[1::2]]


def _lora_saved(ctx: Any, inputs: Any, output: Any) -> None:
    x, frozen, ctx.layouts, biases, matrices, betas, ctx.scalings = inputs
    ctx.save_for_backward(x, *frozen, *matrices, *betas)
    ctx.counts = len(frozen), len(biases), len(matrices)


def _lora_gradients(ctx: Any, gs: Tensors) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    n_frozen, n_biases, n_matrices = ctx.counts
    frozen, rest = rest[:n_frozen], rest[n_frozen:]
    matrices, betas = rest[:n_matrices], rest[n_matrices:]
    wants_x, _, _, _, wants_matrices, wants_betas, _ = ctx.needs_input_grad
    threes = _threes(ctx.layouts, wants_matrices, wants_betas)
    wants = [wants_x, *map(bool, threes)]  # None: there is no beta
    found = torch.ops.fastlora.lora_linears_backward(
        gs, x, frozen, ctx.layouts, matrices, betas, ctx.scalings, wants
    )
    dx, *gradients = _placed(found, wants)
    of_matrices = [one for place, one in enumerate(gradients) if place % 3 < 2]
    of_betas = [gradients[n] for n in range(2, len(threes), 3) if threes[n] is not None]
    return dx, [None] * n_frozen, None, [None] * n_biases, of_matrices, of_betas, None


def _lora_backward(gs, x, frozen, layouts, matrices, betas, scalings, wants):
    x_TK, adapters = x.reshape(-1, x.shape[-1]), _threes(layouts, matrices, betas)
    ctx = _remembered(x_TK.shape[0], _weights(frozen, layouts), adapters, scalings)
    gradients = lora.Gradients(ctx, x.dtype, adapters, gs, wants[1:], None, None)
    dx_TK = gradients.of_x() if wants[0] else None
    found = gradients.of_adapters(x_TK)
    if len(gs) > 1:  # every dA is a part of one product, and an op's outputs share no memory
        found[::3] = [None if da is None else da.clone() for da in found[::3]]
    return _wanted([None if dx_TK is None else dx_TK.view(x.shape), *found], wants)


def _lora_backward_fake(gs, x, frozen, layouts, matrices, betas, scalings, wants):
    return _fake_gradients([x, *_threes(layouts, matrices, betas)], wants)


_register(
    "lora_linears",
    "(Tensor x, Tensor[] frozen, int[] layouts, Tensor[] biases, Tensor[] matrices, Tensor[] betas, "
    "float[] scalings) -> Tensor[]",
    _lora, _lora_fake, _lora_saved, _lora_gradients,
)  # fmt: skip
_register(
    "lora_linears_backward",
    "(Tensor[] gs, Tensor x, Tensor[] frozen, int[] layouts, Tensor[] matrices, Tensor[] betas, float[] scalings, "
    "bool[] wants) -> Tensor[]",
    _lora_backward, _lora_backward_fake,
)  # fmt: skip


# dora_linear


def _dora(x, frozen, layout, bias, a, b, magnitude, scaling):
    weight = put_together(frozen, layout)
    y, _, *made = dora.output(x, weight, bias, scaling, a, b, magnitude)
    return y, *made


def _dora_fake(x, frozen, layout, bias, a, b, magnitude, scaling):
    lead, n = x.shape[:-1], b.shape[0]
    norm_N = x.new_empty(n, dtype=torch.float32)
    c_N = x.new_empty(n, dtype=torch.promote_types(magnitude.dtype, torch.float32))
    return x.new_empty(*lead, n), x.new_empty(math.prod(lead), n), c_N, norm_N


def _dora_saved(ctx: Any, inputs: Any, output: Any) -> None:
    x, frozen, ctx.layout, bias, a, b, magnitude, ctx.scaling = inputs
    ctx.save_for_backward(x, bias, a, b, magnitude, *output[1:], *frozen)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _dora_gradients(ctx: Any, g: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, bias, a, b, magnitude, kept_TN, c_N, norm_N, *frozen = ctx.saved_tensors
    wants_x, *_, wants_a, wants_b, wants_m, _ = ctx.needs_input_grad
    wants = [wants_x, wants_a, wants_b, wants_m]
    dx = da = db = dm = None
    if g is not None:
        found = torch.ops.fastlora.dora_linear_backward(
            g, x, frozen, ctx.layout, bias, a, b, magnitude, kept_TN, c_N, norm_N, ctx.scaling, wants,
        )  # fmt: skip
        dx, da, db, dm = _placed(found, wants)
    return dx, [None] * len(frozen), None, None, da, db, dm, None


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


_register(
    "dora_linear",
    f"(Tensor x, {FROZEN}, Tensor a, Tensor b, Tensor magnitude, float scaling) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _dora, _dora_fake, _dora_saved, _dora_gradients,
)  # fmt: skip
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


def _glu_saved(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _glu_gradients(ctx: Any, dh: torch.Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    found = torch.ops.fastlora.glu_backward(dh, gate, up, ctx.activation)
    return found[0], None if up is None else found[1], None


def _glu_backward(dh, gate, up, activation):
    return [one for one in gated.gradients_of(dh, gate, up, activation) if one is not None]


def _glu_backward_fake(dh, gate, up, activation):
    return [one.new_empty(one.shape) for one in (gate, up) if one is not None]


_register(
    "glu", "(Tensor gate, Tensor? up, str activation) -> Tensor",
    gated.output, _glu_fake, _glu_saved, _glu_gradients,
)  # fmt: skip
_register(
    "glu_backward", "(Tensor dh, Tensor gate, Tensor? up, str activation) -> Tensor[]",
    _glu_backward, _glu_backward_fake,
)  # fmt: skip


# glu_lora_linear


def _glu_lora(gate, up, activation, dtype, frozen, layout, bias, a, b, beta, scaling):
    fixed = ((put_together(frozen, layout), bias, scaling, 0.0),)
    ctx = SimpleNamespace(activation=activation, dtype=dtype)
    y, *_ = gated.lora_output(ctx, gate, up, fixed, (a, b, beta))
    return y


def _glu_lora_fake(gate, up, activation, dtype, frozen, layout, bias, a, b, beta, scaling):
    return gate.new_empty(*gate.shape[:-1], b.shape[0], dtype=dtype)


def _glu_lora_saved(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.activation, ctx.dtype, frozen, ctx.layout, _, a, b, beta, ctx.scaling = inputs
    ctx.save_for_backward(gate, up, a, b, beta, *frozen)


def _glu_lora_gradients(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
    gate, up, a, b, beta, *frozen = ctx.saved_tensors
    wants_gate, wants_up, *_, wants_a, wants_b, wants_beta, _ = ctx.needs_input_grad
    wants_h = wants_gate or wants_up
    wants = [wants_h, wants_h and up is not None, wants_a, wants_b, wants_beta]
    found = torch.ops.fastlora.glu_lora_linear_backward(
        g, gate, up, ctx.activation, ctx.dtype, frozen, ctx.layout, a, b, beta, ctx.scaling, wants
    )
    dgate, dup, da, db, dbeta = _placed(found, wants)
    return dgate, dup, None, None, [None] * len(frozen), None, None, da, db, dbeta, None


def _glu_lora_backward(g, gate, up, activation, dtype, frozen, layout, a, b, beta, scaling, wants):
    adapters = (a, b, beta)
    weights = [put_together(frozen, layout)]
    ctx = _remembered(math.prod(gate.shape[:-1]), weights, adapters, [scaling])
    ctx.activation, ctx.dtype, ctx.spent = activation, dtype, False
    made_and_adapters = (None, None, *adapters)
    found = gated.lora_gradients(ctx, made_and_adapters, gate, up, (g,), wants[0], wants[2:])
    return _wanted(found, wants)


def _glu_lora_backward_fake(
    g, gate, up, activation, dtype, frozen, layout, a, b, beta, scaling, wants
):
    return _fake_gradients((gate, up, a, b, beta), wants)


_register(
    "glu_lora_linear",
    f"(Tensor gate, Tensor? up, str activation, ScalarType dtype, {FROZEN}, Tensor a, Tensor b, Tensor? beta, "
    "float scaling) -> Tensor",
    _glu_lora, _glu_lora_fake, _glu_lora_saved, _glu_lora_gradients,
)  # fmt: skip
_register(
    "glu_lora_linear_backward",
    "(Tensor g, Tensor gate, Tensor? up, str activation, ScalarType dtype, Tensor[] frozen, int[] layout, Tensor a, "
    "Tensor b, Tensor? beta, float scaling, bool[] wants) -> Tensor[]",
    _glu_lora_backward, _glu_lora_backward_fake,
)  # fmt: skip
