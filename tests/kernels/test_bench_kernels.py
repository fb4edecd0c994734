from __future__ import annotations

import json
import math
import sys
import time
import tomllib
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import fastlora_kernels.layers.linear
import pytest
import torch
from click.testing import CliRunner, Result
from fastlora_kernels.ops.lora_linear import lora_linear
from reruns import Recorders, Reruns
from scripts import script

from fastlora.train import graphs

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script
    module = script("kernels")
    assert str(SCRIPT.parent) not in sys.path  # there it would be the module `kernels`
    # On a GPU machine too.
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(graphs, "can_record", lambda: False)
    return module


@pytest.fixture
def modules(bench: ModuleType) -> ModuleType:
    assert bench.cases.Module.__module__ == "opbench.modules"
    return sys.modules["opbench.modules"]


def run(bench: ModuleType, *arguments: str) -> Result:
    return CliRunner().invoke(bench.main, ["--repeats", "5", *arguments])


def rows_of(target: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"]
    return rows


def setting_of(bench: ModuleType, tokens: int, rank: int) -> Any:
    return bench.Setting(tokens, rank, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_sane(bench: ModuleType, dtype: str, tmp_path: Path) -> None:
    target = tmp_path / "ops.json"
    sizes = ["--shapes", "96x64", "--tokens", "16,33", "--ranks", "4"]
    result = run(bench, *sizes, "--dtype", dtype, "--json", str(target))
    assert result.exit_code == 0, result.output
    assert "left: 4-bit weight on a CPU (10: lora_linear 96x64 nf4 T16 r4)" in result.output

    document = json.loads(target.read_text())
    assert document.keys() >= {"date", "commit", "versions", "machine", "dtype", "repeats"}
    rows: list[dict[str, Any]] = document["rows"]
    both = ("lora_linear", "dora_linear", "lora_qkv", "lora_qv", "lora_mlp")
    kinds = [(op, base) for op in both for base in ("dense", "nf4")]
    kinds += [(op, "dense") for op in ("lora_head", "lora_embedding")]
    assert document["modules"] == len(rows) == 2 * len(kinds)
    counts = Counter((row["op"], row["base"], row["tokens"]) for row in rows)
    assert counts == {(*kind, tokens): 1 for kind in kinds for tokens in (16, 33)}
    for row in rows:
        arms = ["floor", "peft"] + ["ours"] * (row["base"] == "dense")
        assert [arm for arm in ("floor", "peft", "ours") if arm in row] == arms
        assert row["status"] == ("ok" if "ours" in arms else "left")
        assert "recorded" not in row  # on a CPU
        for arm in arms:
            times = [row[arm][p] for p in ("p20", "p50", "p80")]
            assert 0 < times[0] <= times[1] <= times[2]
            work = row["floor_flops" if arm == "floor" else "flops"]
            assert row[arm]["tflops"] == pytest.approx(work / (times[1] * 1e-3) / 1e12)
        if "ours" in arms:
            ours = row["ours"]
            assert ours["over_peft"] == pytest.approx(ours["p50"] / row["peft"]["p50"])
            assert ours["over_floor"] == pytest.approx(ours["p50"] / row["floor"]["p50"])
            moved = row["least_bytes"] / (ours["p50"] * 1e-3) / 1e9
            assert ours["gb_s"] == pytest.approx(moved)


def test_compiled(bench: ModuleType, tmp_path: Path) -> None:
    """Both arms of every row, however many rows."""
    from torch._dynamo.utils import counters

    graphs_before = counters["stats"]["unique_graphs"]
    target = tmp_path / "ops.json"
    sizes = ["--shapes", "64x64", "--tokens", "8,16,24,32,40", "--ranks", "2", "--dtype", "float32"]
    only = ["--only", "linear lora_linear 64x64 dense"]
    result = run(bench, *sizes, *only, "--compiled", "--seconds", "0", "--json", str(target))
    assert result.exit_code == 0, result.output
    assert json.loads(target.read_text())["compiled"] is True
    rows = rows_of(target)
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert counters["stats"]["unique_graphs"] - graphs_before >= 2 * len(rows)


def test_what_unsloth_compiles_is_of_the_pinned_layers(bench: ModuleType) -> None:
    names = [case.name for case in bench.cases.compiled(bench.cases.pinned())]
    assert set(names) < {case.name for case in bench.cases.pinned()}
    assert {name.partition(" lora")[0] for name in names} == {
        "fused projections", "other architectures",
    }  # fmt: skip
    groups = [case.group for case in bench.cases.compiled(bench.cases.of_shapes([[8, 8]]))]
    assert {*groups} == {"linear", "DoRA", "q, k, v", "q and v alone", "gated MLP"}


def test_recorded_as_training_does(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of times; the stand-in for the GPU's recorder also finds whatever waits."""
    recorders = Recorders(monkeypatch)
    sizes = ["--shapes", "64x128", "--tokens", "33", "--ranks", "4"]
    result = run(bench, *sizes, "--json", str(tmp_path / "ops.json"))
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "ops.json")
    for row in rows:
        assert row["recorded"].keys() == row.keys() & {"floor", "peft", "ours"}
        for arm, figures in row["recorded"].items():
            assert 0 < figures["p20"] <= figures["p50"] <= figures["p80"]
            assert figures != row[arm]
    made = recorders.last
    assert made.forgotten == len(rows)
    assert made.warm_ups[:2] == [False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_on_a_gpu(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of both kinds and peaks; what of PEFT cannot be recorded must say so."""
    monkeypatch.undo()
    monkeypatch.setattr(bench, "DEVICE", torch.device("cuda"))
    sizes = [
        "--shapes",
        "2048x2048",
        "--tokens",
        "512",
        "--ranks",
        "8",
    ]  # smaller ones take many sets
    result = run(bench, *sizes, "--json", str(tmp_path / "ops.json"))
    assert result.exit_code == 0, result.output
    for row in rows_of(tmp_path / "ops.json"):
        assert row["status"] == "ok", row
        recorded = row["recorded"]
        assert recorded["peft"].get("p50") or recorded["peft"]["why_not"]
        for arm in ("floor", "ours"):
            assert recorded[arm].get("p50", 0) > 0, recorded
        assert min(row[arm]["peak_mib"] for arm in ("floor", "peft", "ours")) > 0, row


def test_an_arm_that_waits_is_not_recorded(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = Recorders(monkeypatch)
    plain = fastlora_kernels.layers.linear.lora_linear

    def waits(x: torch.Tensor, *projection: Any) -> torch.Tensor:
        assert x.sum().item() != math.inf
        return plain(x, *projection)

    monkeypatch.setattr(fastlora_kernels.layers.linear, "lora_linear", waits)
    target = tmp_path / "ops.json"
    sizes = ["--shapes", "64x128", "--tokens", "33", "--ranks", "4"]
    result = run(bench, *sizes, "--only", "linear lora", "--json", str(target))
    assert result.exit_code == 0, result.output
    row, *_ = rows_of(target)
    assert "it waits" in row["recorded"]["ours"]["why_not"]
    assert row["ours"]["p50"] > 0
    assert row["recorded"]["peft"]["p50"] > 0
    assert recorders.last.records == 4  # floor and PEFT, dense and nf4
    assert "ours not recorded: it waits" in result.output


def test_a_graph_that_breaks_off_ends_the_recording_alone(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = Recorders(monkeypatch, fail={1: RuntimeError("operation not permitted\nmore")})
    target = tmp_path / "ops.json"
    sizes = ["--shapes", "64x128", "--tokens", "16", "--ranks", "4"]
    result = run(bench, *sizes, "--only", "embedding,head", "--json", str(target))
    assert result.exit_code == 0, result.output
    first, second = rows_of(target)
    assert first["recorded"]["floor"]["p50"] > 0
    assert first["recorded"]["peft"] == {"why_not": "RuntimeError: operation not permitted"}
    for arm in (first["recorded"]["ours"], *second["recorded"].values()):
        assert arm["why_not"].startswith("an earlier graph broke off")
    assert second["ours"]["p50"] > 0
    assert recorders.last.records == 2


def test_a_replay_is_shared_among_its_calls(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    arms = {"ours": [lambda: calls.append("first"), lambda: calls.append("second")]}

    def timed(given: Any, *_: Any) -> dict[str, list[float]]:
        calls.clear()
        for (replay,) in given.values():
            replay()
        return {"ours": [10.0, 20.0]}

    monkeypatch.setattr(bench.timing, "timed", timed)
    found = bench.timing.Replays(Reruns()).times(arms, 5, 1.0, torch.device("cpu"))
    assert calls == ["first", "second"]
    assert found == {"ours": [5.0, 10.0]}


def test_repeats_end_with_the_seconds(bench: ModuleType) -> None:
    counts: Counter[str] = Counter()

    def call(name: str) -> None:
        counts[name] += 1
        time.sleep(0.004)

    arms = {"peft": [partial(call, "peft")], "ours": [partial(call, "1"), partial(call, "2")]}
    times = bench.timing.timed(arms, 100, 0.01, torch.device("cpu"))
    assert {arm: len(each) for arm, each in times.items()} == {"peft": 5, "ours": 5}
    assert counts == {"peft": 8, "1": 4, "2": 4}  # three to warm up
    assert min(times["ours"]) >= 4
    assert len(bench.timing.timed(arms, 2, 0.01, torch.device("cpu"))["ours"]) == 2


def test_budget_and_only(bench: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "ops.json"
    sizes = ["--shapes", "64x128", "--tokens", "16", "--ranks", "4", "--json", str(target)]
    result = run(bench, *sizes, "--only", "EMBEDDING, dora", "--budget", "0.001")
    assert result.exit_code == 0, result.output
    measured, *rest = rows_of(target)
    assert measured["ours"]["p50"] > 0
    assert {row["status"] for row in rest} == {"left out"}
    assert {row["op"] for row in (measured, *rest)} == {"dora_linear", "lora_embedding"}
    result = run(bench, "--only", "nothing", "--shapes", "64x128")
    assert result.exit_code == 2
    assert "head and loss" in result.output


def test_no_room_is_a_row(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench, "measure", no_room)
    target = tmp_path / "ops.json"
    sizes = ["--shapes", "64x128", "--tokens", "16", "--ranks", "4"]
    result = run(bench, *sizes, "--only", "embedding", "--json", str(target))
    assert result.exit_code == 0, result.output
    assert [(row["status"], row["reason"]) for row in rows_of(target)] == [
        ("no room", "out of memory")
    ]


def suite(name: str) -> dict[str, Any]:
    path = SCRIPT.parent / "suites" / f"{name}.toml"
    shape: dict[str, Any] = tomllib.loads(path.read_text())["shape"]
    return shape


@pytest.mark.parametrize(
    ("model", "name"),
    [("Llama 3.1 8B", "llama31-8b"), ("Qwen2.5 7B", "qwen25-7b"), ("Phi 4", "phi4"), ("Gemma 3 4B", "gemma3-4b")],
)  # fmt: skip
def test_pinned_layers_are_those_of_the_suites(bench: ModuleType, model: str, name: str) -> None:
    shape = suite(name)
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    each = shape.get("head_dim", hidden // heads)
    known = {
        "q_proj": (hidden, heads * each), "k_proj": (hidden, kv * each), "v_proj": (hidden, kv * each),
        "o_proj": (heads * each, hidden), "qkv_proj": (hidden, (heads + 2 * kv) * each),
        "gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden),
        "gate_up_proj": (hidden, 2 * wide),
    }  # fmt: skip
    modules = [module for _, module in bench.cases.PINNED if module.model == model]
    assert modules
    for module in modules:
        for layer, widths in module.layers.items():
            if layer == "proj":
                assert widths in known.values()
            else:
                assert widths == known[layer]
    ends = [case for case in bench.cases.pinned() if case.op in ("lora_head", "lora_embedding")]
    if model == "Llama 3.1 8B":
        words = shape["vocab_size"]
        assert [case.shape for case in ends] == [f"{hidden}x{words}", f"{words}x{hidden}"]


def test_every_target_has_pinned_cases(bench: ModuleType) -> None:
    found = {(case.group, case.base) for case in bench.cases.pinned()}
    for target in bench.summary.TARGETS:
        assert {group for group, base in found if target.base in (None, base)} >= {*target.groups}


def row_of(group: str, times: tuple[float, float, float], **more: Any) -> dict[str, Any]:
    """Times of floor, PEFT and ours; recorded ones twice as fast, PEFT's not."""
    arms = dict(zip(("floor", "peft", "ours"), times, strict=True))
    row: dict[str, Any] = {arm: {"p50": ms, "peak_mib": 10 * ms} for arm, ms in arms.items()}
    row["recorded"] = {arm: {"p50": ms / (1 if arm == "peft" else 2)} for arm, ms in arms.items()}
    row |= {"group": group, "op": "op", "model": "M", "shape": "1x2", "base": "dense"}
    return row | {"tokens": 8, "rank": 4} | more


def test_targets_by_hand(bench: ModuleType) -> None:
    rows = [row_of("DoRA", (1, 4, 2)), row_of("DoRA", (1, 1, 2), rank=16)]
    (line,) = bench.summary.targets(rows)
    assert line == (
        "DoRA, PEFT / ours, geometric mean at least 1.8: eager 1.000 MISSED by 44.4%, 2 of 2 cases; "
        "recorded 2.000 met, 2 of 2 cases"
    )
    linear = [
        row_of("linear", (10, 12, ours), base="nf4", rank=r) for r, ours in ((1, 11), (2, 12))
    ]
    linear.append({k: v for k, v in linear[0].items() if k not in ("ours", "recorded")})
    linear.append(row_of("linear", (1, 1, 9)))  # a dense one
    (line,) = bench.summary.targets(linear)
    assert "eager 1.200 MISSED by 4.3% (M op 1x2 nf4 T8 r2), 2 of 3 cases; recorded" in line
    head = [row_of("head and loss", (1, 10, 2))]
    time_line, peak_line = bench.summary.targets(head)
    assert "eager 5.000 met" in time_line
    assert "peak ours / PEFT, worst case at most 0.25: 0.200 met" in peak_line
    assert bench.summary.targets([row_of("DoRA", (1, 4, 2), model="")]) == []


def test_summary_by_hand(bench: ModuleType) -> None:
    rows = [row_of("DoRA", (1, 4, 2)), row_of("DoRA", (1, 1, 2), rank=16)]
    shown = bench.summary.table(rows)
    cells = [[*column.cells] for column in shown.columns]
    assert [cell for (cell,) in cells] == [
        "DoRA", "dense", "2 of 2", "1.00 (0.50)", "2.00 (1.00)", "2.00 (2.00)", "2.00 (2.00)", "1.00 (2.00)",
        "M op 1x2 dense T8 r16",
    ]  # fmt: skip


def test_work_by_hand(bench: ModuleType, modules: ModuleType) -> None:
    """4 inputs, 6 outputs, 10 tokens, rank 2."""
    base = 10 * 4 * 6 + 10 * 6 * 4  # multiply-adds of x W^T and g W
    lora = 10 * 4 * 2 + 10 * 2 * 6  # x A^T, (x A^T) B^T
    lora += 10 * 6 * 2 + 10 * 2 * 4  # g B, (g B) A
    lora += 2 * 10 * 4 + 6 * 10 * 2  # dA, dB
    x, y, w, adapter = 10 * 4 * 2, 10 * 6 * 2, 4 * 6 * 2, (2 * 4 + 6 * 2) * 4
    forward = x + w + adapter + y
    backward = y + x + w + adapter + x + adapter
    assert modules.linear_work(4, 6, "dense", setting_of(bench, 10, 2)) == (
        2 * (base + lora), 2 * base, forward + backward,
    )  # fmt: skip


def test_work_of_several_layers(bench: ModuleType, modules: ModuleType) -> None:
    """x is read twice and dx written once for both; the one without an adapter has its products alone."""
    setting = setting_of(bench, 10, 2)
    module = modules.Module("op", "", {"q_proj": (4, 6), "k_proj": (4, 2)}, bare=("k_proj",))
    q = modules.linear_work(4, 6, "dense", setting)
    found = modules.module_work(module, "dense", setting)
    k_flops, k_bytes = 4 * 10 * 4 * 2, 2 * 10 * 2 * 2 + 2 * 4 * 2 * 2
    assert found == (q.flops + k_flops, q.floor_flops + k_flops, q.least_bytes + k_bytes)


def test_nf4_is_counted_as_bitsandbytes_stores_it(bench: ModuleType, modules: ModuleType) -> None:
    setting = setting_of(bench, 1, 1)
    *_, dense = modules.linear_work(256, 256, "dense", setting)
    *_, nf4 = modules.linear_work(256, 256, "nf4", setting)
    weight = modules.linear_base(256, 256, "nf4", setting, None).weight
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
    sizes = ["--shapes", "64x128", "--tokens", "64", "--ranks", "4", "--only", "linear lora"]
    result = run(bench, *sizes, "--json", str(target))
    assert result.exit_code == 3
    assert "WRONG" in result.output
    dense, nf4 = rows_of(target)
    assert dense["status"] == "wrong"
    assert not {"floor", "peft", "ours"} & dense.keys()
    assert nf4["status"] == "left"
    assert str(bench.table([dense], "bfloat16").rows[0].style) == "red"


@pytest.mark.parametrize("arguments", [("--shapes", "64"), ("--ranks", "0"), ("--tokens", "a,b")])
def test_usage(bench: ModuleType, arguments: tuple[str, str]) -> None:
    result = run(bench, *arguments)
    assert result.exit_code == 2
    assert "is not a list like" in result.output
