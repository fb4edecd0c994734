"""DoRA against PEFT's own layer, its equation, and finite differences."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from fastlora_kernels import attach, reference
from fastlora_kernels.ops import dequantize as dequantizing
from fastlora_kernels.ops import dora_linear as doras
from fastlora_kernels.ops import dropout as dropping
from fastlora_kernels.ops import skinny
from fastlora_kernels.ops.dora_linear import column_dots, dora_linear, scale_columns
from fastlora_kernels.ops.lora_linear import folds
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def layer(k: int, n: int, rank: int, *, four_bit: bool, bias: bool) -> Any:
    """PEFT's layer with DoRA in float32, away from its start: B, and the magnitude apart from the norm."""
    torch.manual_seed(0)
    if four_bit:
        base = bnb.nn.Linear4bit(k, n, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    else:
        base = nn.Linear(k, n, bias=bias)
    model: Any = nn.ModuleDict({"proj": base.to(DEVICE)})
    model.is_loaded_in_4bit = four_bit
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=True, target_modules=["proj"])
    peft = inject_adapter_in_model(config, model)["proj"].to(DEVICE)
    nn.init.normal_(peft.lora_B["default"].weight, std=0.2)
    magnitude = peft.lora_magnitude_vector["default"].weight
    magnitude.data *= torch.linspace(0.5, 1.5, n, device=DEVICE)
    return peft


def parameters(peft: Any) -> list[torch.Tensor]:
    return [
        peft.lora_A["default"].weight,
        peft.lora_B["default"].weight,
        peft.lora_magnitude_vector["default"].weight,
    ]


def ours(peft: Any, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    a, b, magnitude = parameters(peft)
    base = peft.base_layer
    return dora_linear(x, base.weight, base.bias, a, b, magnitude, peft.scaling["default"], dropout)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(
    ("tokens", "k", "n", "rank"),
    [((1,), 64, 70, 8), ((63,), 128, 33, 16), ((2, 40), 64, 96, 40), ((257,), 192, 48, 4)],
)
def test_output_and_every_gradient_are_pefts(
    tokens: tuple[int, ...], k: int, n: int, rank: int, four_bit: bool, bias: bool, backend: str
) -> None:
    peft = layer(k, n, rank, four_bit=four_bit, bias=bias)
    x = torch.randn(*tokens, k, device=DEVICE, requires_grad=True)
    upstream = torch.randn(*tokens, n, device=DEVICE)
    wanted = peft(x)
    inputs = [x, *parameters(peft)]
    expected = [wanted.detach(), *torch.autograd.grad(wanted, inputs, upstream)]
    y = ours(peft, x)
    got = [y.detach(), *torch.autograd.grad(y, inputs, upstream)]
    for name, left, right in zip(("y", "x", "A", "B", "m"), got, expected, strict=True):
        error = float((left - right).norm() / right.norm())
        assert error < 2e-6, (name, error)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "four_bit"), [(6, False), (6, True), (90, True)])
def test_a_magnitude_of_nothing(tokens: int, four_bit: bool, bias: bool, backend: str) -> None:
    """The last is folded: there y has nothing left of z, of which the gradient is made."""
    peft = layer(64, 48, 8, four_bit=four_bit, bias=bias)
    magnitude = peft.lora_magnitude_vector["default"].weight
    magnitude.data[3] = 0.0
    magnitude.data[5] *= -1e-6
    x = torch.randn(tokens, 64, device=DEVICE)
    upstream = torch.randn(tokens, 48, device=DEVICE)
    wanted = peft(x)
    (expected,) = torch.autograd.grad(wanted, [magnitude], upstream)
    y = ours(peft, x)
    (found,) = torch.autograd.grad(y, [magnitude], upstream)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert abs(float(expected[3])) > 1e-2


@pytest.mark.parametrize("bias", [0.0, 200.0])
def test_a_large_bias_takes_nothing_from_the_magnitudes_gradient(bias: float) -> None:
    """In 16 bits, of a fold: as of Qwen2.5's k, whose bias goes to hundreds."""
    peft = layer(64, 48, 8, four_bit=True, bias=True)
    nn.init.constant_(peft.base_layer.bias, bias)
    magnitude = peft.lora_magnitude_vector["default"].weight
    x, upstream = torch.randn(300, 64, device=DEVICE), torch.randn(300, 48, device=DEVICE)
    (exact,) = torch.autograd.grad(peft(x), [magnitude], upstream)
    y = ours(peft, x.bfloat16())
    (found,) = torch.autograd.grad(y, [magnitude], upstream.bfloat16())
    assert float((found - exact).norm()) < 1e-2 * float(exact.norm())


def test_in_float64_it_is_pefts() -> None:
    """Ours sums in float32."""
    peft = layer(64, 48, 8, four_bit=False, bias=True).double()
    x = torch.randn(5, 64, device=DEVICE, dtype=torch.float64)
    wanted = peft(x)
    assert attach(nn.ModuleDict({"proj": peft})).served == {"proj": 1}
    assert torch.equal(peft(x), wanted)


class Masked(nn.Dropout):
    """PEFT's dropout with the mask of ours."""

    def __init__(self, like: torch.Tensor, p: float, seed: torch.Tensor) -> None:
        super().__init__(p)
        self.mask = dropping.dropout(torch.ones_like(like), p, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(("tokens", "k", "n", "rank"), [((3, 21), 64, 70, 8), ((257,), 192, 48, 4)])
def test_dropout_is_of_what_the_adapter_changes(
    tokens: tuple[int, ...], k: int, n: int, rank: int, four_bit: bool, bias: bool, backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    peft = layer(k, n, rank, four_bit=four_bit, bias=bias).train()
    x = torch.randn(*tokens, k, device=DEVICE, requires_grad=True)
    upstream = torch.randn(*tokens, n, device=DEVICE)
    seeds = torch.tensor([7], device=DEVICE)
    monkeypatch.setattr(doras, "draw_seeds", lambda ps, device: seeds)
    peft.lora_dropout["default"] = Masked(x.detach(), 0.3, seeds[0])
    inputs = [x, *parameters(peft)]
    wanted = peft(x)
    expected = [wanted.detach(), *torch.autograd.grad(wanted, inputs, upstream)]
    y = ours(peft, x, 0.3)
    got = [y.detach(), *torch.autograd.grad(y, inputs, upstream)]
    for name, left, right in zip(("y", "x", "A", "B", "m"), got, expected, strict=True):
        error = float((left - right).norm() / right.norm())
        assert error < 2e-6, (name, error)


def test_a_repetition_drops_the_same(backend: str) -> None:
    peft = layer(64, 70, 8, four_bit=False, bias=False)
    x = torch.randn(40, 64, device=DEVICE, requires_grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        y = checkpoint(ours, peft, x, 0.5, use_reentrant=False) if again else ours(peft, x, 0.5)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *parameters(peft)])])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(ours(peft, x, 0.5), ours(peft, x, 0.5))


def test_an_input_that_lies_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what was transposed does; its gradient is made by a kernel that writes rows."""
    if not CUDA:
        monkeypatch.setenv("FASTLORA_KERNELS", "interpret")
    monkeypatch.setattr(skinny, "expanded_by_hand", lambda *sizes: True)
    torch.manual_seed(0)
    make = lambda *size: torch.randn(*size, device=DEVICE, dtype=torch.float16)  # noqa: E731
    weight, a, b, magnitude = make(24, 40), make(4, 40), make(24, 4), make(24).abs()
    turned = make(40, 30).T.requires_grad_()
    straight = turned.detach().contiguous().requires_grad_()
    g = make(30, 24)
    dx, expected = (
        torch.autograd.grad(dora_linear(x, weight, None, a, b, magnitude, 2.0), x, g)[0]
        for x in (turned, straight)
    )
    torch.testing.assert_close(dx, expected, rtol=0, atol=0)


def test_both_ways_were_taken() -> None:
    """The cases above go through the fold and the split products."""
    assert not folds(1, 70, 64, 1)
    assert folds(257, 48, 192, 1)


@pytest.mark.parametrize("bias", [False, True])
def test_finite_differences(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the norm held constant, as the paper has it: by a base so large that it hardly moves."""
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    weight = torch.randn(5, 6, dtype=torch.float64) * 1e6
    b0 = torch.randn(5, dtype=torch.float64) if bias else None
    x, a, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 6), (2, 6), (5, 2))
    )
    m = (weight.norm(dim=1) * torch.linspace(0.5, 2, 5, dtype=torch.float64)).requires_grad_()
    with torch.no_grad():
        x *= 1e-6
    assert torch.autograd.gradcheck(
        lambda x, a, b, m: dora_linear(x, weight, b0, a, b, m, 0.5),
        (x, a, b, m),
        atol=1e-4,
        rtol=1e-3,
    )


@pytest.mark.parametrize(("tokens", "n"), [(1, 1), (63, 70), (257, 130)])
def test_the_elementwise_kernels(tokens: int, n: int, backend: str) -> None:
    torch.manual_seed(0)
    z, g = torch.randn(2, tokens, n, device=DEVICE)
    c, bias = torch.randn(2, n, device=DEVICE)
    torch.testing.assert_close(scale_columns(z, c, bias), z * c + bias)
    torch.testing.assert_close(scale_columns(z, c), z * c)
    torch.testing.assert_close(column_dots(z, g), (z * g).sum(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(("n", "k", "rank"), [(1, 64, 1), (33, 130, 16), (70, 1024, 40)])
def test_row_norms(n: int, k: int, rank: int, four_bit: bool, backend: str) -> None:
    torch.manual_seed(0)
    weight: Any = torch.randn(n, k, device=DEVICE) * 0.02
    if four_bit:
        quantized = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(DEVICE)
        weight = dequantizing.FourBit.of(quantized)
        dense = reference.dequantize(weight, torch.float32)
    else:
        dense = weight
    a, b = torch.randn(rank, k, device=DEVICE), torch.randn(n, rank, device=DEVICE) * 0.01
    got = dequantizing.row_norms(weight, (a, b, 0.5), torch.float32)
    torch.testing.assert_close(got, (dense + 0.5 * b @ a).norm(dim=1), rtol=1e-5, atol=1e-7)


def test_half_precision_errs_no_more_than_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    peft = layer(128, 96, 16, four_bit=False, bias=True)
    x, upstream = torch.randn(63, 128, device=DEVICE), torch.randn(63, 96, device=DEVICE)

    def results(made: Any, dtype: torch.dtype, op: Any) -> list[torch.Tensor]:
        given = x.to(dtype).requires_grad_()
        y = op(made, given)
        return [y.detach(), *torch.autograd.grad(y, [given, *parameters(made)], upstream.to(dtype))]

    exact = results(peft, torch.float32, lambda made, given: made(given))
    small = copy.deepcopy(peft).to(torch.bfloat16)
    theirs = results(small, torch.bfloat16, lambda made, given: made(given))
    mine = results(small, torch.bfloat16, ours)
    for name, truth, their, own in zip(("y", "x", "A", "B", "m"), exact, theirs, mine, strict=True):
        allowed = 2 * float((their.float() - truth).norm()) + 1e-6 * float(truth.norm())
        assert float((own.float() - truth).norm()) <= allowed, name


def test_what_does_not_fit_is_named() -> None:
    x, weight = torch.randn(3, 6), torch.randn(5, 6)
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"dora_linear: magnitude \(4,\) does not fit"):
        dora_linear(x, weight, None, a, b, torch.ones(4), 1.0)
    with pytest.raises(ValueError, match=r"dora_linear: x \(3, 5\)"):
        dora_linear(x[:, :5], weight, None, a, b, torch.ones(5), 1.0)
