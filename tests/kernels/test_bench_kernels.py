from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fastlora_kernels.layers.linear
import pytest
import torch
from click.testing import CliRunner, Result
from fastlora_kernels.ops.lora_linear import lora_linear

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script
    spec = importlib.util.spec_from_file_location("bench_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert str(SCRIPT.parent) not in sys.path  # there it would be the module `kernels`
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))  # on a GPU machine too
    return module


def run(bench: ModuleType, *arguments: str) -> Result:
    return CliRunner().invoke(bench.main, ["--repeats", "5", *arguments])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_sane(bench: ModuleType, dtype: str, tmp_path: Path) -> None:
    target = tmp_path / "ops.json"
    sizes = ["--shapes", "64x128,96x64", "--tokens", "16,33", "--ranks", "4"]
    result = run(bench, *sizes, "--dtype", dtype, "--json", str(target))
    assert result.exit_code == 0, result.output
    assert "left to PEFT: 4-bit weight on a CPU" in result.output

    document = json.loads(target.read_text())
    assert document.keys() >= {"date", "commit", "versions", "machine", "dtype", "repeats"}
    rows: list[dict[str, Any]] = document["rows"]
    assert [(row["base"], row["k"], row["n"], row["tokens"]) for row in rows] == [
        (base, k, n, tokens)
        for _ in ("lora_linear", "dora_linear", "lora_qkv", "lora_qv", "lora_mlp")
        for base in ("dense", "nf4")
        for k, n in ((64, 128), (96, 64))
        for tokens in (16, 33)
    ]
    for row in rows:
        arms = ["floor", "peft"] + ["ours"] * (row["base"] == "dense")
        assert [arm for arm in ("floor", "peft", "ours") if arm in row] == arms
        assert row["status"] == ("ok" if "ours" in arms else "left")
        for arm in arms:
            times = [row[arm][p] for p in ("p20", "p50", "p80")]
            assert 0 < times[0] <= times[1] <= times[2]
            work = row["floor_flops" if arm == "floor" else "flops"]
            assert row[arm]["tflops"] == pytest.approx(work / (times[1] * 1e-3) / 1e12)
        if "ours" in arms:
            ours = row["ours"]
            assert ours["over_peft"] == pytest.approx(ours["p50"] / row["peft"]["p50"])
            assert ours["over_floor"] == pytest.approx(ours["p50"] / row["floor"]["p50"])
            assert ours["gb_s"] == pytest.approx(row["bytes"] / (ours["p50"] * 1e-3) / 1e9)


def test_work_by_hand(bench: ModuleType) -> None:
    """4 inputs, 6 outputs, 10 tokens, rank 2."""
    size = bench.Size(k=4, n=6, tokens=10, rank=2)
    base = 10 * 4 * 6 + 10 * 6 * 4  # multiply-adds of x W^T and g W
    lora = 10 * 4 * 2 + 10 * 2 * 6  # x A^T, (x A^T) B^T
    lora += 10 * 6 * 2 + 10 * 2 * 4  # g B, (g B) A
    lora += 2 * 10 * 4 + 6 * 10 * 2  # dA, dB
    x, y, w, adapter = 10 * 4 * 2, 10 * 6 * 2, 4 * 6 * 2, (2 * 4 + 6 * 2) * 4
    forward = x + w + adapter + y
    backward = y + x + w + adapter + x + adapter
    assert bench.linear_work(size, torch.bfloat16, "dense") == (
        2 * (base + lora), 2 * base, forward + backward,
    )  # fmt: skip


def test_nf4_is_counted_as_bitsandbytes_stores_it(bench: ModuleType) -> None:
    size = bench.Size(k=256, n=256, tokens=1, rank=1)
    *_, dense = bench.linear_work(size, torch.bfloat16, "dense")
    *_, nf4 = bench.linear_work(size, torch.bfloat16, "nf4")
    weight = bench.linear_layer(size, torch.bfloat16, "nf4").base_layer.weight
    state = weight.quant_state
    stored = weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert (dense - nf4) / 2 == 256 * 256 * 2 - stored


@pytest.mark.parametrize("factor", [1.02, math.nan])
def test_a_wrong_op_gets_no_speed(
    bench: ModuleType, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: torch.Tensor, *projection: Any) -> torch.Tensor:
        weight, bias, a, b, scaling, *rest = projection
        return lora_linear(x, weight, bias, a, b, scaling * factor, *rest)

    monkeypatch.setattr(fastlora_kernels.layers.linear, "lora_linear", wrong)
    target = tmp_path / "ops.json"
    sizes = ["--shapes", "64x128", "--tokens", "64", "--ranks", "4"]
    result = run(bench, *sizes, "--json", str(target))
    assert result.exit_code == 3
    assert "WRONG" in result.output
    dense, nf4, *_ = json.loads(target.read_text())["rows"]
    assert dense["status"] == "wrong"
    assert not {"floor", "peft", "ours"} & dense.keys()
    assert nf4["status"] == "left"
    assert str(bench.table([dense], "bfloat16").rows[0].style) == "red"


@pytest.mark.parametrize("arguments", [("--shapes", "64"), ("--ranks", "0"), ("--tokens", "a,b")])
def test_usage(bench: ModuleType, arguments: tuple[str, str]) -> None:
    result = run(bench, *arguments)
    assert result.exit_code == 2
    assert "is not a list like" in result.output
