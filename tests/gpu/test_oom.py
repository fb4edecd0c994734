"""Runs whose memory is capped for real: they go on in smaller forwards, and end as those with room do."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import SHAPE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

RECIPE = """
engine = "{engine}"
[model]
name = "{model}"
quantization = "nf4"
dtype = "{dtype}"
seq_len_tokens = 1024
[data]
sources = ["rows.jsonl"]
eval_split = 16
packing = {packing}
[train]
steps = 6
warmup_fraction = 0.0
effective_batch = 16
optimizer = "adamw"
lr = 1e-4
checkpointing = "{checkpointing}"
[eval]
rows = 0
[memory]
cuda_graphs = false
[output]
dir = "runs"
"""
UNCAPPED = 1000.0
SEGMENT_GIB = 20 / 1024
"""A limit may be passed by so much: PyTorch asks whether the bytes are left, and then maps whole segments of 20 MiB."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oom")
    rows = [{"prompt": f"Count to {n}:", "completion": " 1 2 3" * (100 + n)} for n in range(1, 65)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(
    folder: Path,
    engine: str,
    dtype: str,
    packing: str,
    *settings: str,
    cap_gib: float = UNCAPPED,
    expect: int = 0,
    layers: int = SHAPE["num_hidden_layers"],
) -> tuple[dict[str, Any], str]:
    """(manifest with the losses of its steps, what was said on stderr)."""
    from fastlora.bench.weights import random_checkpoint
    from fastlora.recipe.schema import ModelSection

    section = ModelSection(name="x", quantization="nf4", dtype=dtype)  # type: ignore[arg-type]
    shape = SHAPE | {"num_hidden_layers": layers}
    model = random_checkpoint(shape, section, folder / "models")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        RECIPE.format(
            engine=engine, model=model, dtype=dtype, packing=packing,
            checkpointing="unsloth" if engine == "unsloth" else "full",
        )
    )  # fmt: skip
    given = [argument for setting in settings for argument in ("--set", setting)]
    script = Path(__file__).parent / "capped.py"
    done = subprocess.run(
        [sys.executable, str(script), str(cap_gib), "run", str(recipe), "--json", *given],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr[-6000:]
    newest = max((folder / "runs").glob("*"), key=lambda run: int(run.name))
    manifest: dict[str, Any] = json.loads((newest / "manifest.json").read_text())
    entries = [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]
    manifest["losses"] = [entry["loss"] for entry in entries if "loss" in entry]
    return manifest, done.stderr


@pytest.mark.parametrize(
    ("engine", "dtype", "packing"),
    [
        ("peft", "bfloat16", "false"),
        ("peft", "bfloat16", "true"),
        ("peft", "float16", "false"),  # with a GradScaler
        ("unsloth", "bfloat16", "false"),
        ("unsloth", "bfloat16", "true"),
    ],
)
def test_a_capped_run_ends_as_one_with_room(
    folder: Path, engine: str, dtype: str, packing: str
) -> None:
    if engine == "unsloth" and find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    what = (folder, engine, dtype, packing)
    few, _ = trained(*what, "train.micro_batch=2")
    many, _ = trained(*what, "train.micro_batch=16")
    small, large = (run["result"]["peak_reserved_gib"] for run in (few, many))
    assert large > 1.5 * small, "the shape is too small for a cap to matter"
    cap_gib = small + 0.3 * (large - small)
    capped, said = trained(*what, "train.micro_batch=16", cap_gib=cap_gib)
    steps = [entry for entry in capped["oom"] if entry["where"] == "step"]
    assert steps[0]["before"] == 16
    assert 1 <= steps[-1]["rows"] <= 8
    assert steps[0]["memory"]["reserved_gib"] <= cap_gib + SEGMENT_GIB
    assert "out of memory with 16 rows of up to " in said
    assert capped["result"]["peak_reserved_gib"] <= cap_gib + SEGMENT_GIB
    assert capped["result"]["tokens"] == many["result"]["tokens"]
    # Products of other shapes round otherwise, in 16 bits.
    assert capped["losses"] == pytest.approx(many["losses"], rel=0.02)
    assert capped["result"]["eval_losses"] == pytest.approx(many["result"]["eval_losses"], rel=0.02)


def test_without_checkpointing_it_is_turned_on_and_then_the_run_ends(folder: Path) -> None:
    what = (folder, "peft", "bfloat16", "false")
    settings = ("train.micro_batch=1", "train.effective_batch=4")

    def run(*more: str, **given: Any) -> tuple[dict[str, Any], str]:
        return trained(*what, *settings, *more, layers=12, **given)

    plain, _ = run("train.checkpointing=none")
    tight, _ = run("train.checkpointing=full")
    loose_gib, tight_gib = (one["result"]["peak_reserved_gib"] for one in (plain, tight))
    assert loose_gib > tight_gib + 0.2, "the shape is too shallow for a cap to matter"
    between = (loose_gib + tight_gib) / 2
    capped, _ = run("train.checkpointing=none", cap_gib=between)
    assert capped["oom"][-1]["checkpointing"] == "full"
    assert capped["losses"] == pytest.approx(plain["losses"], rel=0.02)
    failed, said = run(cap_gib=0.6 * tight_gib, expect=1)
    assert failed["status"] == "failed"
    assert "out of memory" in said
