"""Why two engines' losses part within a few steps: the adapter's initial values, the types, or the engine.

python benchmarks/first_steps.py ENGINE [--suite llama31-8b] [--steps 5] [--json FILE]

Trains ENGINE (peft, liger or unsloth) on the same 8 rows of uniform random tokens, again and again, from
its own initial adapter and from given ones, and prints the loss at each step. peft comes a second time
with what `prepare_model_for_kbit_training` does: norms, embeddings and head in float32. One engine per
process; compare the columns of two runs. Why it was asked: docs/benchmarking.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

SEEDS = (3407, 1)


@click.command()
@click.argument("engine", type=click.Choice(["peft", "liger", "unsloth"]))
@click.option("--suite", default="llama31-8b", show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the losses there.")
def main(engine: str, suite: str, steps: int, target: Path | None) -> None:
    from fastlora.bench.run import cache_folder, renamed
    from fastlora.bench.schema import Arm
    from fastlora.bench.suites import plan_for
    from fastlora.bench.weights import random_checkpoint

    plan = plan_for(suite, 0.0)
    assert plan.shape is not None
    checkpoint = random_checkpoint(plan.shape, plan.recipe.model, cache_folder() / "checkpoints")
    arm = Arm.parse(engine)
    recipe = arm.recipe(renamed(plan.recipe, str(checkpoint)))
    found: dict[str, list[float]] = {}
    _measure(arm, recipe, plan, steps, found, engine, upcast=False)
    if engine == "peft":
        _measure(arm, recipe, plan, steps, found, "peft, float32 norms and head", upcast=True)
    for name, losses in found.items():
        click.echo(f"{name:45} " + " ".join(f"{loss:.4f}" for loss in losses))
    if target:
        target.write_text(json.dumps(found, indent=1))


def _measure(
    arm: Any,
    recipe: Any,
    plan: Any,
    steps: int,
    found: dict[str, list[float]],
    name: str,
    upcast: bool,
) -> None:
    import torch

    from fastlora.bench import work
    from fastlora.bench.arm import ArmTask, empty, timed_steps

    task = ArmTask(
        arm=arm, recipe=recipe, parity_checkpoint="", rows="", gradients="", work=plan.work
    )
    loaded = task.load()
    if upcast:
        for parameter in loaded.model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    train = recipe.train
    draw = torch.Generator().manual_seed(0)
    per_step = train.micro_batch * train.accumulation_steps
    tokens = torch.randint(
        0, plan.shape["vocab_size"] - 256, (per_step, recipe.model.seq_len_tokens), generator=draw
    ).tolist()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    for seed in (None, *SEEDS):
        if seed is not None:
            loaded.set_adapter(0.0, seed)
        losses = timed_steps(
            loaded, work.steps(rows * steps, train.micro_batch, train.accumulation_steps)
        )["losses"]
        found[f"{name}, {'its own start' if seed is None else f'start {seed}'}"] = losses
    empty(loaded)


if __name__ == "__main__":
    main()
