"""Matrices that are kept between steps: the same bits, made once, and nobody's who did not ask."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from fastlora_kernels import DenseWeights
from fastlora_kernels import dense as dense_module
from fastlora_kernels.ops import lora_linear as ops
from fastlora_kernels.ops.four_bit import FourBit
from fastlora_kernels.ops.lora_linear import Projection, folds, lora_linears
from torch import nn

K, R = 64, 4
FOLDED, NOT_FOLDED = 64, 2
"""Tokens."""


class Layer(nn.Module):
    """Two projections of one x, from 4-bit weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scaling = 2.0
        self.weights = nn.ParameterList(
            bnb.nn.Params4bit(torch.randn(n, K), requires_grad=False, quant_type="nf4").to("cpu")
            for n in (K, 32)
        )
        self.a = nn.ParameterList(torch.randn(R, K) * 0.1 for _ in self.weights)
        self.b = nn.ParameterList(torch.randn(n, R) * 0.1 for n in (K, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ys = lora_linears(
            x,
            [
                Projection(weight, None, a, b, self.scaling)
                for weight, a, b in zip(self.weights, self.a, self.b, strict=True)
            ],
        )
        return torch.cat([y.square() for y in ys], dim=-1).sum()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was dequantized."""
    found: list[Any] = []
    own = ops.dequantize

    def noted(weight: FourBit, *given: Any, **named: Any) -> torch.Tensor:
        found.append(weight.source)
        return own(weight, *given, **named)

    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    monkeypatch.setattr(ops, "dequantize", noted)
    monkeypatch.setattr(dense_module, "dequantize", noted)
    return found


def results(layer: Layer, x: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    given = x.clone().requires_grad_()
    loss = layer(given)
    loss.backward()
    assert given.grad is not None
    gradients = [p.grad for p in layer.parameters() if p.requires_grad and p.grad is not None]
    return [loss.detach(), given.grad, *(one.clone() for one in gradients)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("tokens", [FOLDED, NOT_FOLDED])
def test_no_bit_changes_and_each_is_made_once(tokens: int, made: list[Any]) -> None:
    layer, x = Layer(), torch.randn(tokens, K)
    assert folds(tokens, K + 32, K, R) == (tokens == FOLDED)
    plain = results(layer, x)
    assert len(made) == 4  # two, forward and backward
    weights = DenseWeights([layer])
    made.clear()
    with weights.used():
        assert equal(results(layer, x), plain)
        assert equal(results(layer, x), plain)
    assert len(made) == len(weights) == 2


def test_they_are_those_of_before_a_step_until_they_are_made_anew(made: list[Any]) -> None:
    layer, x = Layer(), torch.randn(FOLDED, K)
    weights = DenseWeights([layer])
    with weights.used():
        before = results(layer, x)
    with torch.no_grad():
        for parameter in layer.b:
            parameter.mul_(1.5)
    now = results(layer, x)  # nothing is used here
    assert not equal(now, before)
    with weights.used():
        assert torch.equal(results(layer, x)[0], before[0])
        weights.refresh()
        assert equal(results(layer, x), now)
    weights.forget()
    assert len(weights) == 0


def test_another_kind_of_matrix_is_not_theirs(made: list[Any]) -> None:
    """A few tokens want it without a fold; who is not among the modules has none."""
    layer, other = Layer(), Layer()
    few, many = torch.randn(NOT_FOLDED, K), torch.randn(FOLDED, K)
    plain = results(layer, few)
    weights = DenseWeights([layer])
    with weights.used():
        results(layer, many)
        assert equal(results(layer, few), plain)
        results(other, many)
    assert len(weights) == 2


def test_another_adapter_on_the_same_weight_has_a_matrix_of_its_own(made: list[Any]) -> None:
    layer, other = Layer(), Layer()
    other.weights = layer.weights
    other.b = nn.ParameterList(-2 * b.detach() for b in layer.b)
    louder = Layer()
    louder.weights, louder.a, louder.b, louder.scaling = layer.weights, layer.a, layer.b, 3.0
    x = torch.randn(FOLDED, K)
    plain = [results(one, x) for one in (layer, other, louder)]
    weights = DenseWeights([layer])
    with weights.used():
        for one, alone in zip((layer, other, louder), plain, strict=True):
            assert equal(results(one, x), alone)
    assert len(weights) == 2


@pytest.mark.parametrize(
    ("dtype", "scalings", "cast"),
    [
        (torch.bfloat16, (2.0, -0.25), (True, True)),
        (torch.bfloat16, (1.5, 4.0), (False, True)),
        (torch.float16, (2.0, 1.0), (False, False)),  # fewer bits for what is small
        (torch.float32, (2.0, 2.0), (False, False)),
    ],
)
def test_backward_folds_the_cast_adapter_where_no_bit_changes(
    dtype: torch.dtype, scalings: tuple[float, float], cast: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of two projections of equal width."""
    found: list[tuple[torch.dtype, ...]] = []
    own = ops.dequantize

    def noted(weight: Any, dtype: torch.dtype, fold: Any, row_scale: Any = None) -> torch.Tensor:
        found.append(tuple(one.dtype for one in fold[:2]))
        return own(weight, dtype, fold, row_scale)

    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    monkeypatch.setattr(ops, "dequantize", noted)
    torch.manual_seed(0)
    weights = [
        bnb.nn.Params4bit(torch.randn(K, K), requires_grad=False, quant_type="nf4").to("cpu")
        for _ in scalings
    ]
    adapters = [(torch.randn(R, K) * 0.1, torch.randn(K, R) * 1e-4) for _ in scalings]
    x = torch.randn(FOLDED, K, dtype=dtype, requires_grad=True)
    ys = lora_linears(
        x,
        [
            Projection(weight, None, a, b, scaling)
            for weight, (a, b), scaling in zip(weights, adapters, scalings, strict=True)
        ],
    )
    gs = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, gs)
    dense = []
    for weight, (a, b), scaling in zip(weights, adapters, scalings, strict=True):
        four_bit = FourBit.of(weight)
        assert four_bit is not None
        dense.append(own(four_bit, dtype, (a, b, scaling)))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.mm(gs[0], dense[0]).addmm_(gs[1], dense[1]))
    wide = (torch.float32, torch.float32)
    assert found == [wide, wide, *((dtype, dtype) if each else wide for each in cast)]
