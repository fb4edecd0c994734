"""Where the time of a training step goes: the clock, the host, and what the GPU does meanwhile.

python benchmarks/timeline.py llama31-8b --arms unsloth,unsloth+fastlora [--layers 6] [--steps 8] [--out DIR] [--trace]

Each arm trains in a process of its own, as in `fastlora bench`, on a model of so many layers (all of them if not
said). Printed per micro-batch: milliseconds by the clock; until Python has handed everything over; in which the GPU
computes, copies with nothing computed beside it, and does nothing; and the computing by kind of kernel. DIR gets it as
JSON, and with --trace a Chrome trace of one micro-batch per arm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.table import Table

KINDS = {
    "copies": "memcpy",
    "attention": "flash|fmha|attention|sdpa",
    "dequantize": "dequant",
    "products": "gemm|cutlass|cublas|nvjet|xmma|cudnn.*matmul|splitk",
    "optimizer": "adam|optimizer|multi_tensor|foreach|lamb(?!da)",
    "loss": "cross_entropy|softmax|nll|_chunk",
    "norms": "norm",
    "rotary": "rope|rotary",
    "activation": "glu|silu|gelu",
}
"""Of kernels, by their names; the first that matches. The rest is elementwise, mostly."""
FIGURES = (
    "wall_ms", "host_ms", "computes_ms", "only_copies_ms", "idle_ms", "launches", "peak_reserved_gib",
)  # fmt: skip
SHOWN_KERNELS = 40


class Span(NamedTuple):
    """Of one kernel or copy; nanoseconds."""

    begin: int
    end: int
    name: str


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.I)), "other")


def union_ns(spans: Iterable[Span]) -> int:
    """In which at least one of them runs."""
    total, until = 0, 0
    for begin, end, _ in sorted(spans):
        total += max(0, end - max(begin, until))
        until = max(until, end)
    return total


def summary(spans: Sequence[Span], micro_batches: int) -> dict[str, Any]:
    """Milliseconds a micro-batch; the window is that from the first kernel to the end of the last."""
    if not spans:
        return {}
    computing = [span for span in spans if kind_of(span.name) != "copies"]
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for span in spans:
        kinds[kind_of(span.name)] += span.end - span.begin
        kernels[span.name] += span.end - span.begin
    busy, computes = union_ns(spans), union_ns(computing)
    window = max(span.end for span in spans) - min(span.begin for span in spans)

    def ms(nanoseconds: int) -> float:
        return round(nanoseconds / micro_batches / 1e6, 3)

    return {
        "computes_ms": ms(computes),
        "only_copies_ms": ms(busy - computes),
        "idle_ms": ms(window - busy),
        "launches": len(spans) // micro_batches,
        "kinds_ms": {kind: ms(total) for kind, total in kinds.most_common()},
        "kernels_ms": {name[:90]: ms(total) for name, total in kernels.most_common(SHOWN_KERNELS)},
    }


def measure(
    arm_name: str, suite: str, layers: int | None, steps: int, trace: Path | None
) -> dict[str, Any]:
    """In a process in which nothing has been imported yet. Times are medians over `steps` micro-batches."""
    from fastlora.bench.schema import Arm
    from fastlora.bench.suites import plan_for, renamed

    plan = plan_for(suite, 0.0)
    arm = Arm.parse(arm_name)
    recipe = arm.recipe(renamed(plan.recipe, _checkpoint(plan, layers)))
    from fastlora.bench import work
    from fastlora.bench.arm import counted_tokens, make_optimizer
    from fastlora.bench.loaded import ArmTask
    from fastlora.errors import EngineError

    task = ArmTask(arm=arm, recipe=recipe, parity_checkpoint="", rows="", gradients="", work=plan.work)  # fmt: skip
    loaded = task.load()
    import torch

    cuda = loaded.device.type == "cuda"
    train = loaded.recipe.train
    rows = work.random_rows(
        plan.work.model_copy(update={"steps": 1}), vocabulary=loaded.model.config.vocab_size,
        seq_len_tokens=recipe.model.seq_len_tokens, rows_per_step=train.micro_batch,
    )  # fmt: skip
    loaded.set_adapter(0.0)
    parameters = [parameter for _, parameter in loaded.adapter()]
    optimizer = make_optimizer(parameters, train.optimizer, train.lr, train.weight_decay)
    inputs = loaded.on_device(loaded.collate(rows))
    labels = counted_tokens([inputs])
    counted = torch.tensor(labels, device=loaded.device)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def micro_batch() -> tuple[float, float]:
        wait()
        began = time.perf_counter()
        loaded.train(inputs, counted, labels)
        handed = time.perf_counter()
        wait()
        return handed - began, time.perf_counter() - began

    # Compiles, tunes, makes the optimizer's state; records, where that is asked for.
    for _ in range(4):
        micro_batch()
        optimizer.step()
        loaded.stepped()
        loaded.zero_gradients()
    times = []
    for _ in range(steps):
        times.append(micro_batch())
        loaded.zero_gradients()
    try:
        attention = loaded.kept_attention()
    except EngineError as error:
        attention = str(error)
    found: dict[str, Any] = {
        "arm": arm.name,
        "layers": loaded.model.config.num_hidden_layers,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "wall_ms": round(1e3 * sorted(wall for _, wall in times)[steps // 2], 3),
        "host_ms": round(1e3 * sorted(host for host, _ in times)[steps // 2], 3),
        "notes": loaded.notes,
        "not_recorded": loaded.not_recorded,
        "kept_attention": attention,
        "load_s": [round(loaded.imports_s, 1), round(loaded.weights_s, 1)],
    }
    profiled = 2
    with torch.profiler.profile() as profiler:
        for _ in range(profiled):
            micro_batch()
    spans = [
        Span(event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0
    ]
    if trace:
        profiler.export_chrome_trace(str(trace))
    if cuda:
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    return found | summary(spans, profiled)


def _checkpoint(plan: Any, layers: int | None) -> str:
    """Random weights of the suite's shape, made in another process: here unsloth must come before transformers."""
    from fastlora.bench.processes import run_worker
    from fastlora.bench.worker import WeightsTask
    from fastlora.cache import cache_folder

    shape = plan.shape | ({"num_hidden_layers": layers} if layers else {})
    if layers and "layer_types" in shape:
        shape["layer_types"] = shape["layer_types"][:layers]
    weights = WeightsTask(
        shape=shape, model=plan.recipe.model, cache=str(cache_folder() / "checkpoints")
    )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        made = run_worker("weights", weights.model_dump_json(), log=log, timeout_s=900)
    return str(made["folder"])


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="milliseconds a micro-batch", title_justify="left")
    shown.add_column("")
    for row in rows:
        unlike = " (NOT recorded)" if row.get("not_recorded") else ""
        shown.add_column(row["arm"] + unlike, justify="right")

    def add(name: str, cells: Sequence[float | None], digits: str = ",") -> None:
        if any(cell is not None for cell in cells):
            shown.add_row(name, *("" if cell is None else format(cell, digits) for cell in cells))

    for figure in FIGURES:
        add(figure.removesuffix("_ms").replace("_", " "), [row.get(figure) for row in rows])
    shown.add_section()
    for kind in (*KINDS, "other"):
        add(kind, [row.get("kinds_ms", {}).get(kind) for row in rows], ".2f")
    return shown


@click.command()
@click.argument("suite")
@click.option("--arms", required=True, help="Engines with options, as for fastlora bench.")
@click.option("--layers", type=click.IntRange(min=1), help="Of the model; else as many as it has.")
@click.option("--steps", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--timeout", default=300, show_default=True, help="Seconds that an arm may take.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--trace", is_flag=True)
@click.option("--one", is_flag=True, hidden=True)
def main(
    suite: str, arms: str, layers: int | None, steps: int, timeout: int, out: Path | None, trace: bool, one: bool
) -> None:  # fmt: skip
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if one:
        assert out
        to = out / f"{arms}.trace.json" if trace else None
        found = measure(arms, suite, layers, steps, to)
        (out / f"{arms}.json").write_text(json.dumps(found, indent=1))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        for arm in arms.split(","):
            row = _in_a_process(arm, suite, layers, steps, timeout, folder, trace=trace)
            if row:
                rows.append(row)
    Console(width=160).print(table(rows))
    for row in rows:
        if row.get("not_recorded"):
            print(f"{row['arm']}: not recorded, but called each time: {row['not_recorded']}")
        if row.get("kept_attention") is not None:
            print(f"{row['arm']}: layers whose attention was kept: {row['kept_attention']}")
    if len(rows) < len(arms.split(",")):
        sys.exit(1)


def _in_a_process(
    arm: str, suite: str, layers: int | None, steps: int, timeout: int, out: Path, *, trace: bool
) -> dict[str, Any] | None:
    """None: it failed, which is said on stderr; the other arms go on."""
    from fastlora.bench.schema import Arm

    name = Arm.parse(arm)
    command = [sys.executable, "-P", __file__, suite, "--arms", name.name, "--steps", str(steps)]
    command += ["--one", "--out", str(out), *(["--layers", str(layers)] if layers else [])]
    command += ["--trace"] if trace else []
    try:
        subprocess.run(
            command, check=True, timeout=timeout, stdout=sys.stderr, env={**os.environ, **name.environment}
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{name.name}: {error}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads((out / f"{name.name}.json").read_text())
    return found


if __name__ == "__main__":
    main()
