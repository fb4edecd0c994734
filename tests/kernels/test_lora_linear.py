from __future__ import annotations

import pytest
import torch
from fastlora_kernels.dispatch import choose_backend
from fastlora_kernels.ops.lora_linear import lora_linear


def inputs(
    tokens: tuple[int, ...], k: int, n: int, r: int, bias: bool, dtype: torch.dtype
) -> tuple[torch.Tensor | None, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(*tokens, k, dtype=dtype, requires_grad=True),
        torch.randn(n, k, dtype=dtype),
        torch.randn(n, dtype=dtype) if bias else None,
        torch.randn(r, k, dtype=dtype, requires_grad=True),
        torch.randn(n, r, dtype=dtype, requires_grad=True),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "k", "n", "r"), [((5,), 7, 3, 2), ((2, 3), 4, 9, 16), ((1,), 1, 1, 1)]
)
def test_output_and_every_gradient(
    tokens: tuple[int, ...], k: int, n: int, r: int, bias: bool
) -> None:
    x, weight, b, lora_a, lora_b = inputs(tokens, k, n, r, bias, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *given: lora_linear(given[0], weight, b, given[1], given[2], 0.5),
        (x, lora_a, lora_b),
    )
    plain = torch.nn.functional.linear(x, weight, b) + 0.5 * (x @ lora_a.T) @ lora_b.T
    torch.testing.assert_close(lora_linear(x, weight, b, lora_a, lora_b, 0.5), plain)


def test_gradients_come_back_in_the_adapters_dtype() -> None:
    x, weight, _, _, _ = inputs((4,), 8, 6, 2, False, torch.bfloat16)
    lora_a = torch.randn(2, 8, requires_grad=True)
    lora_b = torch.randn(6, 2, requires_grad=True)
    y = lora_linear(x, weight, None, lora_a, lora_b, 1.0)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert lora_a.grad.dtype == lora_b.grad.dtype == torch.float32


def test_shapes_that_do_not_fit_are_named() -> None:
    x, weight, _, lora_a, _ = inputs((4,), 8, 6, 2, False, torch.float32)
    with pytest.raises(ValueError, match=r"lora_b \(5, 2\)"):
        lora_linear(x, weight, None, lora_a, torch.randn(5, 2), 1.0)


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("FASTLORA_KERNELS", raising=False)
    assert choose_backend(cpu, ("triton", "reference")) == "reference"
    monkeypatch.setenv("FASTLORA_KERNELS", "interpret")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 too"):
        choose_backend(cpu, ("interpret", "reference"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend(cpu, ("interpret", "reference")) == "interpret"
    with pytest.raises(ValueError, match="it has reference"):
        choose_backend(cpu, ("reference",))
    monkeypatch.setenv("FASTLORA_KERNELS", "triton")
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_backend(cpu, ("triton", "reference"))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x, weight, _, lora_a, lora_b = inputs((4,), 8, 6, 2, False, torch.float32)
    y = lora_linear(x, weight, None, lora_a, lora_b, 1.0)
    (gradient,) = torch.autograd.grad(y.square().sum(), lora_b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
