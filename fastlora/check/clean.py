"""The rows without those that have an error, in files of their own; the sources stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastlora.check.check import Report
from fastlora.check.rows import Rows
from fastlora.data.blend import sources_of
from fastlora.errors import DataError, UsageError
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import write_atomic

Files = dict[tuple[int, str], Path]
"""(Place of the source, split) -> the file of its rows."""


def plan_files(path: Path, recipe: Recipe) -> Files:
    """PATH; of several sources one file each, since their formats may differ; held-out rows apart, so that no later
    draw mixes them.

    Raises UsageError: before the check is made, for what could not be written or is there already.
    """
    if path.suffix.lower() != ".jsonl":
        raise UsageError(
            f"--write-clean {path}: the rows are written as JSON lines; end the name in .jsonl"
        )
    if not path.parent.is_dir():
        raise UsageError(f"--write-clean {path}: no such folder: {path.parent}; make it first")
    sources_in_order = list(enumerate(sources_of(recipe.data)))
    trained = [(place, source) for place, (role, source) in sources_in_order if role != "eval"]
    held_out = [(place, source) for place, (role, source) in sources_in_order if role == "eval"]
    if recipe.data.eval_split:
        held_out = trained
    files: Files = {}
    for split, sources in (("train", trained), ("eval", held_out)):
        for place, source in sources:
            parts = [path.stem, "eval"] if split == "eval" else [path.stem]
            if len(sources) > 1:
                parts += [str(place + 1), Path(source.path).stem]
            files[place, split] = path.with_name(".".join(parts) + ".jsonl")
    there = [str(file) for file in (*files.values(), removed_file(path)) if file.exists()]
    if there:
        raise UsageError(
            f"--write-clean: {', '.join(there)} would be written over; give another name"
        )
    return files


def removed_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.removed.jsonl")


def write_clean(report: Report, path: Path, files: Files, recipe: Recipe) -> dict[str, Any]:
    """Write the rows as their sources have them, and PATH.removed.jsonl: the rows removed and why.

    Raises DataError: the disk is full, or no row to train on would be left.
    """
    rows = report.rows
    kept: dict[tuple[int, str], list[str]] = {key: [] for key in files}
    removed = []
    for place, row in enumerate(rows.all):
        reasons = report.refused.get(place)
        if reasons is None:
            kept[row.source, rows.split(place)].append(_line(row.value))
        else:
            source = rows.source(place)
            entry = {"source": source.name, source.unit: row.number, "split": rows.split(place)}
            content = row.excerpt if row.value is None else row.value
            removed.append(_line({**entry, "reasons": reasons, "row": content}))
    written = {key: files[key] for key, lines in kept.items() if lines}
    if not any(split == "train" for _, split in written):
        raise DataError(f"{path}: not written: no row to train on would be left")
    try:
        for key, file in written.items():
            write_atomic(file, "".join(kept[key]))
        write_atomic(removed_file(path), "".join(removed))
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    return {
        "rows_kept": sum(map(len, kept.values())),
        "rows_removed": len(removed),
        "files": [str(file) for file in written.values()],
        "removed": str(removed_file(path)),
        "settings": _settings(written, rows, recipe),
    }


def _settings(written: Files, rows: Rows, recipe: Recipe) -> list[str]:
    """What to give `--set` to train on the files: each with the format, columns and weight of its source."""
    entries: dict[str, list[str]] = {}
    for (place, split), file in written.items():
        source = rows.sources[place]
        entry = f"path = {_quoted(str(file))}, format = {_quoted(source.format)}"
        if source.section.columns:
            columns = (f"{name} = {_quoted(to)}" for name, to in source.section.columns.items())
            entry += f", columns = {{ {', '.join(columns)} }}"
        if source.section.weight is not None and split == "train":
            entry += f", weight = {source.section.weight}"
        key = "data.eval_sources"
        if split == "train":
            key = "data.rehearsal.source" if source.role == "rehearsal" else "data.sources"
        entries.setdefault(key, []).append(f"{{ {entry} }}")
    if recipe.data.eval_sources:  # where no held-out row is left, the old ones are not to be taken
        entries.setdefault("data.eval_sources", [])
    settings = [f"{key}=[{', '.join(files)}]" for key, files in entries.items()]
    return settings + (["data.eval_split=0"] if recipe.data.eval_split else [])


def _quoted(text: str) -> str:
    """As a TOML string."""
    return json.dumps(text, ensure_ascii=False)


def _line(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a field that is not trained on
        return json.dumps(value, default=str) + "\n"
    return text
