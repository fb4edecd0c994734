from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit
from fastlora_kernels.ops.glu import Activation, Recomputed, glu, glu_lora_linear
from fastlora_kernels.ops.lora_linear import Projection

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")


def plain(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """As a model has it, each step rounded."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def gate_and_up(shape: tuple[int, ...], joint: bool, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    if joint:
        shape = (*shape[:-1], 2 * shape[-1])
    gate = (2 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    if joint:
        return [gate, None]
    return [gate, torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()]


def with_gradients(y: torch.Tensor, inputs: list[Any]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    g = torch.randn(y.shape).half().bfloat16().to(y)  # what each dtype can hold
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], g)]


def assert_errs_no_more(ours: Any, theirs: Any, exact: Any) -> None:
    for i, (found, plainly, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert found.dtype == plainly.dtype
        assert found.shape == plainly.shape
        error, allowed = (float((t.double() - truth.double()).norm()) for t in (found, plainly))
        assert error <= 2 * allowed + 1e-6 * float(truth.norm()), (i, error, allowed)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 70), (2, 3, 1030), (0, 4)])
def test_output_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, activation: Activation, joint: bool, backend: str
) -> None:
    given = gate_and_up(shape, joint, dtype)
    wide = [t if t is None else t.detach().double().requires_grad_() for t in given]
    before = [None if t is None else t.detach().clone() for t in given]
    ours = with_gradients(glu(*given, activation), given)
    theirs = with_gradients(plain(*given, activation), given)
    assert_errs_no_more(ours, theirs, with_gradients(plain(*wide, activation), wide))
    for kept, now in zip(before, given, strict=True):
        assert kept is None or torch.equal(kept, now)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (63, 40), (2, 5, 24)])
def test_in_front_of_a_linear_layer(shape: tuple[int, ...], joint: bool, backend: str) -> None:
    given = gate_and_up(shape, joint, torch.float32)
    f = shape[-1]
    weight = torch.randn(17, f, device=DEVICE) / f**0.5
    a = torch.randn(8, f, device=DEVICE, requires_grad=True)
    b = torch.randn(17, 8, device=DEVICE, requires_grad=True)
    beta = torch.randn(17, device=DEVICE, requires_grad=True)
    inputs = [*given, a, b, beta]
    projection = Projection(weight, None, a, b, 0.5, beta)
    y = glu_lora_linear(*given, "silu", projection, torch.float32)
    h = plain(*given, "silu")
    expected = h @ weight.T + 0.5 * (h @ a.T @ b.T + beta)
    ours, theirs = with_gradients(y, inputs), with_gradients(expected, inputs)
    for found, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    # The first layer's MLP, whose input takes no gradient.
    frozen = [None if t is None else t.detach() for t in given]
    y = glu_lora_linear(*frozen, "silu", projection, torch.float32)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0].shape, a.shape)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("base", "rows", "dropout"),
    [("dense", 3, 0.0), ("dense", 3, 0.5), ("nf4", 3, 0.0), ("nf4", 200, 0.0), ("nf4", 200, 0.5)],
)
def test_an_output_that_nobody_needs_is_not_made(
    base: str, rows: int, dropout: float, joint: bool, backend: str
) -> None:
    """What is kept, every gradient and the next random number are the same; 4-bit weights fold from 64 rows on."""
    given = gate_and_up((rows, 128), joint, torch.float32)
    weight: Any = torch.randn(128, 128, device=DEVICE) / 11
    if base == "nf4":
        weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to(DEVICE)
    a = torch.randn(8, 128, device=DEVICE, requires_grad=True)
    b = torch.randn(128, 8, device=DEVICE, requires_grad=True)
    inputs = [*given, a, b]
    projection = Projection(weight, None, a, b, 0.5, None, dropout)

    def made(unneeded: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        torch.manual_seed(5)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = glu_lora_linear(*given, "silu", projection, torch.float32, Recomputed(unneeded))
        drawn = int(torch.randint(2**31, (1,), device=DEVICE))
        return y.detach(), [*kept, *with_gradients(y, inputs)[1:]], drawn

    whole, wanted, then = made(False)
    empty, found, after = made(True)
    assert (empty.shape, empty.dtype, then) == (whole.shape, whole.dtype, after)
    assert not whole.isnan().any()
    assert CUDA or empty.isnan().all()  # as memory is before it is written to
    assert len(found) == len(wanted)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_the_place_of_what_is_spent(
    joint: bool, dtype: torch.dtype, backend: str
) -> None:
    a = torch.randn(8, 128, device=DEVICE, requires_grad=True)
    b = torch.randn(128, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(128, 128, device=DEVICE) / 11
    projection = Projection(weight, None, a, b, 0.5)

    def gradients(spent: bool) -> tuple[list[int], list[torch.Tensor]]:
        given = gate_and_up((3, 128), joint, dtype)
        y = glu_lora_linear(*given, "silu", projection, dtype, Recomputed(spent=spent))
        there = [t for t in given if t is not None]
        return [t.data_ptr() for t in there], list(torch.autograd.grad(y.sum(), [*there, a, b]))

    _, wanted = gradients(False)
    places, found = gradients(True)
    assert [one.data_ptr() for one in found[: len(places)]] == places
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("joint", [False, True])
def test_finite_differences(activation: Activation, joint: bool, monkeypatch: Any) -> None:
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    given = [
        t if t is None else t.detach().double().cpu().requires_grad_()
        for t in gate_and_up((3, 4), joint, torch.float32)
    ]
    a, b = torch.randn(2, 4).double().requires_grad_(), torch.randn(5, 2).double().requires_grad_()
    weight = torch.randn(5, 4).double()

    def op(gate: Any, up: Any, a: Any, b: Any) -> torch.Tensor:
        projection = Projection(weight, None, a, b, 0.5)
        return glu_lora_linear(gate, up, activation, projection, torch.float64)

    assert torch.autograd.gradcheck(op, (*given, a, b))
    assert torch.autograd.gradcheck(lambda gate, up: glu(gate, up, activation), tuple(given))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_on_a_gpu(activation: Activation) -> None:
    given = gate_and_up((257, 1030), False, torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in given]
    assert_errs_no_more(
        with_gradients(glu(*given, activation), given),
        with_gradients(plain(*given, activation), given),
        with_gradients(plain(*wide, activation), wide),
    )


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"glu: gate \(2, 3\) and up \(2, 4\) do not fit"):
        glu(torch.randn(2, 3), torch.randn(2, 4), "silu")
    with pytest.raises(ValueError, match=r"glu: gate \(2, 3\) and up None"):
        glu(torch.randn(2, 3), None, "silu")
