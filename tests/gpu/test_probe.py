"""What the probe says that the worst step takes is what the worst step takes.

That the run is the one without a probe is tested to the last bit on a CPU (tests/integration/test_probe.py).
"""

from __future__ import annotations

import json
import random
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
dtype = "bfloat16"
seq_len_tokens = 2048
[lora]
rank = 64
[data]
sources = ["rows.jsonl"]
[train]
epochs = 1
micro_batch = 4
effective_batch = 8
optimizer = "adamw"
lr = 1e-4
checkpointing = "{checkpointing}"
log_every_steps = 1
[eval]
rows = 0
[memory]
cuda_graphs = false
[output]
dir = "runs"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths, of which few are long."""
    folder, draw = tmp_path_factory.mktemp("probe"), random.Random(0)
    rows = [
        {"prompt": f"Count to {n}:", "completion": " 1 2 3" * int(300 * draw.random() ** 3 + 5)}
        for n in range(1, 97)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(
    folder: Path, how: str, engine: str, *settings: str
) -> tuple[dict[str, Any], list[float]]:
    """(manifest, losses of its steps)."""
    from fastlora.bench.weights import random_checkpoint
    from fastlora.recipe.schema import ModelSection

    if engine == "unsloth" and find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    section = ModelSection(name="x", quantization="nf4", dtype="bfloat16")
    model = random_checkpoint(SHAPE, section, folder / "models")
    recipe = folder / "recipe.toml"
    checkpointing = "unsloth" if engine == "unsloth" else "full"
    recipe.write_text(RECIPE.format(engine=engine, model=model, checkpointing=checkpointing))
    given = [argument for setting in settings for argument in ("--set", setting)]
    script = Path(__file__).parent / "probed.py"
    done = subprocess.run(
        [sys.executable, str(script), how, "run", str(recipe), "--json", *given],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    newest = max((folder / "runs").glob("*"), key=lambda run: int(run.name))
    manifest: dict[str, Any] = json.loads((newest / "manifest.json").read_text())
    entries = [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]
    return manifest, [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("engine", ["peft", "unsloth"])
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("data.packing=true", "train.micro_batch=1"),
        ("train.effective_batch=4",),  # no gradient is there when a forward begins
        ("train.optimizer=adamw_8bit", "train.chunked_loss=false"),
    ],
)
def test_no_step_takes_more(folder: Path, engine: str, settings: tuple[str, ...]) -> None:
    """Each epoch comes to the longest row, and with it to the widest micro-batch."""
    manifest, losses = trained(folder, "steps", engine, *settings)
    probe, steps = manifest["plan"]["probe"], manifest["result"]
    assert steps["peak_allocated_gib"] <= 1.02 * probe["peak_allocated_gib"]
    assert steps["peak_allocated_gib"] >= 0.85 * probe["peak_allocated_gib"]
    # And what the allocator keeps: its blocks, and holes between micro-batches of other lengths. They are luck, and no
    # reason to run out of memory, since it gives them back.
    assert steps["peak_reserved_gib"] <= 1.1 * probe["peak_gib"] + 64 / 1024
    assert steps["peak_reserved_gib"] >= 0.85 * probe["peak_gib"]
    assert probe["optimizer_gib"] > 0
    _, without = trained(folder, "none", engine, *settings)
    assert losses == pytest.approx(without, rel=1e-3)


def test_a_budget_is_told_of(folder: Path) -> None:
    free, _ = trained(folder, "steps", "peft")
    budget = free["plan"]["probe"]["peak_gib"] + 4
    kept, _ = trained(
        folder, "steps", "peft", f'memory.vram="{budget:.2f}GiB"', "train.checkpointing=auto"
    )
    assert "oom" not in kept
    assert any(f" of {budget:.2f} GiB with the CUDA context" in note for note in kept["notes"])
