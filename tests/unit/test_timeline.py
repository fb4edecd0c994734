"""What benchmarks/timeline.py makes of a profile."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from scripts import script


@pytest.fixture(scope="module")
def timeline() -> ModuleType:
    return script("timeline")


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void pytorch_flash::flash_bwd_kernel<...>", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "products"),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantize"),
        ("_dequantize", "dequantize"),
        ("_rms_layernorm_backward", "norms"),
        ("_chunked_cross_entropy_forward", "loss"),
        ("_rope_embedding", "rotary"),
        ("_fg_kernel_swiglu", "activation"),
        ("kOptimizerStatic8bit2StateBlockwise", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "other"),
        ("void at::native::unrolled_elementwise_kernel<copy_kernel(at::TensorIterator&)::{lambda(int)#3}>", "other"),
        ("kernel<op(TensorIterator&)::{lambda()#1}::operator()() const::{lambda(float)#1}>", "other"),
        ("multi_lamb_stage1", "optimizer"),
        ("cuda_lamb_kernel<float>", "optimizer"),
    ],
)  # fmt: skip
def test_a_kernel_has_a_kind(timeline: ModuleType, kernel: str, kind: str) -> None:
    assert timeline.kind_of(kernel) == kind


def test_what_overlaps_counts_once_and_copies_only_where_nothing_else_runs(timeline: Any) -> None:
    ms = 1_000_000
    spans = [
        timeline.Span(0, 10 * ms, "nvjet_a"),
        timeline.Span(5 * ms, 12 * ms, "Memcpy HtoD"),  # 2 ms of it alone
        timeline.Span(6 * ms, 8 * ms, "_dequantize"),  # beside the product
        timeline.Span(16 * ms, 20 * ms, "nvjet_a"),  # after 4 ms of nothing
    ]
    found = timeline.summary(spans, 2)
    assert found["computes_ms"] == 7
    assert found["only_copies_ms"] == 1
    assert found["idle_ms"] == 2
    assert found["launches"] == 2
    assert found["kinds_ms"] == {"products": 7, "copies": 3.5, "dequantize": 1}
    assert next(iter(found["kernels_ms"])) == "nvjet_a"
    assert timeline.summary([], 2) == {}


def test_arms_stand_side_by_side(timeline: ModuleType) -> None:
    console = Console(width=120, record=True)
    console.print(
        timeline.table([
            {"arm": "peft", "wall_ms": 10.0, "host_ms": 9.0, "kinds_ms": {"products": 6.0}},
            {"arm": "unsloth", "wall_ms": 1234.5},
        ])
    )  # fmt: skip
    text = console.export_text()
    assert "1,234.5" in text
    assert "products" in text
    assert "launches" not in text
    assert "NOT recorded" not in text


def test_an_arm_that_was_not_recorded_is_not_shown_as_one(timeline: ModuleType) -> None:
    console = Console(width=120, record=True)
    arm = {"arm": "peft+fastlora+record", "wall_ms": 10.0, "not_recorded": "it waits for the GPU"}
    console.print(timeline.table([arm]))
    assert "peft+fastlora+record (NOT recorded)" in console.export_text()
