from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import fastlora_kernels.ops.head_loss
import pytest
import torch
from click.testing import CliRunner, Result
from fastlora_kernels.ops.head_loss import lora_head_loss
from scripts import script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ops_head.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script
    module = script("ops_head")
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))  # on a GPU machine too
    return module


def run(bench: ModuleType, *arguments: str) -> Result:
    sizes = ["--vocabulary", "203", "--hidden", "32", "--tokens", "50", "--repeats", "2"]
    return CliRunner().invoke(bench.main, [*sizes, *arguments])


def test_rows(bench: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "head.json"
    result = run(bench, "--ranks", "0,4", "--labelled", "1,0.5", "--json", str(target))
    assert result.exit_code == 0, result.output
    rows = json.loads(target.read_text())["rows"]
    assert [(row["labelled"], row["rank"], row["arm"]) for row in rows] == [
        (part, rank, arm) for part in (1, 0.5) for rank in (0, 4) for arm in ("logits", "ours")
    ]
    for row in rows:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert ("dA" in row["error"]) is (row["rank"] == 4)
        work = 4 * round(row["labelled"] * 50) * 32 * 203
        assert row["tflops"] == pytest.approx(work / (row["p50"] * 1e-3) / 1e12)


def test_a_wrong_loss_gets_no_times(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(
        hidden: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float, labels: Any
    ) -> Any:
        return lora_head_loss(hidden, weight, bias, a, b, scaling * 1.1, labels)

    monkeypatch.setattr(fastlora_kernels.ops.head_loss, "lora_head_loss", wrong)
    result = run(bench, "--ranks", "4", "--labelled", "1")
    assert result.exit_code == 3, result.output
    assert "WRONG" in result.output
