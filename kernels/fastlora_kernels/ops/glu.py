"""The gated activation of an MLP, alone and in front of a linear layer with a LoRA adapter.

    h = f(gate) up;  dgate = dh up f'(gate),  dup = dh f(gate);  f: silu, gelu, or gelu with tanh in it

GLU variants, Shazeer 2020 (arXiv:2002.05202); GELU and its tanh form, Hendrycks and Gimpel 2016 (arXiv:1606.08415),
section 2. Computed in float32, rounded once. In front of a linear layer h is made again in backward, in the kernel that
makes dgate and dup, so that of the MLP's width gate and up alone are saved. Shapes: T tokens, F the MLP's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from fastlora_kernels import reference
from fastlora_kernels.dispatch import Backend, choose_backend
from fastlora_kernels.first_order import first_order
from fastlora_kernels.launch import cdiv, launch
from fastlora_kernels.ops.lora_linear import (
    Gradients,
    Projection,
    fitting,
    frozen,
    outputs,
    shaped,
    without_outputs,
)
from fastlora_kernels.triton_or_not import jit, tl

Activation = Literal["silu", "gelu", "gelu_tanh"]


class Recomputed(NamedTuple):
    """What a call that is made for its backward alone need not do."""

    unneeded: bool = False
    """Nobody reads what comes back. It is memory as it was found then."""
    spent: bool = False
    """Nobody reads gate and up after backward, which writes their gradients over them."""


FIRST = Recomputed()
"""A call that is no repetition."""
BACKENDS: tuple[Backend, ...] = ("triton", "interpret", "reference")
BLOCK_F = 1024


@jit
def _activation(gate, ACTIVATION: tl.constexpr):
    """f(gate) and f'(gate)."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # the normal distribution
        return gate * below, below + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)  # sqrt(2 / pi)
    half = tl.sigmoid(2.0 * inner)  # (1 + tanh(inner)) / 2
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * gate * gate)
    return gate * half, half + gate * 2.0 * half * (1.0 - half) * slope


@jit
def _glu(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_F = f_F < width
    gate_F = tl.load(gate_ptr + row * gate_stride + f_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * up_stride + f_F, mask=inside_F, other=0.0).to(tl.float32)
    value_F, _ = _activation(gate_F, ACTIVATION)
    out_F = (value_F * up_F).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + f_F, out_F, mask=inside_F)


@jit
def _glu_backward(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, gate_stride, up_stride, dgate_stride, dup_stride, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h takes the place of dh."""
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_F = f_F < width
    dh_F = tl.load(dh_ptr + row * width + f_F, mask=inside_F, other=0.0).to(tl.float32)
    gate_F = tl.load(gate_ptr + row * gate_stride + f_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * up_stride + f_F, mask=inside_F, other=0.0).to(tl.float32)
    value_F, slope_F = _activation(gate_F, ACTIVATION)
    h_F = (value_F * up_F).to(dh_ptr.dtype.element_ty)
    dgate_F = (dh_F * up_F * slope_F).to(dgate_ptr.dtype.element_ty)
    dup_F = (dh_F * value_F).to(dup_ptr.dtype.element_ty)
    tl.store(dh_ptr + row * width + f_F, h_F, mask=inside_F)
    tl.store(dgate_ptr + row * dgate_stride + f_F, dgate_F, mask=inside_F)
    tl.store(dup_ptr + row * dup_stride + f_F, dup_F, mask=inside_F)


def _forward(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    if choose_backend(gate_TF.device, BACKENDS) == "reference":
        return reference.glu(gate_TF, up_TF, activation, dtype)
    tokens, width = gate_TF.shape
    out_TF = torch.empty((tokens, width), dtype=dtype, device=gate_TF.device)
    if tokens:
        launch(
            _glu,
            (tokens, cdiv(width, BLOCK_F)),
            (gate_TF, up_TF, out_TF),
            (gate_TF.stride(0), up_TF.stride(0), width),
            {"ACTIVATION": activation, "BLOCK": BLOCK_F},
        )
    return out_TF


def _backward(
    dh_TF: torch.Tensor,
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    dgate_TF: torch.Tensor,
    dup_TF: torch.Tensor,
    activation: Activation,
) -> None:
    """Writes dgate and dup, and h over dh, which is contiguous."""
    if choose_backend(gate_TF.device, BACKENDS) == "reference":
        reference.glu_backward(dh_TF, gate_TF, up_TF, dgate_TF, dup_TF, activation)
        return
    tokens, width = gate_TF.shape
    if tokens:
        launch(
            _glu_backward,
            (tokens, cdiv(width, BLOCK_F)),
            (dh_TF, gate_TF, up_TF, dgate_TF, dup_TF),
            (gate_TF.stride(0), up_TF.stride(0), dgate_TF.stride(0), dup_TF.stride(0), width),
            {"ACTIVATION": activation, "BLOCK": BLOCK_F},
        )


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up as (T, F), with a stride of 1 in F; of (T, 2 F) its left and right half."""
    gate_TF = gate.reshape(-1, gate.shape[-1])
    if up is None:
        if gate_TF.stride(1) != 1:
            gate_TF = gate_TF.contiguous()
        left, right = gate_TF.chunk(2, dim=1)
        return left, right
    return gate_TF.contiguous(), up.reshape(-1, up.shape[-1]).contiguous()


def both_fit(op: str, gate: torch.Tensor, up: torch.Tensor | None) -> None:
    """Raises ValueError: shapes or dtypes that do not fit."""
    if (gate.shape[-1] % 2) if up is None else (gate.shape != up.shape or gate.dtype != up.dtype):
        shape = None if up is None else tuple(up.shape)
        raise ValueError(f"{op}: gate {tuple(gate.shape)} and up {shape} do not fit")


def glu(gate: torch.Tensor, up: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """f(gate) up, (..., F), in gate's dtype; gate and up (..., F) of one dtype, or gate alone (..., 2 F), whose right
    half is up. Raises ValueError: shapes or dtypes that do not fit."""
    both_fit("glu", gate, up)
    h: torch.Tensor = Glu.apply(gate, up, activation)
    return h


def glu_lora_linear(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: Activation,
    projection: Projection,
    dtype: torch.dtype,
    recomputed: Recomputed = FIRST,
) -> torch.Tensor:
    """lora_linear(glu(gate, up), *projection), computed and returned in `dtype`, without h kept for backward.

    `recomputed` changes no bit of a gradient.
    Raises ValueError: see glu and lora_linear.
    """
    both_fit("glu_lora_linear", gate, up)
    weight, bias, a, b, scaling, beta, p = projection
    ready = frozen(weight)
    fitting(
        "glu_lora_linear", gate[..., : gate.shape[-1] // 2] if up is None else gate, ready, a, b
    )
    fixed = ((ready, bias, scaling, p),)
    y: torch.Tensor = GluLoraLinear.apply(
        gate, up, (activation, dtype, fixed, recomputed), a, b, beta
    )
    return y


class Glu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, activation: Activation
    ) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return output(gate, up, activation)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *gradients_of(gradients[0], gate, up, ctx.activation), None


class GluLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, how: Any, *adapters: Any
    ) -> torch.Tensor:
        ctx.activation, ctx.dtype, fixed, recomputed = how
        ctx.spent = recomputed.spent
        made_of = unmade_output if recomputed.unneeded else lora_output
        y, *made = made_of(ctx, gate, up, fixed, adapters)
        ctx.save_for_backward(gate, up, *made, *adapters)
        ctx.set_materialize_grads(False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @first_order
    def backward(ctx: Any, *gs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        gate, up, *made_and_adapters = ctx.saved_tensors
        wants_gate, wants_up, _, *wants = ctx.needs_input_grad
        wants_h = wants_gate or wants_up
        dgate, dup, *found = lora_gradients(ctx, made_and_adapters, gate, up, gs, wants_h, wants)
        return dgate, dup, None, *found


def output(gate: torch.Tensor, up: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """h, (..., F)."""
    return shaped(_forward(*_halves(gate, up), activation, gate.dtype), gate.shape[:-1])


def gradients_of(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dgate and dup."""
    # What comes in may be read by others, and h would overwrite it.
    return _input_gradients(dh.reshape(-1, dh.shape[-1]).clone(), gate, up, activation)


def lora_output(
    ctx: Any,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    fixed: Any,
    adapters: Sequence[Any],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """y, S and the seeds (see lora_linear.outputs)."""
    h_TF = _forward(*_halves(gate, up), ctx.activation, ctx.dtype)
    (y,), down_TR, seeds = outputs(ctx, h_TF, gate.shape[:-1], fixed, adapters)
    return y, down_TR, seeds


def unmade_output(
    ctx: Any,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    fixed: Any,
    adapters: Sequence[Any],
) -> tuple[Any, ...]:
    """As lora_output, with y's memory alone in place of y. Where lora_output folds, nothing is computed."""
    lead = gate.shape[:-1]

    def make_h_TF() -> torch.Tensor:
        return _forward(*_halves(gate, up), ctx.activation, ctx.dtype)

    made = without_outputs(ctx, lead.numel(), make_h_TF, fixed, adapters)
    ((weight, *_),) = fixed
    return gate.new_empty((*lead, weight.shape[0]), dtype=ctx.dtype), *made


def lora_gradients(
    ctx: Any,
    made_and_adapters: Sequence[Any],
    gate: torch.Tensor,
    up: torch.Tensor | None,
    gs: Sequence[torch.Tensor | None],
    wants_h: bool,
    wants: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """dgate, dup, and those of `adapters`."""
    down_TR, seeds, *adapters = made_and_adapters
    gradients = Gradients(ctx, ctx.dtype, adapters, gs, wants, down_TR, seeds)
    h_TF = gradients.of_x() if wants_h else None
    dgate = dup = None
    if h_TF is not None:
        into = (gate, up) if ctx.spent else None
        dgate, dup = _input_gradients(h_TF, gate, up, ctx.activation, into)
    else:
        h_TF = _forward(*_halves(gate, up), ctx.activation, ctx.dtype)
    return dgate, dup, *gradients.of_adapters(h_TF)


def _input_gradients(
    dh_TF: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: Activation,
    into: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dgate and dup in the shapes of gate and up, `into` tensors that may be those; dh_TF holds h afterwards."""
    if into is None or not all(one is None or one.is_contiguous() for one in into):
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
    else:
        dgate, dup = into
    _backward(dh_TF, *_halves(gate, up), *_halves(dgate, dup), activation)
    return dgate, dup
