"""Our ops as ops of torch's own, for a model that torch.compile traces.

A compiler that traced the autograd.Functions would find the same dequantized W in forward and backward, and save it: a
whole layer in 16 bits. Here it sees one op each way, and backward's takes the gradient that arrives, so that nothing
dense can be made before. What runs inside are the functions that the autograd.Functions run; saved is what was given,
and S is made again in backward.

What a model calls, as OPS.lora_linears, is made of an autograd.Function, `_Op`, and is gone once a compiler has traced
it; its graphs call lora_linears_forward and lora_linears_backward, which autograd knows nothing of. Python calls them
and they are Python, so that each argument is converted twice: lists and a text take the host some 8 us less than what
the model gives. torch.library.custom_op would put 15 us of Python around each call (benchmarks/host.py).

A frozen weight is passed as its tensors and a layout of numbers (see `taken_apart`). Not served: dropout and 8-bit
weights. create_graph=True raises RuntimeError.
"""

from __future__ import annotations

import math
from ast import literal_eval
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from fastlora_kernels.first_order import first_order
from fastlora_kernels.ops import dora_linear as dora
from fastlora_kernels.ops import glu as gated
from fastlora_kernels.ops import lora_linear as lora
from fastlora_kernels.ops.eight_bit import EightBit
from fastlora_kernels.ops.four_bit import FourBit

Tensors = list[torch.Tensor]
Gradients = Sequence[torch.Tensor | None]
NAME = "fastlora_2"
"""Counted up when what an op takes changes: a compiled graph that a compiler keeps on disk calls it by its name."""
OPS = getattr(torch.ops, NAME)
LIBRARY = torch.library.Library(NAME, "FRAGMENT")
FROZEN = "Tensor[] frozen, int[] layout, Tensor? bias"


def serves(weight: lora.Weight, dropout: float) -> bool:
    """Whether there is an op here for a layer of such a weight."""
    return not dropout and not isinstance(weight, EightBit)


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
    return OPS.dora_linear(  # type: ignore[no-any-return]
        x, *taken_apart(weight), bias, lora_a, lora_b, magnitude, scaling
    )


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


class _Op(torch.autograd.Function):
    """`name` among OPS. `how`: what its functions below are told besides tensors, in Python's literals. `frozen` and
    `trained`: tensors or None; gradients are for the latter. What forward gives beyond `outputs` is for backward, which
    finds it behind `frozen`."""

    @staticmethod
    def forward(
        ctx: Any, name: str, how: Any, outputs: int, frozen: Any, *trained: Any
    ) -> tuple[torch.Tensor, ...]:
        found = getattr(OPS, f"{name}_forward")(frozen, trained, repr(how))
        kept = (*frozen, *found[outputs:])
        ctx.save_for_backward(*kept, *trained)
        ctx.called = name, how, len(kept)
        return tuple(found[:outputs])

    @staticmethod
    @first_order
    def backward(ctx: Any, *gs: torch.Tensor) -> tuple[Any, ...]:
        (name, how, count), tensors = ctx.called, ctx.saved_tensors
        wants = ctx.needs_input_grad[4:]
        found = iter(
            getattr(OPS, f"{name}_backward")(
                gs, tensors[:count], tensors[count:], repr((how, wants))
            )
        )
        return None, None, None, None, *[next(found) if wanted else None for wanted in wants]


@cache
def _read(how: str) -> Any:
    return literal_eval(how)


def _register(
    name: str,
    schema: str,
    whole: Callable[..., Any],
    forward: Callable[[Any, Any, Any], Sequence[torch.Tensor]],
    fake: Callable[[Any, Any, Any], Sequence[torch.Tensor]],
    backward: Callable[[Tensors, Any, Any, Any, Sequence[bool]], Gradients],
) -> None:
    """What the model calls, `whole`, made of an `_Op`, and the two ops that graphs call.

    `forward` and `fake`, the same without data: of frozen, trained and how. `backward`: of the outputs' gradients,
    those three, and whether each of trained is to have a gradient; gives one or None for each of trained.
    """
    LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, whole, "CompositeImplicitAutograd")
    given = "Tensor?[] frozen, Tensor?[] trained, str how"

    def run_backward(gs: Any, frozen: Any, trained: Any, how: str) -> Tensors:
        told, wants = _read(how)
        found = backward(gs, frozen, trained, told, wants)
        return [one for one, wanted in zip(found, wants, strict=True) if wanted and one is not None]

    def fake_backward(gs: Any, frozen: Any, trained: Any, how: str) -> Tensors:
        _, wants = _read(how)
        return [
            one.new_empty(one.shape) for one, wanted in zip(trained, wants, strict=True) if wanted
        ]

    for direction, arguments, run, shapes in (
        (
            "forward",
            given,
            lambda frozen, trained, how: forward(frozen, trained, _read(how)),
            lambda frozen, trained, how: fake(frozen, trained, _read(how)),
        ),
        ("backward", f"Tensor[] gs, {given}", run_backward, fake_backward),
    ):
        op = f"{name}_{direction}"
        LIBRARY.define(f"{op}({arguments}) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(op, run, "CompositeExplicitAutograd")
        LIBRARY.impl(op, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{NAME}::{op}", shapes, lib=LIBRARY)


# lora_linears. Frozen: the bias of each projection and the tensors of its weight; trained: x, then A, B and its bias
# of each; told: how many tensors each weight is, its layout and the scaling.


def _lora(x, frozen, layouts, biases, matrices, betas, scalings):
    weights, bias, ab, beta = iter(frozen), iter(biases), iter(matrices), iter(betas)
    numbers = iter(layouts)
    how, kept, trained = [], [], [x]
    for scaling in scalings:
        has_bias, has_beta, count, size = (next(numbers) for _ in range(4))
        how.append((count, tuple(next(numbers) for _ in range(size)), scaling))
        kept += [next(bias) if has_bias else None, *(next(weights) for _ in range(count))]
        trained += [next(ab), next(ab), next(beta) if has_beta else None]
    return list(_Op.apply("lora_linears", how, len(how), kept, *trained))


def _fixed(frozen: Any, how: Any) -> list[Any]:
    """As ops/lora_linear.py has it."""
    found, place = [], 0
    for count, layout, scaling in how:
        end = place + 1 + count
        found.append((put_together(frozen[place + 1 : end], layout), frozen[place], scaling, 0.0))
        place = end
    return found


def _lora_forward(frozen, trained, how):
    x, *adapters = trained
    x_TK = x.reshape(-1, x.shape[-1])
    return lora.outputs(SimpleNamespace(), x_TK, x.shape[:-1], _fixed(frozen, how), adapters)[0]


def _lora_fake(frozen, trained, how):
    x, *adapters = trained
    return [x.new_empty(*x.shape[:-1], b.shape[0]) for b in adapters[1::3]]


def _lora_backward(gs, frozen, trained, how, wants):
    x, *adapters = trained
    x_TK, ctx = x.reshape(-1, x.shape[-1]), SimpleNamespace()
    lora.remember(ctx, x_TK.shape[0], _fixed(frozen, how), adapters)
    gradients = lora.Gradients(ctx, x.dtype, adapters, gs, wants[1:], None, None)
    dx_TK = gradients.of_x() if wants[0] else None
    found = gradients.of_adapters(x_TK)
    if len(gs) > 1:  # every dA is a part of one product, and an op's outputs share no memory
        found[::3] = [None if da is None else da.clone() for da in found[::3]]
    return None if dx_TK is None else dx_TK.view(x.shape), *found


_register(
    "lora_linears",
    "(Tensor x, Tensor[] frozen, int[] layouts, Tensor[] biases, Tensor[] matrices, Tensor[] betas, "
    "float[] scalings) -> Tensor[]",
    _lora, _lora_forward, _lora_fake, _lora_backward,
)  # fmt: skip


# dora_linear. Frozen: the bias and the tensors of the weight; told: its layout and the scaling.


def _dora(x, frozen, layout, bias, a, b, magnitude, scaling):
    how = tuple(layout), scaling
    return _Op.apply("dora_linear", how, 1, (bias, *frozen), x, a, b, magnitude)[0]


def _dora_forward(frozen, trained, how):
    (bias, *weight), (x, a, b, magnitude), (layout, scaling) = frozen, trained, how
    y, _, *made = dora.output(x, put_together(weight, layout), bias, scaling, a, b, magnitude)
    return y, *made


def _dora_fake(frozen, trained, how):
    x, _, b, magnitude = trained
    lead, n = x.shape[:-1], b.shape[0]
    divisor_N = x.new_empty(n, dtype=torch.float32)
    c_N = x.new_empty(n, dtype=torch.promote_types(magnitude.dtype, torch.float32))
    return x.new_empty(*lead, n), x.new_empty(math.prod(lead), n), c_N, divisor_N


def _dora_backward(gs, frozen, trained, how, wants):
    (_, *weight, kept_TN, c_N, divisor_N), (x, *adapter), (layout, scaling) = frozen, trained, how
    saved = (x, *adapter, None, kept_TN, c_N, divisor_N)
    return dora.gradients_of(gs[0], wants, (put_together(weight, layout), scaling), saved)


_register(
    "dora_linear",
    f"(Tensor x, {FROZEN}, Tensor a, Tensor b, Tensor magnitude, float scaling) -> Tensor",
    _dora, _dora_forward, _dora_fake, _dora_backward,
)  # fmt: skip


# glu


def _glu(gate, up, activation):
    return _Op.apply("glu", activation, 1, (), gate, up)[0]


def _glu_forward(frozen, trained, how):
    gate, up = trained
    return [gated.output(gate, up, how)]


def _glu_fake(frozen, trained, how):
    gate, up = trained
    return [gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1))]


def _glu_backward(gs, frozen, trained, how, wants):
    gate, up = trained
    return gated.gradients_of(gs[0], gate, up, how)


_register(
    "glu", "(Tensor gate, Tensor? up, str activation) -> Tensor",
    _glu, _glu_forward, _glu_fake, _glu_backward,
)  # fmt: skip


# glu_lora_linear. Frozen: the bias and the tensors of the weight; told: the activation, the dtype's name, the layout
# and the scaling.


def _glu_lora(gate, up, activation, dtype, frozen, layout, bias, a, b, beta, scaling):
    how = activation, str(dtype).removeprefix("torch."), tuple(layout), scaling
    return _Op.apply("glu_lora_linear", how, 1, (bias, *frozen), gate, up, a, b, beta)[0]


def _glu_lora_forward(frozen, trained, how):
    (bias, *weight), (gate, up, *adapter) = frozen, trained
    activation, dtype, layout, scaling = how
    ctx = SimpleNamespace(activation=activation, dtype=getattr(torch, dtype))
    fixed = ((put_together(weight, layout), bias, scaling, 0.0),)
    return gated.lora_output(ctx, gate, up, fixed, adapter)[:1]


def _glu_lora_fake(frozen, trained, how):
    gate, _, _, b, _ = trained
    return [gate.new_empty(*gate.shape[:-1], b.shape[0], dtype=getattr(torch, how[1]))]


def _glu_lora_backward(gs, frozen, trained, how, wants):
    (bias, *weight), (gate, up, *adapter) = frozen, trained
    activation, dtype, layout, scaling = how
    ctx = SimpleNamespace(activation=activation, dtype=getattr(torch, dtype), spent=False)
    fixed = ((put_together(weight, layout), bias, scaling, 0.0),)
    lora.remember(ctx, math.prod(gate.shape[:-1]), fixed, adapter)
    wants_h = wants[0] or wants[1]
    return gated.lora_gradients(ctx, (None, None, *adapter), gate, up, gs, wants_h, wants[2:])


_register(
    "glu_lora_linear",
    f"(Tensor gate, Tensor? up, str activation, ScalarType dtype, {FROZEN}, Tensor a, Tensor b, Tensor? beta, "
    "float scaling) -> Tensor",
    _glu_lora, _glu_lora_forward, _glu_lora_fake, _glu_lora_backward,
)  # fmt: skip
