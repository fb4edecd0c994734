"""report.html: everything of a report in one file that opens anywhere, also without a network."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping

from fastlora import page
from fastlora.bench.schema import Report
from fastlora.bench.summary import is_real, rows, verdict
from fastlora.bench.tables import arms_table, frontier_table, ledger_table


def render(report: Report, plots: Mapping[str, bytes]) -> str:
    """The page, with the plots (title -> PNG) as data URIs. Every string of the report is escaped."""
    return page.render(
        "bench/report.html.j2",
        report=report,
        verdict=verdict(report),
        command=command(report),
        facts=facts(report),
        shown=rows(report),
        real=is_real(report),
        plots=[
            (title, base64.b64encode(png).decode("ascii")) for title, png in plots.items() if png
        ],
        arms=arms_table(report).trimmed,
        ledger=ledger_table(report).trimmed,
        frontier=frontier_table(report).trimmed,
        settings=json.dumps(report.settings, indent=2, default=str),
        environment=json.dumps(report.environment, indent=2, default=str),
    )


def command(report: Report) -> str:
    """What repeats the benchmark: as it was typed if the settings have it, else what asks for as much."""
    settings = report.settings
    if typed := settings.get("command"):
        return str(typed)
    words = ["fastlora", "bench", report.name, "--arms", ",".join(arm.arm for arm in report.arms)]
    for key in ("steps", "lengths"):
        if key in (settings.get("work") or {}):
            words += [f"--{key}", str(settings["work"][key])]
    if report.vram_cap_gib is not None:
        words += ["--vram-cap", f"{report.vram_cap_gib:g}GiB"]
    if report.frontier:
        words.append("--frontier")
    return shlex.join(words)


def facts(report: Report) -> list[tuple[str, str]]:
    """(name, value) of what a figure needs to be believed; what is not known is left out."""
    environment = report.environment
    machine, ceilings = environment.get("machine") or {}, environment.get("ceilings") or {}
    versions = environment.get("versions") or {}
    commit = environment.get("commit")
    found = {
        "model": report.model,
        "GPU": machine.get("gpu", "none"),
        "GPU memory": _unit(machine.get("gpu_gib"), "GiB"),
        "memory cap": _unit(report.vram_cap_gib, "GiB"),
        "driver": environment.get("driver"),
        "measured ceilings": ", ".join(
            filter(
                None,
                (
                    _unit(ceilings.get("gemm_tflops"), "TFLOP/s"),
                    _unit(ceilings.get("copy_gb_s"), "GB/s"),
                    _unit(ceilings.get("host_gb_s"), "GB/s from the host"),
                ),
            )
        ),
        "commit": commit and commit + (" with changes" if environment.get("dirty") else ""),
        "started": report.started,
        "took": f"{report.seconds:,.0f} s",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:,g} {unit}"
