"""Rewrites the figures in README.md from benchmarks/results/*/report.json, so that none is typed by hand.

python benchmarks/readme.py          # what lies between the two markers is made anew
python benchmarks/readme.py --check  # exit 1 if README.md is not what it would be

Of each benchmark (suite, model, lengths, cap, frontier, quantization) the newest report counts, whatever its GPU; one
that was interrupted before two arms were measured, or that no commit can repeat, is left out with a line on stderr.
Arms that an interrupted one did not come to are not shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastlora.bench.compare import read_report
from fastlora.bench.schema import Report
from fastlora.bench.summary import Row, headline, is_real, rows
from fastlora.bench.tables import Table, frontier_table, gates, gib, spread, times
from fastlora.errors import UsageError
from fastlora.rundir.store import write_atomic

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def gpu(report: Report) -> str:
    return str((report.environment.get("machine") or {}).get("gpu") or "CPU")


def quantization(report: Report) -> str:
    model = (report.settings.get("recipe") or {}).get("model") or {}
    return str(model.get("quantization") or "")


def label(report: Report) -> str:
    """The suite, and what else tells two of its reports apart; full rows and no cap go without saying."""
    parts = [
        report.name,
        report.model if report.model != report.name else "",
        quantization(report),
        "real lengths" if is_real(report) else "",
        f"{report.vram_cap_gib:g} GiB" if report.vram_cap_gib else "",
        "frontier" if report.frontier else "",
    ]
    return ", ".join(filter(None, parts))


def unfit(report: Report) -> str | None:
    """Why a report is not shown."""
    if (count := len(measured(report).arms)) < min(2, len(report.arms)):
        return f"it was interrupted after {count} arms"
    if not report.environment.get("commit"):
        return "it names no commit"
    if report.environment.get("dirty"):
        return "it was measured with changes that no commit holds"
    return None


def measured(report: Report) -> Report:
    """Without the arms that it did not come to."""
    arms = [arm for arm in report.arms if arm.status != "interrupted"]
    return report.model_copy(update={"arms": arms})


def when(report: Report) -> datetime:
    """A time without a zone is taken as UTC. Raises ValueError: not a time."""
    moment = datetime.fromisoformat(report.started)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def newest(root: Path) -> list[tuple[Path, Report]]:
    """(folder, report) per benchmark, in their order. Raises UsageError: a report that is none."""
    found: dict[tuple[str | float, ...], tuple[Path, Report]] = {}
    # Shown in docs/plan.md.
    of_plan = {path.stem for path in root.glob("benchmarks/suites/plan/*.toml")}
    for path in sorted(root.glob("benchmarks/results/*/report.json")):
        report = read_report(path)
        if report.name in of_plan:
            continue
        if why := unfit(report):
            print(f"{path.relative_to(root)}: left out: {why}", file=sys.stderr)
            continue
        cap = report.vram_cap_gib or 0.0
        key = (
            report.name, report.model, is_real(report), cap, bool(report.frontier), quantization(report)
        )  # fmt: skip
        try:
            if key not in found or when(report) > when(found[key][1]):
                found[key] = (path.parent, measured(report))
        except ValueError:
            raise UsageError(f"{path}: started: {report.started!r} is not an ISO time") from None
    return [found[key] for key in sorted(found)]


def block(root: Path) -> str:
    """What README.md should have between the markers, in Markdown."""
    reports = newest(root)
    parts = [markdown(arms(reports)), "\n".join(source(root, *each) for each in reports)]
    frontiers = frontier([report for _, report in reports])
    if frontiers.rows:
        parts.append("The most that fits:\n\n" + markdown(frontiers.trimmed))
    return "\n\n".join(parts) if reports else "No benchmark has been measured yet."


def arms(reports: Sequence[tuple[Path, Report]]) -> Table:
    firsts = {report.arms[0].arm for _, report in reports if report.arms}
    first = f"x {firsts.pop()}" if len(firsts) == 1 else "x first arm"
    columns = ["suite", "GPU", "arm", "tokens/s [p20..p80]", first, "timed steps"]
    columns += ["peak reserved GiB", first, "gates"]
    cells = [
        [
            label(report),
            gpu(report),
            row.arm.arm,
            speed(report, row),
            "~1" if row.within_noise else times(row.speed_ratio),
            timed_steps(report, row),
            gib(row.arm.peak_reserved_gib),
            times(row.memory_ratio),
            gates(row) if row.sound else row.why_empty,
        ]
        for _, report in reports
        for row in rows(report)
    ]
    return Table(columns, cells)


def speed(report: Report, row: Row) -> str:
    supervised = " supervised" if headline(report) == "supervised_tokens_per_s" else ""
    return spread(row.speed) + supervised if row.speed else ""


def timed_steps(report: Report, row: Row) -> str:
    """Those after warm-up; nothing where no speed is shown, or the report does not say."""
    steps = row.arm.counted.get("steps") or len(row.arm.losses)
    warmup = (report.settings.get("work") or {}).get("warmup_steps")
    return str(steps - warmup) if row.speed and steps and warmup is not None else ""


def source(root: Path, folder: Path, report: Report) -> str:
    """Where a benchmark's figures come from."""
    commit = str(report.environment["commit"])[:12]
    page = (folder / "report.html").relative_to(root).as_posix()
    made = f"{when(report):%Y-%m-%d}, commit {commit}"
    return f"- {escape(label(report))} on {escape(gpu(report))}: {made}, [report]({page})"


def frontier(reports: Sequence[Report]) -> Table:
    tables = [(report, frontier_table(report)) for report in reports]
    columns = ["suite", "GPU", *tables[0][1].columns] if tables else []
    return Table(
        columns,
        [[label(report), gpu(report), *cells] for report, table in tables for cells in table.rows],
    )


def markdown(table: Table) -> str:
    rules = ["---:" if right else "---" for right in table.right]
    lines = [table.columns, rules, *([escape(cell) for cell in cells] for cells in table.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escape(text: str) -> str:
    """Names come from users: none may end a cell or open a tag."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it would")
    check = parser.parse_args(arguments).check
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{readme}: the markers {BEGIN} and {END} are missing; put them in", file=sys.stderr)
        return 2
    try:
        made = f"{before}{BEGIN}\n{block(root)}\n{END}{after}"
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if made == text:
        return 0
    if check:
        print(f"{readme}: not in sync; run python benchmarks/readme.py", file=sys.stderr)
        return 1
    write_atomic(readme, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
