"""Times the loss from the last hidden states, and what it holds: with all logits, by TRL, and ours in chunks.

    python benchmarks/ops_head.py --vocabulary 128256 --hidden 4096 --tokens 4096 --labelled 1,0.25 --ranks 0,16

Forward and backward together, for hidden states and adapter, under autocast with the base in --dtype. `logits` is what
transformers does with PEFT's layer; TRL's loss (its SFTTrainer's, with entropy and accuracy) has no adapter and needs
a GPU. An arm gets numbers only if it is right: every gradient errs at most twice as much as that of `logits`, against
float32; the loss twice as much as a row's loss there, as the errors of rows cancel by chance. TFLOP/s count h W^T and
g W of the labelled rows alone. Peak: allocated above what was there before.
Exit codes: 0 done, 3 a loss is wrong.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

# As in kernels.py, which must not be found in this folder as a module.
HERE = Path(__file__).resolve().parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULTS = {"cuda": (128_256, 4096, 4096, 30), "cpu": (1003, 64, 128, 3)}[DEVICE.type]
Arm = Callable[[], dict[str, Tensor]]


def arms_of(
    vocabulary: int, hidden: int, tokens: int, labelled: float, rank: int, dtype: torch.dtype
) -> dict[str, Arm]:
    """truth (float32), logits, trl where it can, ours: each gives loss, dh and, with an adapter, dA and dB; the first
    two the loss of each row as well."""
    from fastlora_kernels.ops.head_loss import lora_head_loss
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    linear = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype, device=DEVICE)
    model: Any = nn.ModuleDict({"lm_head": linear.requires_grad_(False)})
    layer: Any = linear
    trained: list[Tensor] = []
    if rank:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["lm_head"])
        layer = inject_adapter_in_model(config, model)["lm_head"]
        nn.init.normal_(layer.lora_B.float()["default"].weight, std=0.1 / rank**0.5)
        trained = [layer.lora_A.float()["default"].weight, layer.lora_B["default"].weight]
    x = torch.randn(tokens, hidden, dtype=dtype, device=DEVICE, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE)
    labels[torch.rand(tokens, device=DEVICE) >= labelled] = -100
    items = int((labels != -100).sum())

    def with_gradients(loss: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
        found = (loss.detach(), *torch.autograd.grad(loss, inputs))
        return dict(zip(("loss", "dh", "dA", "dB"), found, strict=False))

    def from_logits(z: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
        rows = functional.cross_entropy(z.float(), labels, reduction="none")
        return {"row": rows.detach()} | with_gradients(rows.sum() / items, inputs)

    def truth() -> dict[str, Tensor]:
        inputs = [t.detach().float().requires_grad_() for t in (x, *trained)]
        z = inputs[0] @ linear.weight.float().T
        if trained:
            z = z + 2 * (inputs[0] @ inputs[1].T) @ inputs[2].T
        return from_logits(z, inputs)

    def logits() -> dict[str, Tensor]:
        with torch.autocast(DEVICE.type, dtype):
            z = layer(x)
        return from_logits(z, [x, *trained])

    def trl() -> dict[str, Tensor]:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

        mask, outputs = labels != -100, ("log_probs", "entropy", "is_top1")
        with torch.autocast(DEVICE.type, dtype):
            log_probs, *_ = _ChunkedLogProbFunction.apply(
                x[mask], linear.weight, None, labels[mask], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
            )  # fmt: skip
        return with_gradients(-log_probs.sum() / items, [x])

    def ours() -> dict[str, Tensor]:
        a, b = trained or (None, None)
        with torch.autocast(DEVICE.type, dtype):
            loss = lora_head_loss(x, linear.weight, None, a, b, 2.0, labels)
        return with_gradients(loss, [x, *trained])

    arms: dict[str, Arm] = {"truth": truth, "logits": logits, "ours": ours}
    if DEVICE.type == "cuda" and not rank:
        arms["trl"] = trl
    return arms


def measure(arms: dict[str, Arm], flops: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Each arm's relative errors (2-norm), and with them right ms at p20, p50, p80, TFLOP/s and peak MiB."""
    truth = arms.pop("truth")()
    rows: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        error = {n: float((t - truth[n]).norm() / truth[n].norm()) for n, t in arm().items()}
        rows[name] = {"error": error}
    eps = torch.finfo(torch.float32).eps
    for row in rows.values():
        allowed = rows["logits"]["error"]
        allowed = allowed | {"loss": max(allowed["loss"], allowed["row"])}
        row["right"] = all(e <= 2 * allowed[n] + eps for n, e in row["error"].items())
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
        p20, p50, p80 = torch.tensor(span).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        rows[name] |= {"p20": p20, "p50": p50, "p80": p80, "tflops": flops / p50 / 1e9}
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
            arms = arms_of(vocabulary, hidden, tokens, part, rank, getattr(torch, dtype))
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
