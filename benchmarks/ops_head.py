"""Times the loss from the last hidden states, and what it holds: with all logits, by TRL, and ours in chunks.

    python benchmarks/ops_head.py --vocabulary 128256 --hidden 4096 --tokens 4096 --labelled 1,0.25 --ranks 0,16

Forward and backward together, for hidden states and adapter, under autocast with the base in --dtype. `logits` is what
transformers does with PEFT's layer; TRL's loss (its SFTTrainer's, with entropy and accuracy) has no adapter and needs
a GPU. An arm gets numbers only if it is right: every gradient errs at most twice as much as that of `logits`, against
float32; the loss twice as much as a row's loss there, as the errors of rows cancel by chance. TFLOP/s count h W^T and
g W of the labelled rows alone. Peak: allocated above what was there before. Against those two products, and as a CUDA
graph: kernels.py.
Exit codes: 0 done, 3 a loss is wrong.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

# As in kernels.py, which must not be found in this folder as a module.
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from opbench import Setting, timing  # noqa: E402
from opbench.ends import Arm, head_arms  # noqa: E402

sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULTS = {"cuda": (128_256, 4096, 4096, 30), "cpu": (1003, 64, 128, 3)}[DEVICE.type]


def measure(arms: dict[str, Arm], flops: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Each arm's relative errors (2-norm), and with them right ms at p20, p50, p80, TFLOP/s and peak MiB."""
    truth = arms.pop("truth")()
    arms.pop("floor")  # TFLOP/s say as much
    rows: dict[str, dict[str, Any]] = {
        name: {"error": timing.errors(truth, arm())} for name, arm in arms.items()
    }
    for row in rows.values():
        row["right"] = timing.right(row["error"], rows["logits"]["error"])
    del truth
    timed = [name for name, row in rows.items() if row["right"]]
    spans: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(3 + repeats):
        for name in timed:  # in turns, so that a clock that drifts does so for all
            before = _synchronized()
            held = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            arms[name]()
            if turn >= 3:
                spans[name].append((_synchronized() - before) * 1e3)
            if DEVICE.type == "cuda":
                peak = torch.cuda.max_memory_allocated() - held
                rows[name]["peak_mib"] = round(peak / 2**20, 1)
    for name, span in spans.items():
        rows[name] |= timing.quantiles(span)
        rows[name]["tflops"] = flops / rows[name]["p50"] / 1e9
    return rows


def _synchronized() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def numbers(_: click.Context, option: click.Parameter, text: str) -> list[float]:
    try:
        return [float(entry) for entry in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers") from error


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--vocabulary", default=DEFAULTS[0])
@click.option("--hidden", default=DEFAULTS[1])
@click.option("--tokens", default=DEFAULTS[2])
@click.option("--labelled", default="1,0.25", callback=numbers, help="parts of the tokens")
@click.option("--ranks", default="0,16", callback=numbers, help="0: no adapter")
@click.option("--dtype", default="bfloat16", type=click.Choice(["bfloat16", "float16"]))
@click.option("--repeats", default=DEFAULTS[3], type=click.IntRange(min=1))
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(
    vocabulary: int, hidden: int, tokens: int, labelled: Any, ranks: Any, dtype: str, repeats: int, target: Any
) -> None:  # fmt: skip
    from fastlora.rundir import provenance, store

    names = "labelled,rank,arm,ms at p20 p50 p80,TFLOP/s,peak MiB,errors"
    shown = Table(
        *names.split(","), title=f"{DEVICE}, {dtype}, {vocabulary} x {hidden}, {tokens} tokens"
    )
    rows, wrong = [], False
    for part in labelled:
        for rank in map(int, ranks):
            setting = Setting(tokens, rank, getattr(torch, dtype), DEVICE)
            arms = head_arms(vocabulary, hidden, part, setting)
            flops = round(4 * part * tokens * hidden * vocabulary)
            for name, row in measure(arms, flops, repeats).items():
                rows.append({"labelled": part, "rank": rank, "arm": name, **row})
                wrong |= not row["right"]
                times = " ".join(f"{row[p]:.3g}" for p in ("p20", "p50", "p80") if p in row)
                errors = " ".join(f"{n} {e:.1e}" for n, e in row["error"].items())
                cells = [part, rank, name, times or "WRONG", f"{row.get('tflops', 0):.3g}"]
                shown.add_row(*map(str, [*cells, row.get("peak_mib", ""), errors]))
    Console(width=None if sys.stdout.isatty() else 160).print(shown)
    if target:
        document: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "dtype": dtype}
        document |= {"vocabulary": vocabulary, "hidden": hidden, "tokens": tokens}
        document |= {"commit": provenance.commit(HERE), "versions": provenance.versions()}
        document |= {"machine": provenance.machine(), "repeats": repeats, "rows": rows}
        store.write_atomic(target, json.dumps(document, indent=1) + "\n")
    sys.exit(3 if wrong else 0)


if __name__ == "__main__":
    main()
