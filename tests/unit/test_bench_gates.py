"""Each gate passes what is right and goes red on the fault that it is there for."""

from __future__ import annotations

import math

import pytest
import torch

from fastlora.bench import gates

RESULT = {
    "digest": "aa", "order": "bb", "step_tokens": [10, 10], "step_supervised": [9, 9],
    "adapter_tensors": 3, "zero_gradients": [], "unchanged": [],
}  # fmt: skip


def test_the_same_rows_in_the_same_order_pass() -> None:
    assert gates.gate_work(RESULT, dict(RESULT), same_order=True).passed


def test_other_rows_are_told() -> None:
    gate = gates.gate_work({**RESULT, "digest": "cc", "order": "cc"}, RESULT, same_order=False)
    assert not gate.passed
    assert "fed other rows" in gate.detail


def test_another_order_counts_only_where_the_order_must_be_the_same() -> None:
    other = {**RESULT, "order": "cc"}
    assert not gates.gate_work(other, RESULT, same_order=True).passed
    assert gates.gate_work(other, RESULT, same_order=False).passed


@pytest.mark.parametrize(
    ("losses", "passed"),
    [
        ([5.0, 4.8, 4.5, 4.2, 4.0, 3.9], True),
        ([5.0] * 6, False),
        ([5.0, 5.1, 5.2, 5.3, 5.4, 5.5], False),
        ([5.0, 4.0, math.nan, 3.0, 2.0, 1.0], False),
        ([5.0, 4.0, math.inf, 3.0, 2.0, 1.0], False),
        ([5.0, 5.0, 5.0, 5.0, 5.0, 4.99], False),  # falls by less than is asked
    ],
)
def test_the_loss_must_be_finite_and_fall(losses: list[float], passed: bool) -> None:
    assert gates.gate_loss(losses).passed is passed


def test_every_tensor_needs_a_gradient_and_a_change() -> None:
    assert gates.gate_gradients(RESULT).passed
    assert gates.gate_weights(RESULT).passed
    gate = gates.gate_gradients({**RESULT, "zero_gradients": ["layers.0.q_proj.lora_A"]})
    assert not gate.passed
    assert gate.detail == "1 of 3 adapter tensors have no gradient, such as layers.0.q_proj.lora_A"
    assert not gates.gate_weights({**RESULT, "unchanged": ["x"]}).passed
    assert not gates.gate_weights({**RESULT, "adapter_tensors": 0}).passed


def gradients(*, noise: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two tensors, with relative noise."""
    exact = {name: torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) for name in "ab"}
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value + noise * value.norm() / 128**0.5 * torch.randn(16, 8, generator=draw)
        for name, value in exact.items()
    }


def test_parity_allows_twice_the_error_of_plain_peft() -> None:
    exact, plain = gradients(noise=0), gradients(noise=0.01)
    assert gates.gate_parity(plain, plain, exact).passed
    assert gates.gate_parity(gradients(noise=0.015, seed=2), plain, exact).passed
    gate = gates.gate_parity(gradients(noise=0.04, seed=2), plain, exact)
    assert not gate.passed
    assert gate.detail.startswith("2 of 2 gradients are wrong")


@pytest.mark.parametrize("fault", ["scaled", "sign", "nan", "zero", "missing", "extra"])
def test_parity_sees_one_wrong_tensor(fault: str) -> None:
    exact, plain = gradients(noise=0), gradients(noise=0.01)
    wrong = dict(plain)
    if fault == "scaled":
        wrong["b"] = wrong["b"] * 1.05
    elif fault == "sign":
        wrong["b"] = -wrong["b"]
    elif fault == "nan":
        wrong["b"] = wrong["b"].clone().index_fill_(0, torch.tensor([0]), math.nan)
    elif fault == "zero":
        wrong["b"] = torch.zeros_like(wrong["b"])
    elif fault == "missing":
        del wrong["b"]
    else:
        wrong["c"] = wrong["b"]
    assert not gates.gate_parity(wrong, plain, exact).passed


def test_parity_in_float32_asks_for_float32() -> None:
    exact = gradients(noise=0)
    assert gates.gate_parity(gradients(noise=1e-7), exact, exact).passed
    assert not gates.gate_parity(gradients(noise=1e-3), exact, exact).passed


def test_a_trajectory_stays_within_the_band_at_every_step() -> None:
    first = [5.0, 4.0, 3.0]
    assert gates.gate_trajectory([5.01, 4.03, 2.98], first).passed
    gate = gates.gate_trajectory([5.0, 4.1, 3.0], first)
    assert not gate.passed
    assert "(step 2)" in gate.detail
    assert not gates.gate_trajectory([5.0, math.nan, 3.0], first).passed
