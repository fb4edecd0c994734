"""Times each op of fastlora_kernels against PEFT, and against the products that no version can avoid.

    python benchmarks/kernels.py --budget 200 --json ops.json
    python benchmarks/kernels.py --shapes 4096x4096,4096x14336 --tokens 4096 --ranks 16 --only DoRA,head

A row is one module on one kind of base, forward and backward together: PEFT's layers; ours, the same layers after
fastlora_kernels.attach ("left" to PEFT where that says so); and the floor, x W^T and g W alone, with NF4 dequantized
for each of the two, as nobody has room to keep W. The set-up is training's: base in --dtype and frozen, adapter in
float32, under autocast. A row gets times only if ours is right: output and every gradient err at most twice as much
as PEFT's, against wider arithmetic. TFLOP/s and GB/s are ours: useful work and least traffic, by the median time.

Times come twice on a GPU. Eager: Python launches one kernel after the other, and on small modules that is what takes
the time. Recorded: the same calls as a CUDA graph that is replayed, as a run records its micro-batches, where the GPU's
own time is left. Peaks are of a forward and backward that is launched.
Exit codes: 0 done, targets met or not; 2 wrong usage; 3 an op is wrong.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

# A script's folder comes first on the path, and there transformers and bitsandbytes, which try `import
# kernels`, would get this file. Whatever imports them is therefore imported later, inside functions.
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from opbench import Case, Setting, cases, summary, timing  # noqa: E402

sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULTS = {
    "cuda": (None, "4096,16384", "16,64", 100),
    "cpu": ("256x256,256x896", "128", "8", 10),
}[DEVICE.type]
ARMS = ("floor", "peft", "ours")


def measure(
    case: Case, setting: Setting, repeats: int, seconds: float, replays: timing.Replays | None
) -> dict[str, Any]:
    """One row, as it goes into the JSON: times in ms; `status` is ok, left (to PEFT) or wrong."""
    row, work = begun(case, setting), case.work(setting)
    if setting.compiled:
        # Else rows, which share the classes of their modules, come to a limit, after which nothing is compiled.
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    first = case.arms(setting)
    if "left" in first:
        row |= {"status": "left", "reason": first["left"]}
    else:
        truth = first["truth"]()
        ours, peft = (timing.errors(truth, first[arm]()) for arm in ("ours", "peft"))
        del truth
        row["error"] = {name: [error, peft[name]] for name, error in ours.items()}
        if not timing.right(ours, peft):
            return row | {"status": "wrong"}
    # So many sets that going round them finds nothing in the L2 cache; at tiny sizes 64 must do.
    device = setting.device
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = min(64, max(2, 1 + 2 * cache // work.least_bytes))
    sets = [first, *(case.arms(setting._replace(seed=seed)) for seed in range(1, count))]
    arms = {arm: [each[arm] for each in sets] for arm in ARMS if arm in first}
    add_figures(row, timing.timed(arms, repeats, seconds, device), work)
    if device.type == "cuda":
        for arm in arms:
            row[arm]["peak_mib"] = timing.peak_mib(first[arm])
    if replays is not None:
        found = replays.times(arms, repeats, seconds, device)
        times = {arm: each for arm, each in found.items() if not isinstance(each, str)}
        row["recorded"] = {arm: {"why_not": why} for arm, why in found.items() if arm not in times}
        add_figures(row["recorded"], times, work)
    return row


def add_figures(into: dict[str, Any], times: dict[str, list[float]], work: Any) -> None:
    for arm in (arm for arm in ARMS if arm in times):
        into[arm] = timing.quantiles(times[arm])
        p50, flops = into[arm]["p50"], work.floor_flops if arm == "floor" else work.flops
        into[arm]["tflops"] = flops / p50 / 1e9
        if arm != "floor":
            others = [other for other in ("floor", "peft") if other in times]
            over = {f"over_{other}": p50 / into[other]["p50"] for other in others}
            into[arm] |= {"gb_s": work.least_bytes / p50 / 1e6, **over}


def measure_all(
    todo: Sequence[tuple[Case, Setting]],
    budget: float,
    each: Callable[[Case, Setting], dict[str, Any]],
    done: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """A row for each; those that are not begun within `budget` seconds, and those that there is no room for, say so.
    `done` is called with the rows so far, after each that was begun and at the end."""
    from fastlora.engines.memory import is_out_of_memory

    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    for case, setting in todo:
        spent = time.monotonic() - begin
        if spent > budget:
            rows.append(begun(case, setting) | {"status": "left out", "reason": "no time left"})
            continue
        what = f"{case.name}, {setting.tokens} tokens, rank {setting.rank}"
        click.echo(f"{spent:.0f} s: {what}", err=True)
        try:
            rows.append(each(case, setting))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rows.append(begun(case, setting) | {"status": "no room", "reason": "out of memory"})
        done(rows)
    done(rows)
    return rows


def begun(case: Case, setting: Setting) -> dict[str, Any]:
    """A row without its figures."""
    names = ("group", "op", "model", "shape", "base")
    row = {name: getattr(case, name) for name in names}
    row |= {"tokens": setting.tokens, "rank": setting.rank, "status": "ok"}
    return row | case.work(setting)._asdict()


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    names = "op,model,base,shape,tokens,rank,floor,PEFT,ours,/ PEFT,/ floor,TFLOP/s,GB/s"
    names += ",floor rec.,PEFT rec.,ours rec.,/ PEFT,/ floor,PEFT MiB,ours MiB"
    shown = Table(*names.split(","), title=f"{title}; ms at p50 (eager: p20..p80), rec.: recorded")
    for row in rows:
        cells = [row[name] for name in ("op", "model", "base", "shape", "tokens", "rank")]
        for arm in ARMS:
            cells.append("{p50:.3g} {p20:.3g}..{p80:.3g}".format(**row[arm]) if arm in row else "")
        if row["status"] == "ok":
            figures = (row["ours"][key] for key in ("over_peft", "over_floor", "tflops", "gb_s"))
            cells += [f"{figure:.3g}" for figure in figures]
        else:
            cells[-1] = row["status"].upper() if row["status"] == "wrong" else row["status"]
            cells += [""] * 4
        recorded = row.get("recorded", {})
        for arm in ARMS:
            found = recorded.get(arm, {})
            cells.append(f"{found['p50']:.3g}" if "p50" in found else "no" if found else "")
        ours = recorded.get("ours", {})
        cells += [f"{ours[key]:.3g}" if key in ours else "" for key in ("over_peft", "over_floor")]
        cells += [row.get(arm, {}).get("peak_mib", "") for arm in ("peft", "ours")]
        shown.add_row(*map(str, cells), style="red" if row["status"] == "wrong" else None)
    return shown


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why figures are missing, each reason once with the number of rows and the first of them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        reasons = [f"{row['status']}: {row['reason']}"] if "reason" in row else []
        if row["status"] == "wrong":
            pairs = row["error"].items()
            errors = ", ".join(f"{n} {ours:.1e} (PEFT {peft:.1e})" for n, (ours, peft) in pairs)
            reasons.append(f"WRONG: {errors}")
        for arm, figures in row.get("recorded", {}).items():
            if "why_not" in figures:
                reasons.append(f"{arm} not recorded: {figures['why_not']}")
        for reason in reasons:
            found.setdefault(reason, []).append(summary.called(row))
    return [f"{reason} ({len(names)}: {names[0]})" for reason, names in found.items()]


def listed(_: click.Context, option: click.Parameter, text: str | None) -> list[list[int]] | None:
    """Reads 4096x4096,4096x14336, or 16,64 for other options than shapes."""
    if text is None:
        return None
    item = r"[1-9]\d*x[1-9]\d*" if option.name == "shapes" else r"[1-9]\d*"
    if not re.fullmatch(f"{item}(,{item})*", text):
        example = "4096x4096,4096x14336" if option.name == "shapes" else "16,64"
        raise click.BadParameter(f"{text!r} is not a list like {example}")
    return [[int(number) for number in entry.split("x")] for entry in text.split(",")]


def chosen(every: Sequence[Case], only: str | None) -> list[Case]:
    words = [word.strip().lower() for word in only.split(",")] if only else [""]
    found = [case for case in every if any(word in case.name.lower() for word in words)]
    if not found:
        groups = ", ".join(dict.fromkeys(case.group for case in every))
        raise click.BadParameter(f"nothing is called {only!r}; there are: {groups}")
    return found


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--shapes", default=DEFAULTS[0], callback=listed,
    help="inputs x outputs, for every op; without it, on a GPU, layers of real models",
)  # fmt: skip
@click.option("--tokens", default=DEFAULTS[1], callback=listed)
@click.option("--ranks", default=DEFAULTS[2], callback=listed)
@click.option("--dtype", default="bfloat16", type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option(
    "--compiled", is_flag=True,
    help="both by torch.compile, and of the layers of real models those that unsloth compiles",
)  # fmt: skip
@click.option("--only", help="parts of names, by commas: DoRA, Qwen, nf4")
@click.option("--repeats", default=DEFAULTS[3], type=click.IntRange(min=1), help="at most")
@click.option("--seconds", default=0.2, help="for the repeats of one row, eager and again recorded")
@click.option("--budget", default=float("inf"), help="seconds after which nothing more is begun")
@click.option("--json", "target", type=click.Path(path_type=Path), help="written after each row")
def main(
    shapes: Any, tokens: Any, ranks: Any, dtype: str, compiled: bool, only: str | None, repeats: int,
    seconds: float, budget: float, target: Any,
) -> None:  # fmt: skip
    from fastlora.engines.memory import free_memory
    from fastlora.rundir import provenance, store
    from fastlora.train import graphs

    every = cases.of_shapes(shapes) if shapes else cases.pinned()
    of_case = chosen([*(cases.compiled(every) if compiled else every)], only)
    todo = [  # a budget then leaves something of every group
        (case, Setting(t, r, getattr(torch, dtype), DEVICE, compiled=compiled))
        for (r,) in ranks
        for (t,) in tokens
        for case in of_case
    ]
    replays = timing.Replays(graphs.CudaRecorder()) if graphs.can_record() else None
    document: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "dtype": dtype}
    document["compiled"] = compiled
    document |= {"commit": provenance.commit(HERE), "versions": provenance.versions()}
    document |= {"machine": provenance.machine(), "repeats": repeats, "seconds": seconds}

    def done(rows: list[dict[str, Any]]) -> None:
        if replays is None or not replays.why_not:  # a capture that broke off keeps what there is
            free_memory()
        if target:
            found = {"modules": len(todo), "targets": summary.targets(rows)}
            store.write_atomic(
                target, json.dumps(document | found | {"rows": rows}, indent=1) + "\n"
            )

    rows = measure_all(todo, budget, lambda *one: measure(*one, repeats, seconds, replays), done)
    console = Console(width=None if sys.stdout.isatty() else 260)
    console.print(table(rows, f"{document['machine'].get('gpu', DEVICE)}, {dtype}"))
    console.print(summary.table(rows))
    for line in (*notes(rows), *summary.targets(rows)):
        console.print(line, soft_wrap=True)
    sys.exit(3 if any(row["status"] == "wrong" for row in rows) else 0)


if __name__ == "__main__":
    main()
