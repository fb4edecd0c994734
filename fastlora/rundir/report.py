"""report.html: a run in one page, made of what its folder holds, whatever state it is in."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora import page
from fastlora.rundir import sections
from fastlora.rundir.curves import plots
from fastlora.rundir.store import RunDir, write_atomic

REPORT = "report.html"
COMPARISON = "comparison.json"
# Too long to be read, or shown in a place of its own.
_NOT_IN_MANIFEST = ("probe_ids", "preview")


def write_report(run: RunDir) -> Path:
    """Write RUN/report.html from the run's manifest and files. Raises OSError where that cannot be."""
    from markupsafe import Markup

    manifest, entries = run.manifest, [e for e in run.read_metrics() if isinstance(e, dict)]
    # A resumed run may be on another machine, with other versions and kernels.
    latest: dict[str, Any] = (manifest.get("resumed") or [manifest])[-1]
    data, check = manifest.get("data") or {}, latest.get("check") or manifest.get("check") or {}
    content = page.render(
        "rundir/report.html.j2",
        name="/".join(run.path.absolute().parts[-2:]),
        manifest=defaultdict(lambda: None, manifest),
        status=manifest.get("status", "unknown"),
        headline=_headline(manifest, entries),
        figures=list(_figures(manifest, entries)),
        plots=[
            (plot.title, Markup(plot.svg), plot.words)
            for plot in plots([*_before(manifest), *entries])
        ],
        comparison=sections.comparison(run.path / COMPARISON),
        scores=sections.scores(manifest.get("answers") or {}),
        findings=sections.findings(check),
        check={key: value for key, value in check.items() if key != "findings"},
        splits=sections.splits(data),
        sources=sections.sources(data.get("sources") or []),
        kernels=sections.kernels(latest.get("kernels") or []),
        exports=[
            (name, sections.gate(report), sections.beside_gate(report))
            for name, report in sections.exports(manifest).items()
        ],
        notes=latest.get("notes") or [],
        facts=list(sections.facts(manifest, latest)),
        settings=sections.settings(manifest.get("recipe") or {}),
        raw=json.dumps(
            {key: value for key, value in manifest.items() if key not in _NOT_IN_MANIFEST},
            indent=2,
            ensure_ascii=False,
            default=str,
        ),
    )
    target = run.path / REPORT
    # Half of a surrogate pair, which a model may write, is no UTF-8.
    write_atomic(target, content.encode("utf-8", "replace"))
    return target


def keep_report(run: RunDir, say: Callable[[str], None]) -> None:
    """write_report where the page is not what was asked for: whatever happens here, what was made is on the disk."""
    if not run.manifest:  # stopped before it had begun
        return
    try:
        write_report(run)
    except Exception as error:
        say(
            f"report.html could not be written ({type(error).__name__}: {error}); the run is not touched by that. "
            f"To write it later:\n  {shlex.join(['fastlora', 'report', str(run.path)])}"
        )


def _headline(manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The run in one sentence."""
    losses = [e["loss"] for e in entries if e.get("loss") is not None]
    held_out = [e["eval_loss"] for e in entries if e.get("eval_loss") is not None]
    said = []
    if losses:
        steps = max(e.get("step", 0) for e in entries)
        said.append(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {steps:,} steps")
    if held_out:
        before = (manifest.get("eval_before") or {}).get("loss")
        said.append(f"held out {sections.held_out_losses(held_out, before, ' to ')}")
    answers = manifest.get("answers") or {}
    for metric, *values in sections.scores(answers)["rows"]:
        if len(values) == 2 and all(values):
            of = answers.get("rows" if metric == "json valid" else "expected", 0)
            said.append(f"{metric} {values[0]} to {values[1]} of {of:,} answers")
    sentence = "; ".join(said) or "no step was logged"
    return sentence[0].upper() + sentence[1:]


def _figures(
    manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """(name, value) of what is asked first; of a run that did not end, from what it logged."""
    result = manifest.get("result") or {}
    last: Mapping[str, Any] = next((entry for entry in reversed(entries) if "tokens" in entry), {})
    speeds = sorted(entry["tokens_per_s"] for entry in entries if entry.get("tokens_per_s"))
    known = {
        "steps": (result.get("steps") or last.get("step"), "{:,}"),
        "tokens": (result.get("tokens") or last.get("tokens"), "{:,}"),
        "tokens/s, median": (
            result.get("tokens_per_s_median") or (speeds and speeds[len(speeds) // 2]) or None,
            "{:,.0f}",
        ),
        "peak reserved": (
            result.get("peak_reserved_gib") or last.get("peak_reserved_gib"),
            "{:.2f} GiB",
        ),
        "trained for": (result.get("seconds"), "{:,.0f} s"),
        "best step": (result.get("best_step"), "{:,}"),
    }
    for name, (value, form) in known.items():
        if value is not None:
            yield name, form.format(value)


def _before(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The held-out loss before the first step, as an entry of the metrics."""
    if before := manifest.get("eval_before"):
        yield {
            "step": 0,
            "eval_loss": before.get("loss"),
            "eval_loss_by_source": before.get("by_source") or {},
        }
