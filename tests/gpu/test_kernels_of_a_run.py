"""What engages on a GPU: short runs of small models, by engine, architecture and kernels.mode."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

QKV = {"q_proj", "k_proj", "v_proj"}
O_MLP = {"o_proj", "gate_proj", "up_proj", "down_proj"}
SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
MORE = {
    "gemma3_text": {"head_dim": 64, "layer_types": ["sliding_attention", "full_attention"]},
}
RECIPE = """
engine = "{engine}"
[model]
name = "{model}"
quantization = "{quantization}"
seq_len_tokens = 256
[data]
sources = ["rows.jsonl"]
[train]
steps = 4
warmup_fraction = 0.0
micro_batch = 2
[memory]
cuda_graphs = false
[output]
dir = "runs"
"""


def trained(
    folder: Path,
    engine: str,
    model_type: str,
    quantization: str,
    *settings: str,
    counts: Sequence[int] = range(1, 33),
) -> dict[str, Any]:
    """A run of `fastlora run --json`: its manifest, with the losses of its steps. `counts`: how long its 32 rows are,
    in turn."""
    from fastlora.bench.weights import random_checkpoint
    from fastlora.recipe.schema import ModelSection

    section = ModelSection(name="x", quantization=quantization, dtype="bfloat16")  # type: ignore[arg-type]
    shape = {"model_type": model_type, **SHAPE, **MORE.get(model_type, {})}
    model = random_checkpoint(shape, section, folder / "models")
    rows = [
        {"prompt": f"Count to {n}:", "completion": " 1 2 3" * counts[n % len(counts)]}
        for n in range(32)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(engine=engine, model=model, quantization=quantization))
    given = [argument for setting in settings for argument in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "run", str(recipe), "--json", *given],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    manifest: dict[str, Any] = json.loads(done.stdout)
    entries = (Path(folder / manifest["path"]) / "metrics.jsonl").read_text().splitlines()
    manifest["losses"] = [json.loads(line)["loss"] for line in entries]
    return manifest


def by_kernel(manifest: dict[str, Any]) -> dict[str, set[str]]:
    kernels: dict[str, set[str]] = {}
    for row in manifest["kernels"]:
        kernels.setdefault(row["kernel"], set()).add(row["kind"])
    return kernels


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("model_type", "fused", "left"),
    [
        ("llama", QKV | O_MLP, set()),
        ("qwen2", O_MLP, QKV),
        ("phi3", set(), {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ],
)
def test_unsloth(
    tmp_path: Path, model_type: str, fused: set[str], left: set[str], quantization: str
) -> None:
    if find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")

    def run(mode: str, *more: str) -> dict[str, Any]:
        settings = (f"kernels.mode={mode}", *more)
        return trained(tmp_path, "unsloth", model_type, quantization, *settings)

    # Else PEFT's layers would be chosen where the GPU waits for Python, as for Phi 3 of this size.
    auto = run("auto", "kernels.require_fast=true")
    off, every = run("off"), run("all")
    assert by_kernel(auto) == {
        kernel: kinds for kernel, kinds in (("unsloth fused", fused), ("fastlora", left)) if kinds
    }
    assert by_kernel(off) == {
        kernel: kinds for kernel, kinds in (("unsloth fused", fused), ("PEFT", left)) if kinds
    }
    assert by_kernel(every) == {"fastlora": fused | left}
    assert auto["losses"] == pytest.approx(off["losses"], rel=0.02)
    assert every["losses"] == pytest.approx(off["losses"], rel=0.02)


@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3"])
def test_recorded_where_unsloth_fuses_nothing(tmp_path: Path, model_type: str) -> None:
    """As CUDA graphs: flex attention's masks, which transformers looks into, and a loss of ours. Of two lengths:
    unsloth compiles Gemma 3's layers for a minute and more, for each length."""
    if find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    settings = ("train.checkpointing=offload", 'lora.target_modules=["q_proj", "down_proj"]')
    if model_type == "phi3":
        settings = settings[:1]
    counts = (8, 24)
    plain = trained(tmp_path, "unsloth", model_type, "nf4", *settings, counts=counts)
    recorded = trained(
        tmp_path, "unsloth", model_type, "nf4", *settings, "memory.cuda_graphs=true", counts=counts
    )
    assert "stopped" not in recorded["cuda_graphs"], recorded["notes"]
    assert any("were replays" in note for note in recorded["notes"]), recorded["notes"]
    assert recorded["losses"] == pytest.approx(plain["losses"], rel=0.02)


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("nf4", "bfloat16")])
def test_200_steps_with_and_without(tmp_path: Path, quantization: str, dtype: str) -> None:
    """In float32 step by step; in 16 bits, where each rounds otherwise, on average over 20 steps."""
    settings = ("train.steps=200", "train.lr=2e-4", f'model.dtype="{dtype}"')
    ours = trained(tmp_path, "peft", "qwen2", quantization, *settings)
    theirs = trained(tmp_path, "peft", "qwen2", quantization, *settings, "kernels.mode=off")
    assert by_kernel(ours) == {"fastlora": QKV | O_MLP}
    assert len(ours["losses"]) == 200
    size = 1 if dtype == "float32" else 20
    means = [
        torch.tensor(one["losses"]).reshape(-1, size).mean(dim=1).tolist() for one in (ours, theirs)
    ]
    assert means[0] == pytest.approx(means[1], rel=1e-3 if dtype == "float32" else 0.01)
    assert sum(ours["losses"][-20:]) < 0.9 * sum(ours["losses"][:20])


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_peft(tmp_path: Path, quantization: str) -> None:
    auto = trained(tmp_path, "peft", "qwen2", quantization, "kernels.require_fast=true")
    off = trained(tmp_path, "peft", "qwen2", quantization, "kernels.mode=off")
    assert by_kernel(auto) == {"fastlora": QKV | O_MLP}
    assert {row["reason"] for row in auto["kernels"]} == {""}
    assert by_kernel(off) == {"PEFT": QKV | O_MLP}
    assert auto["losses"] == pytest.approx(off["losses"], rel=0.02)
