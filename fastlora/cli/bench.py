from __future__ import annotations

import contextlib
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click
from click.core import ParameterSource

from fastlora.cli.options import gib, json_option
from fastlora.errors import RunDirError, UsageError

if TYPE_CHECKING:
    from fastlora.bench.run import Request
    from fastlora.bench.schema import Report


def _seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value) or value < 1:
        raise click.BadParameter(f"{value:g} is not a number of seconds, 1 or more")
    return value


@click.command("bench")
@click.argument("target", metavar="[SUITE|RECIPE]", required=False)
@click.option("--arms", metavar="A,B", help="Engines, with options: peft,liger,unsloth+graphs.")
@click.option("--steps", type=click.IntRange(min=6), help="Optimizer steps of each arm.")
@click.option(
    "--lengths",
    type=click.Choice(["full", "real"]),
    help="Rows all full, or of an instruction set's lengths: padded, and packed.",
)
@click.option("--vram-cap", callback=gib, metavar="24GiB", help="As on a card of that size.")
@click.option("--model", metavar="PATH", help="A real checkpoint in place of random weights.")
@click.option("--ledger", is_flag=True, help="What each ingredient of the last arm is worth.")
@click.option("--frontier", is_flag=True, help="Longest row and largest batch that fit.")
@click.option(
    "--timeout",
    "timeout_s",
    default=900.0,
    show_default=True,
    callback=_seconds,
    help="Seconds for each process.",
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
@json_option
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

    SUITE pins a comparison, such as llama31-8b (a name that is none shows all); a RECIPE is measured with its
    own model, settings and data. Without either, the suite that fits this machine's GPU. Exit code 3: a gate
    was not met, or --compare found a regression.
    """
    from fastlora.train.stop import Interrupted, StopSignals

    try:
        with StopSignals():  # from here on: the imports alone take seconds
            if compare:
                _compares_alone()
                sys.exit(_compare(compare, as_json))

            from fastlora.bench.run import Request
            from fastlora.bench.schema import Arm

            request = Request(
                target=target,
                arms=[Arm.parse(name) for name in arms.split(",")] if arms is not None else [],
                steps=steps,
                lengths=lengths,
                vram_cap_gib=vram_cap,
                model=model,
                ledger=ledger,
                frontier=frontier,
                timeout_s=timeout_s,
                command=shlex.join(["fastlora", *sys.argv[1:]]),
            )
            sys.exit(_measure(request, out, as_json))
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)


def _compares_alone() -> None:
    """Raises UsageError: what nothing would be made of was typed beside --compare."""
    context = click.get_current_context()
    others = [
        option.metavar if isinstance(option, click.Argument) else option.opts[0]
        for option in context.command.params
        if option.name not in ("compare", "as_json")
        and context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    ]
    if others:
        raise UsageError(
            f"--compare reads two reports and measures nothing; leave out {', '.join(map(str, others))}"
        )


def _compare(reports: tuple[Path, Path], as_json: bool) -> int:
    from rich.console import Console

    from fastlora.bench.compare import compare, print_comparison, read_report

    comparison = compare(*(read_report(path) for path in reports))
    if as_json:
        click.echo(comparison.model_dump_json())
    else:
        print_comparison(comparison, Console())
    return 3 if comparison.regressed else 0


def _measure(request: Request, out: Path | None, as_json: bool) -> int:
    """The exit code."""
    from rich.console import Console

    from fastlora.bench.run import Bench, check

    check(request)
    folder = _folder(request.target, out)
    stdout = sys.stdout
    bench = Bench(request, folder, Console(stderr=True))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout is for the result
            report = bench.run(lambda report: _keep(report, folder, as_json, stdout))
    except UsageError:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)  # nothing but the probe's log
        raise
    if bench.stopped:
        return bench.stopped.exit_code
    if report.status == "red":
        return 3
    return 0 if any(arm.status == "ok" for arm in report.arms) else 1


def _folder(target: str | None, out: Path | None) -> Path:
    from fastlora.rundir.store import make_folder, new_folder

    if out is None:
        return new_folder(
            Path("runs/bench") / Path(target or "auto").stem, "name a folder with --out"
        )
    if (out / "report.json").exists():
        raise UsageError(f"--out {out}: holds a report already; name another folder")
    make_folder(out, "name another folder with --out")
    return out


def _keep(report: Report, folder: Path, as_json: bool, stdout: TextIO) -> None:
    """Print, then write: a full disk must not cost the measurement, nor a closed pipe the report."""
    from rich.console import Console

    from fastlora.bench.report import print_report, write

    try:
        if as_json:
            click.echo(report.model_dump_json(), file=stdout)
        else:
            print_report(report, Console(file=stdout))
    finally:
        try:
            write(report, folder)
        except OSError as error:
            raise RunDirError(f"{folder}: the report cannot be written: {error}") from None
    if not as_json:
        click.echo(f"report    {folder / 'report.html'}", file=stdout)
