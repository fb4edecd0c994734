"""Why two trainings' losses part within a few steps: the adapter's initial values, the types, or the engine.

python benchmarks/first_steps.py ENGINE [--suite llama31-8b] [--steps 5] [--json FILE]

Trains ENGINE (peft, liger or unsloth) on the same 8 rows of uniform random tokens, again and again: from its
own initial adapter, from two given ones, and, for peft, with parts of the frozen base in float32, as PEFT's
`prepare_model_for_kbit_training` has them all. Prints the loss at each step. One engine per process;
compare the lines of two. What came of it: docs/benchmarking.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

SEEDS = (3407, 1)
UPCAST = {
    "norms": ("norm",),
    "head": ("lm_head",),
    "embeddings (so the residual stream)": ("embed_tokens",),
    "all of them": ("norm", "lm_head", "embed_tokens"),
}


@click.command()
@click.argument("engine", type=click.Choice(["peft", "liger", "unsloth"]))
@click.option("--suite", default="llama31-8b", show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the losses there.")
def main(engine: str, suite: str, steps: int, target: Path | None) -> None:
    from fastlora.bench.processes import run_worker
    from fastlora.bench.schema import Arm
    from fastlora.bench.suites import plan_for, renamed
    from fastlora.bench.worker import WeightsTask
    from fastlora.cache import cache_folder

    plan = plan_for(suite, 0.0)
    assert plan.shape is not None
    # In another process: here unsloth must come before transformers.
    weights = WeightsTask(
        shape=plan.shape, model=plan.recipe.model, cache=str(cache_folder() / "checkpoints")
    )
    with tempfile.TemporaryDirectory() as folder:
        made = run_worker(
            "weights", weights.model_dump_json(), log=Path(folder) / "log", timeout_s=900
        )
    checkpoint = made["folder"]
    arm = Arm.parse(engine)
    recipe = arm.recipe(renamed(plan.recipe, str(checkpoint)))
    found = _measure(arm, recipe, plan, steps)
    for name, losses in found.items():
        click.echo(f"{name:40} " + " ".join(f"{loss:.4f}" for loss in losses))
    if target:
        target.write_text(json.dumps(found, indent=1))


def _measure(arm: Any, recipe: Any, plan: Any, steps: int) -> dict[str, list[float]]:
    import torch

    from fastlora.bench import work
    from fastlora.bench.arm import timed_steps
    from fastlora.bench.loaded import ArmTask

    task = ArmTask(
        arm=arm, recipe=recipe, parity_checkpoint="", rows="", gradients="", work=plan.work
    )
    loaded = task.load()
    train = recipe.train
    per_step = train.micro_batch * train.accumulation_steps
    tokens = torch.randint(
        0,
        plan.shape["vocab_size"] - 256,
        (per_step, recipe.model.seq_len_tokens),
        generator=torch.Generator().manual_seed(0),
    ).tolist()
    rows = [{"input_ids": row, "labels": row} for row in tokens] * steps
    work_steps = work.steps(rows, train.micro_batch, train.accumulation_steps)

    found = {f"{arm.name}, its own start": timed_steps(loaded, work_steps)["losses"]}
    for seed in SEEDS:
        loaded.set_adapter(0.0, seed)
        found[f"{arm.name}, start {seed}"] = timed_steps(loaded, work_steps)["losses"]
    for what, parts in UPCAST.items() if arm.engine == "peft" else ():
        raised = [
            parameter
            for name, parameter in loaded.model.named_parameters()
            if parameter.dtype is loaded.dtype and any(part in name for part in parts)
        ]
        for parameter in raised:
            parameter.data = parameter.data.float()
        loaded.set_adapter(0.0, SEEDS[0])
        found[f"{arm.name}, {what} in float32"] = timed_steps(loaded, work_steps)["losses"]
        for parameter in raised:
            parameter.data = parameter.data.to(loaded.dtype)  # exact: that is where they came from
    return found


if __name__ == "__main__":
    main()
