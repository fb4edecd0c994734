from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click


def _gib(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(GiB|GB|G)?\s*", value, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise click.BadParameter(f"{value!r} is not an amount of memory; write 24GiB")
    return float(found[1]) * (1e9 / 2**30 if (found[2] or "").upper() == "GB" else 1)


@click.command("bench")
@click.argument("target", metavar="[SUITE|RECIPE]", required=False)
@click.option("--arms", metavar="A,B", help="Engines, with options: peft,liger,unsloth+graphs.")
@click.option("--steps", type=click.IntRange(min=6), help="Optimizer steps of each arm.")
@click.option(
    "--lengths",
    type=click.Choice(["full", "real"]),
    help="Rows all full, or of an instruction set's lengths: padded, and packed.",
)
@click.option("--vram-cap", callback=_gib, metavar="24GiB", help="As on a card of that size.")
@click.option("--model", metavar="PATH", help="A real checkpoint in place of random weights.")
@click.option("--ledger", is_flag=True, help="What each ingredient of the last arm is worth.")
@click.option("--frontier", is_flag=True, help="Longest row and largest batch that fit.")
@click.option(
    "--timeout", "timeout_s", default=900.0, show_default=True, help="Seconds for each process."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the report [default: runs/bench/NAME/N].",
)
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A.json B.json",
    help="Compare two reports instead: what changed by more than their spread.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    target: str | None,
    arms: str | None,
    steps: int | None,
    lengths: str | None,
    vram_cap: float | None,
    model: str | None,
    ledger: bool,
    frontier: bool,
    timeout_s: float,
    out: Path | None,
    compare: tuple[Path, Path] | None,
    as_json: bool,
) -> None:
    """Measure training speed and memory of engines on equal work, gated on correctness.

    SUITE pins a comparison (tiny, llama32-1b, llama31-8b, qwen25-7b); a RECIPE is measured with its own
    model, settings and data. Without either, the suite that fits this machine's GPU. Exit code 3: a gate
    was not met, or --compare found a regression.
    """
    from rich.console import Console

    console = Console()
    if compare:
        from fastlora.bench.compare import compare as compared
        from fastlora.bench.compare import print_comparison, read_report

        comparison = compared(*(read_report(path) for path in compare))
        if as_json:
            click.echo(comparison.model_dump_json())
        else:
            print_comparison(comparison, console)
        sys.exit(3 if comparison.regressed else 0)

    from fastlora.bench.report import print_report, write
    from fastlora.bench.run import Bench, Request
    from fastlora.bench.schema import Arm
    from fastlora.rundir.store import new_folder
    from fastlora.train.stop import Interrupted

    request = Request(
        target=target,
        arms=[Arm.parse(name) for name in arms.split(",")] if arms else [],
        steps=steps,
        lengths=lengths,
        vram_cap_gib=vram_cap,
        model=model,
        ledger=ledger,
        frontier=frontier,
        timeout_s=timeout_s,
        command=shlex.join(["fastlora", *sys.argv[1:]]),
    )
    folder = out or new_folder(Path("runs/bench") / Path(target or "auto").stem)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(request, folder, Console(stderr=True))
    try:
        report = bench.run()
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    write(report, folder)
    if as_json:
        click.echo(report.model_dump_json())
    else:
        print_report(report, console)
        click.echo(f"report    {folder / 'report.html'}")
    if bench.stopped:
        sys.exit(bench.stopped.exit_code)
    if report.status == "red":
        sys.exit(3)
    if not any(arm.status == "ok" for arm in report.arms):
        sys.exit(1)
