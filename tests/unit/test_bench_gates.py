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


def test_the_rows_that_were_asked_for_pass() -> None:
    assert gates.gate_work(RESULT, "aa", "bb").passed


def test_other_rows_and_another_order_are_told() -> None:
    other = gates.gate_work({**RESULT, "digest": "cc", "order": "cc"}, "aa", "bb")
    assert not other.passed
    assert "fed other rows than were asked for" in other.detail
    order = gates.gate_work({**RESULT, "order": "cc"}, "aa", "bb")
    assert not order.passed
    assert "another order" in order.detail


@pytest.mark.parametrize(
    ("losses", "after", "passed"),
    [
        ([5.0, 6.0, 7.0], 4.9, True),  # other rows may be harder
        ([5.0, 4.0, 3.0], 5.0, False),
        ([5.0, 4.0, 3.0], 4.999, False),  # falls by less than is asked
        ([5.0, math.nan, 3.0], 4.0, False),
        ([5.0, math.inf, 3.0], 4.0, False),
        ([5.0, 4.0, 3.0], math.nan, False),
    ],
)
def test_the_loss_must_be_finite_and_fall_on_the_same_rows(
    losses: list[float], after: float, passed: bool
) -> None:
    assert gates.gate_loss(losses, after).passed is passed


def test_every_tensor_needs_a_gradient_and_a_change() -> None:
    assert gates.gate_gradients(RESULT).passed
    assert gates.gate_weights(RESULT).passed
    gate = gates.gate_gradients({**RESULT, "zero_gradients": ["layers.0.q_proj.lora_A"]})
    assert not gate.passed
    assert gate.detail == "1 of 3 adapter tensors have no gradient, such as layers.0.q_proj.lora_A"
    assert not gates.gate_weights({**RESULT, "unchanged": ["x"]}).passed
    assert not gates.gate_weights({**RESULT, "adapter_tensors": 0}).passed


def test_the_driver_must_count_no_more_than_the_cap() -> None:
    assert gates.gate_memory(5.999, 6.0).passed
    gate = gates.gate_memory(6.013, 6.0)
    assert not gate.passed
    assert gate.detail.startswith("6.013 GiB in use at the peak")


def gradients(*, noise: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two tensors, with relative noise."""
    exact = {name: torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) for name in "ab"}
    draw = torch.Generator().manual_seed(seed)
    found = {
        name: value + noise * value.norm() / 128**0.5 * torch.randn(16, 8, generator=draw)
        for name, value in exact.items()
    }
    return {**found, "loss": torch.tensor(5.0 * (1 + noise / 100))}


def test_parity_allows_twice_the_error_of_plain_peft() -> None:
    exact, plain = gradients(noise=0), gradients(noise=0.01)
    assert gates.gate_parity(plain, plain, exact).passed
    assert gates.gate_parity(gradients(noise=0.015, seed=2), plain, exact).passed
    gate = gates.gate_parity(gradients(noise=0.04, seed=2), plain, exact)
    assert not gate.passed
    assert gate.detail.startswith("2 of 3 are wrong")


@pytest.mark.parametrize("fault", ["scaled", "sign", "nan", "zero", "missing", "extra", "loss"])
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
    elif fault == "loss":
        wrong["loss"] = wrong["loss"] * 1.01
    elif fault == "missing":
        del wrong["b"]
    else:
        wrong["c"] = wrong["b"]
    assert not gates.gate_parity(wrong, plain, exact).passed


def test_a_yardstick_that_measures_nothing_is_red() -> None:
    exact = gradients(noise=0)
    coarse = gates.gate_parity(exact, gradients(noise=0.5), exact)
    assert not coarse.passed
    assert "nothing to measure by" in coarse.detail
    assert not gates.gate_parity({}, {}, {}).passed
    only_loss = {"loss": torch.tensor(1.0)}
    assert not gates.gate_parity(only_loss, only_loss, only_loss).passed


@pytest.mark.parametrize(
    "fault", ["none", "noise", "sign", "half", "tenth", "zero", "nan", "missing"]
)
def test_depth_sees_a_wrong_layer(fault: str) -> None:
    first = gradients(noise=0)
    found = {**gradients(noise=0.1), "a": first["a"]}
    value = found["b"]
    changed = {
        "none": value,
        "noise": torch.randn(16, 8) * value.std(),
        "sign": -value,
        "half": value / 2,
        "tenth": value / 10,
        "zero": value * 0,
        "nan": value * math.nan,
    }
    if fault == "missing":
        del found["b"]
    else:
        found["b"] = changed[fault]
    gate = gates.gate_depth(found, first)
    assert gate.passed is (fault == "none"), gate.detail


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
