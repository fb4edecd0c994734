"""report.html: a run in one page, made of what its folder holds, whatever state it is in."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora import page
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
    content = page.render(
        "rundir/report.html.j2",
        name="/".join(run.path.absolute().parts[-2:]),
        manifest=defaultdict(lambda: None, manifest),
        status=manifest.get("status", "unknown"),
        headline=_headline(manifest, entries),
        figures=list(_figures(manifest, entries)),
        plots=[(plot.title, Markup(plot.svg), plot.words) for plot in plots(entries)],
        comparison=_comparison(run.path / COMPARISON),
        splits=_splits(manifest.get("data") or {}),
        sources=_sources((manifest.get("data") or {}).get("sources") or []),
        kernels=_kernels(latest.get("kernels") or []),
        notes=latest.get("notes") or [],
        facts=list(_facts(manifest, latest)),
        settings=_settings(manifest.get("recipe") or {}),
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


def _headline(manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The run in one sentence."""
    losses = [e["loss"] for e in entries if e.get("loss") is not None]
    held_out = [e["eval_loss"] for e in entries if e.get("eval_loss") is not None]
    said = []
    if losses:
        steps = max(e.get("step", 0) for e in entries)
        said.append(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {steps:,} steps")
    if held_out:
        said.append(f"held out {held_out[0]:.4f} to {min(held_out):.4f} at best")
    exact = manifest.get("exact_match") or {}
    if exact.get("rows") and "after" in exact:
        rows = exact["rows"]
        said.append(
            f"exact match {exact['before'] / rows:.1%} to {exact['after'] / rows:.1%} of {rows:,} rows"
        )
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


def _comparison(path: Path) -> list[dict[str, Any]]:
    """Each prompt with its answers; none where there is no such file, or a damaged one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [
        {
            "prompt": _text(row.get("prompt")),
            "answers": [
                (label, _text(row[label]))
                for label in ("before", "after", "expected")
                if row.get(label) is not None
            ],
        }
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]


def _text(value: Any) -> str:
    """A prompt may be a list of messages."""
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)


def _splits(data: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each count, a column for each split: narrow enough for a phone."""
    splits = {name: data[name] for name in ("train", "eval") if isinstance(data.get(name), dict)}
    counts = dict.fromkeys(count for split in splits.values() for count in split)
    rows = [
        [count.replace("_", " "), *(_cell(split.get(count)) for split in splits.values())]
        for count in counts
    ]
    return _aligned(["", *splits], rows)


def _sources(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            str(source.get("name", "")),
            str(source.get("format", "")),
            _cell(source.get("rows")),
            _cell(len(source.get("bad_rows") or [])),
        ]
        for source in sources
    ]
    return _aligned(["source", "format", "rows", "bad rows"], rows)


def _kernels(engaged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One for each kernel and reason."""
    kinds = defaultdict(list)
    for row in engaged:
        kinds[row["kernel"], row["reason"]].append((row["kind"], row["count"]))
    return [
        {
            "kernel": kernel,
            "layers": sum(count for _, count in same),
            "of": ", ".join(f"{kind} {count}" for kind, count in same),
        }
        | ({"why no faster one": reason} if reason else {})
        for (kernel, reason), same in kinds.items()
    ]


def _aligned(columns: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """As the page draws it: columns of nothing but figures go to the right."""
    right = [
        all(not cells[i] or cells[i][0].isdigit() for cells in rows) for i in range(len(columns))
    ]
    return {"columns": columns, "rows": rows, "right": right}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(manifest: Mapping[str, Any], latest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of what the figures need to be believed; what is not known is left out."""
    machine = latest.get("machine") or {}
    versions = latest.get("versions") or {}
    gpu = machine.get("gpu") or ("none" if machine else None)
    known = {
        "engine": manifest.get("engine"),
        "computes in": manifest.get("dtype"),
        "seed": manifest.get("seed"),
        "GPU": gpu,
        "GPU memory": machine.get("gpu_gib") and f"{machine['gpu_gib']:g} GiB",
        "compute capability": machine.get("compute_capability"),
        "CUDA": machine.get("cuda"),
        "platform": machine.get("platform"),
        "commit": latest.get("commit"),
        "started": manifest.get("started"),
        "ended": manifest.get("ended"),
        "resumed": ", ".join(str(r.get("at")) for r in manifest.get("resumed") or []),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return ((name, str(value)) for name, value in known.items() if value not in (None, ""))


def _settings(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, value) as --set takes them, defaults included."""
    flat: list[tuple[str, str]] = []
    for section, values in recipe.items():
        if isinstance(values, dict):
            flat += [(f"{section}.{key}", json.dumps(value)) for key, value in values.items()]
        else:
            flat.append((section, json.dumps(values)))
    return [(key, value) for key, value in flat if value != "null"]
