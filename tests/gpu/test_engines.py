"""Both engines from one recipe on one GPU: losses fall, the adapter loads in plain PEFT with equal
logits, the merged model agrees, and the trainer costs no more than 3 % over a bare loop.

FASTLORA_GPU_SIZES=1b,8b-nf4 chooses the checkpoints; FASTLORA_GPU_RESULTS=file.jsonl keeps the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),  # one after the other: they measure
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

HERE = Path(__file__).parent
SIZES = os.environ.get("FASTLORA_GPU_SIZES", "1b").split(",")
RECIPE = """
[model]
name = "replaced"
seq_len_tokens = 2048
[data]
sources = ["replaced.jsonl"]
[train]
steps = 20
micro_batch = 2
effective_batch = 8
warmup_fraction = 0.05
save_every_steps = 20
[output]
dir = "replaced"
merge = "16bit"
"""
ANSWERS = """
[eval]
rows = 4
metrics = ["exact_match"]
max_new_tokens = 8
"""


def call(script: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}


def skip_without(engine: str) -> None:
    if engine == "unsloth" and find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")


def make_checkpoint(parent: Path, size: str) -> Path:
    folder = Path(call("shapes.py", "make", parent, size))
    call("shapes.py", "data", folder / "rows.jsonl", 64, 4000)
    recipe = RECIPE.replace("[train]", "eval_split = 4\n[train]") + ANSWERS
    if size.endswith("-nf4"):  # there is no 16-bit base to merge into
        recipe = recipe.replace("16bit", "none")
    (folder / "recipe.toml").write_text(recipe)
    overhead = RECIPE.replace("16bit", "none").replace("steps = 20\nmicro", "steps = 12\nmicro")
    overhead += "[memory]\ncuda_graphs = false\n"  # as the bare loop
    (folder / "overhead.toml").write_text(overhead)
    return folder


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


RECORDED = ("memory.cuda_graphs=true", "train.checkpointing=offload")


@pytest.mark.parametrize(
    ("engine", "settings"), [("unsloth", ()), ("unsloth", RECORDED), ("peft", ())]
)
def test_packed_rows_do_not_see_each_other(
    engine: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    """Kept apart the engine's own way and, on unsloth where it is recorded alone, by flash attention."""
    skip_without(engine)
    folder = make_checkpoint(tmp_path, "small")
    losses = call(
        "check_engine.py",
        "packing",
        folder / "overhead.toml",
        engine,
        folder,
        folder / "rows.jsonl",
        tmp_path,
        "data.packing=true",
        *settings,
    )
    assert losses["flash"] is (engine == "peft" or bool(settings))
    leak = abs(losses["together"][0] - losses["together"][1])
    assert leak > 1e-4, losses  # else this test could not see one
    for way in ("theirs", "apart"):
        assert abs(losses[way][0] - losses[way][1]) < 0.02 * leak, losses
    assert losses["apart"] == pytest.approx(losses["theirs"], rel=5e-3)


@pytest.mark.parametrize("engine", ["unsloth", "peft"])
def test_engine(checkpoint: Path, engine: str, tmp_path: Path) -> None:
    skip_without(engine)
    arguments = (
        checkpoint / "recipe.toml",
        engine,
        checkpoint,
        checkpoint / "rows.jsonl",
        tmp_path,
    )
    trained = call("check_engine.py", "train", *arguments)
    again = call("check_engine.py", "reload", tmp_path)
    compared = call(
        "check_engine.py",
        "overhead",
        checkpoint / "overhead.toml",
        *arguments[1:4],
        tmp_path / "overhead",
    )
    figures = {
        "checkpoint": checkpoint.parent.name.rstrip("0123456789"),
        "engine": engine,
        **compared,
        **trained,
        "reload": again,
    }
    print(json.dumps(figures))
    if "FASTLORA_GPU_RESULTS" in os.environ:
        with open(os.environ["FASTLORA_GPU_RESULTS"], "a") as file:
            file.write(json.dumps(figures) + "\n")
    assert trained["losses"][-1] < trained["losses"][0] - 0.5
    # The same kernels give the same logits. Unsloth's own round differently in bfloat16, on the bare base
    # as much as with the adapter, and depth amplifies that: 1.7 % on 16 layers, 4.3 % on 32.
    assert again["logit_error"] <= max(1e-3, 2 * again["base_error"])
    assert again["logit_error"] < 0.1 * again["base_distance"]
    # Random weights amplify the rounding of the merged ones; a forgotten adapter has 0 carried, 1 effect.
    if trained["merge"] is not None:
        assert trained["merge"]["logit_error"] <= 0.25 * trained["merge"]["effect"]
    assert trained["answers"]["rows"] == 4
    assert "exact_match" in trained["answers"]["after"]
    assert compared["overhead"] <= 0.03
