"""What is made of a measured benchmark: a table on the console, and a folder that can be kept.

report.json   the report, whole
rows.csv      a row per arm and metric, for pandas
speed.png  memory.png
report.html   one page with everything in it, that asks the network for nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fastlora.bench.schema import Arm, Report, Spread
from fastlora.bench.summary import METRICS, Row, rows, verdict
from fastlora.bench.tables import Table, arms_table, frontier_table, ledger_table
from fastlora.rundir.store import write_atomic

if TYPE_CHECKING:
    import pandas


def frame(report: Report) -> pandas.DataFrame:
    """Long rows, one per arm and metric (`tokens_per_s`, `supervised_tokens_per_s`, `step_s`); memory in GiB.

    An arm without a speed has one row, `tokens_per_s`, with empty figures.
    """
    import pandas

    return pandas.DataFrame(
        [
            _frame_row(report, row, metric, figures)
            for row in rows(report)
            for metric, figures in _speeds(row)
        ]
    )


def _speeds(row: Row) -> Iterator[tuple[str, Spread | None]]:
    found = [(metric, getattr(row.arm, metric)) for metric in METRICS]
    yield from [(metric, figures) for metric, figures in found if figures] or found[:1]


def _frame_row(report: Report, row: Row, metric: str, figures: Spread | None) -> dict[str, Any]:
    recipe = report.settings.get("recipe") or {}
    model, lora, train = (recipe.get(section) or {} for section in ("model", "lora", "train"))
    targets = lora.get("target_modules")
    environment, arm = report.environment, row.arm
    return {
        "suite": report.name,
        "arm": arm.arm,
        "model": report.model,
        "quantization": model.get("quantization"),
        "rank": lora.get("rank"),
        "targets": " ".join(targets) if isinstance(targets, list) else targets,
        **_batches(arm.arm, train),
        "seq_len_tokens": model.get("seq_len_tokens"),
        "lengths": (report.settings.get("work") or {}).get("lengths"),
        "metric": metric,
        "p20": figures and figures.p20,
        "p50": figures and figures.p50,
        "p80": figures and figures.p80,
        "peak_allocated_gib": arm.peak_allocated_gib,
        "peak_reserved_gib": arm.peak_reserved_gib,
        "driver_gib": arm.driver_gib,
        "host_gib": arm.host_gib,
        "mfu": arm.mfu,
        "hfu": arm.hfu,
        "gates": row.gates,
        "status": arm.status,
        "gpu": (environment.get("machine") or {}).get("gpu"),
        "driver": environment.get("driver"),
        "versions": " ".join(f"{k}={v}" for k, v in (environment.get("versions") or {}).items()),
        "commit": environment.get("commit"),
        "dirty": environment.get("dirty"),
        "timestamp": report.started,
    }


def _batches(arm: str, train: dict[str, Any]) -> dict[str, int | None]:
    size, accumulation = train.get("micro_batch"), _accumulation(train)
    own = Arm.parse(arm).micro_batch
    if own is not None and size and accumulation:
        size, accumulation = own, size * accumulation // own
    return {"micro_batch": size, "accumulation": accumulation}


def _accumulation(train: dict[str, Any]) -> int | None:
    """As TrainSection.accumulation_steps, of a dumped section."""
    if not train:
        return None
    if train.get("effective_batch") is not None:
        return int(train["effective_batch"] // train["micro_batch"])
    return train.get("accumulation") or 1


def write(report: Report, folder: Path) -> None:
    """Fill `folder`, made if need be. Each file appears whole; report.json comes first, since only it
    cannot be made again. Raises OSError where the folder is not writable."""
    from fastlora.bench.page import render
    from fastlora.bench.plots import loss_plot, memory_plot, speed_plot

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    write_atomic(folder / "rows.csv", frame(report).to_csv(index=False))
    plots = {"Speed": speed_plot(report), "Memory": memory_plot(report)}
    for title, png in plots.items():
        write_atomic(folder / f"{title.lower()}.png", png)
    loss = loss_plot(report)
    page = render(report, plots | ({"Loss": loss} if loss else {}))
    write_atomic(folder / "report.html", page)


def print_report(report: Report, console: Console) -> None:
    """The arms, what is red and why, ledger and frontier if there are any, and the verdict."""
    cap = f", at most {report.vram_cap_gib:g} GiB" if report.vram_cap_gib else ""
    of = f"  {report.model}" if report.model != report.name else ""
    console.print(Text(f"{report.name}{of}{cap}", style="bold"))
    show(arms_table(report).trimmed, console)
    for row in rows(report):
        for line in _reasons(row):
            console.print(Text(line, style="red"))
    for title, table in (("Ledger", ledger_table(report)), ("Frontier", frontier_table(report))):
        if table.rows:
            console.print(title, style="bold")
            show(table.trimmed, console)
    console.print(Text(verdict(report), style="bold"))


def _reasons(row: Row) -> Iterator[str]:
    """A line per red gate; for an arm that failed otherwise, what went wrong."""
    for gate in row.arm.gates:
        if not gate.passed:
            yield f"{row.arm.arm}: {gate.name}: {gate.detail}"
    if row.arm.status != "ok" and not row.failed_gates:
        yield f"{row.arm.arm}: {row.why_empty}" + (f": {row.arm.detail}" if row.arm.detail else "")


def show(table: Table, console: Console) -> None:
    """Cells are Text, so that a name such as `[red]` stays a name.

    On a narrow console names and sentences break, figures never: half of one is another. What then does
    not fit runs over the edge rather than being cut off.
    """
    drawn = RichTable(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for index, (name, right) in enumerate(zip(table.columns, table.right, strict=True)):
        lines = [line for cells in table.rows for line in _lines(cells[index])]
        widest = max(map(len, lines), default=0)
        breaks = index == 0 or widest > 30
        drawn.add_column(
            Text(name.replace(" ", "\n") if right else name),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=not breaks,
            min_width=min(widest, 12) if breaks else widest,
        )
    for cells in table.rows:
        drawn.add_row(*(Text("\n".join(_lines(cell))) for cell in cells))
    console.print(drawn, crop=False)


def _lines(cell: str) -> list[str]:
    """An interval goes below its p50."""
    return cell.replace(" [", "\n[").split("\n")
