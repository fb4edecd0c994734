"""The parts of a run's manifest and files, as its page shows them. Others write them: what is missing is left out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_SHOWN_ROWS = 10


def comparison(path: Path) -> list[dict[str, Any]]:
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


def scores(answers: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each metric."""
    times = [when for when in ("before", "after") if isinstance(answers.get(when), dict)]
    metrics = dict.fromkeys(metric for when in times for metric in answers[when])
    rows = [
        [
            metric.replace("_", " "),
            *(
                shown_score(metric, answers[when][metric]) if metric in answers[when] else ""
                for when in times
            ),
        ]
        for metric in metrics
    ]
    return _aligned(["metric", *times], rows)


def held_out_losses(losses: Sequence[float], before: float | None, to: str) -> str:
    """From the first that is known, which with `before` is the base model's, to the last; and the lowest, where the
    last is above it. Of one alone nothing is said to have changed."""
    known = [*([] if before is None else [before]), *losses]
    ends = [f"{loss:.4f}" for loss in (known if len(known) < 2 else (known[0], known[-1]))]
    best = f"{min(losses):.4f}"
    return to.join(ends) + ("" if best == ends[-1] else f", {best} at best")


def shown_score(metric: str, value: float) -> str:
    """chrF goes to 100; the others are shares."""
    return f"{value:.1f}" if metric == "chrf" else f"{value:.1%}"


def findings(check: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the check found in the data, as the page lists it."""
    listed = []
    for one in check.get("findings") or []:
        rows = one.get("rows") or []
        count = one.get("count", len(rows))
        listed.append(
            {
                "name": str(one.get("kind") or ""),
                "severity": str(one.get("severity") or ""),
                "says": ". ".join(str(one[key]) for key in ("says", "detail") if one.get(key)),
                "count": f"{count:,} row{'' if count == 1 else 's'}",
                "rows": _places(rows[:_SHOWN_ROWS]) + (", ..." if count > _SHOWN_ROWS else ""),
                "example": str(one.get("example") or ""),
            }
        )
    return listed


def _places(rows: Sequence[Mapping[str, Any]]) -> str:
    """`mine.jsonl: line 3, 7; general.jsonl: line 1`."""
    places = defaultdict(list)
    for row in rows:
        unit = "line" if "line" in row else "row"
        places[Path(str(row.get("source"))).name, unit].append(str(row.get(unit)))
    return "; ".join(
        f"{source}: {unit} {', '.join(numbers)}" for (source, unit), numbers in places.items()
    )


def splits(data: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each count, a column for each split: narrow enough for a phone."""
    splits = {name: data[name] for name in ("train", "eval") if isinstance(data.get(name), dict)}
    counts = dict.fromkeys(count for split in splits.values() for count in split)
    rows = [
        [count.replace("_", " "), *(_cell(split.get(count)) for split in splits.values())]
        for count in counts
    ]
    return _aligned(["", *splits], rows)


def sources(sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            key: len(value) if key == "bad_rows" else ", ".join(value) if key == "unread" else value
            for key, value in source.items()
            if key not in ("fingerprint", "detected", "label")
        }
        for source in sources
    ]


def kernels(engaged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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


def exports(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of the export's folder -> what the gate measured."""
    merged = {"merged": manifest["merge"]} if manifest.get("merge") else {}
    return merged | {
        f"gguf-{quant}": report for quant, report in (manifest.get("export") or {}).items()
    }


# What the gate measured, how it is said, and the key of what the base without its adapter would have measured.
_GATE = (
    ("logit_error", "logits differ by", "{:.2%}", "effect"),
    ("kl", "KL, nats a token", "{:.2g}", "kl_forgotten"),
    ("top1_agreement", "same likeliest token", "{:.2%}", "top1_forgotten"),
    ("answers_same", "same answers", "{:,}", "answers_forgotten"),
)
_NOT_SHOWN = ("answer_tokens", *(key for key, _, _, bare in _GATE for key in (key, bare)))


def gate(report: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each of an export's measures, beside what forgetting the adapter would have given."""
    rows = [
        [name, *(form.format(report[key]) if key in report else "" for key in (measured, bare))]
        for measured, name, form, bare in _GATE
        if measured in report
    ]
    return _aligned(["against the adapter", "export", "base alone"], rows)


def beside_gate(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in _NOT_SHOWN}


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


def facts(manifest: Mapping[str, Any], latest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
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


def settings(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, value) as --set takes them, defaults included."""
    flat: list[tuple[str, str]] = []
    for section, values in recipe.items():
        if isinstance(values, dict):
            flat += [(f"{section}.{key}", json.dumps(value)) for key, value in values.items()]
        else:
            flat.append((section, json.dumps(values)))
    return [(key, value) for key, value in flat if value != "null"]
