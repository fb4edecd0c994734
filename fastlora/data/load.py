"""Reading rows: jsonl, json, csv, parquet or a Hub data set, each row with the place it came from."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.data.format import detect_format
from fastlora.errors import DataError
from fastlora.recipe.schema import SourceSection

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
NOT_UTF8 = "not UTF-8"
_EXCERPT_CHARS = 200

# A byte that is not UTF-8 becomes one of these on reading: only the rows that hold one are then bad.
_STRAY_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class Row:
    number: int
    """The line of a jsonl or csv file, else the row's place; from 1."""
    value: dict[str, Any] | None
    problem: str | None = None
    """Why there is no value."""
    excerpt: str = ""
    """The beginning of what could not be read."""


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    unit: str
    """What Row.number counts: `line` or `row`."""
    fingerprint: str
    """sha256 of the file's bytes, or the Hub's fingerprint of the data set."""
    rows: list[Row]


def load_table(source: SourceSection) -> Table:
    """Read one source whole.

    Raises DataError: the file or data set is missing, of an unknown type or unreadable.
    """
    path = Path(source.path)
    if path.suffix.lower() in FILE_TYPES:
        return _load_file(path)
    if path.exists():
        raise DataError(f"{path}: not a data file; use one of {', '.join(FILE_TYPES)}")
    return _load_hub(source)


def _load_file(path: Path) -> Table:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    suffix = path.suffix.lower()
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[suffix]
    try:
        rows = list(read(raw))
    except (ValueError, RecursionError, OSError, csv.Error) as error:
        raise DataError(f"{path}: not readable as {suffix[1:]}: {error}") from None
    unit = "line" if suffix in (".jsonl", ".csv") else "row"
    return Table(str(path), unit, f"sha256:{hashlib.sha256(raw).hexdigest()}", rows)


def _decoded(raw: bytes) -> tuple[str, bool]:
    """The text, and whether it holds stray bytes.

    Raises ValueError for UTF-16 and UTF-32, where every row would be bad.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{NOT_UTF8}; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8-sig", errors="surrogateescape"), True


def _stray_byte(value: Any) -> str | None:
    """What is wrong with a row that was read from text with stray bytes; None if it has none."""
    if isinstance(value, str):
        found = _STRAY_BYTE.search(value)
        if found is None:
            return None
        before = value[max(0, found.start() - 20) : found.start()]
        return f"{NOT_UTF8}: byte 0x{ord(found[0]) - 0xDC00:02x} after {before!r}; save it as UTF-8"
    if isinstance(value, dict):
        value = [*value, *value.values()]
    elif not isinstance(value, list):
        return None
    return next(filter(None, map(_stray_byte, value)), None)


def _row(number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, value)
    problem = f"is {type(value).__name__}, not an object with fields"
    return Row(number, None, problem, _excerpt(value))


def _excerpt(value: Any) -> str:
    return (value if isinstance(value, str) else repr(value))[:_EXCERPT_CHARS]


def _jsonl(raw: bytes) -> Iterator[Row]:
    text, stray = _decoded(raw)
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if stray and (problem := _stray_byte(line)):
            yield Row(number, None, problem, _excerpt(line))
            continue
        try:
            yield _row(number, json.loads(line))
        except json.JSONDecodeError as error:
            problem = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            yield Row(number, None, problem, _excerpt(line))
        except RecursionError:
            yield Row(number, None, "not readable: nested too deeply", _excerpt(line))
        except ValueError as error:  # Python reads no integer of thousands of digits
            problem = f"not readable: {str(error).partition(';')[0]}"
            yield Row(number, None, problem, _excerpt(line))


def _json(raw: bytes) -> Iterator[Row]:
    text, stray = _decoded(raw)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):  # JSON lines under the name .json are common
            yield from _jsonl(raw)
            return
        raise
    if isinstance(document, dict) and detect_format([document]):
        document = [document]
    elif isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError("expected a list of objects, or an object that holds one such list")
        document = lists[0]
    if not isinstance(document, list):
        raise ValueError("expected a list of objects")
    for number, value in enumerate(document, start=1):
        problem = _stray_byte(value) if stray else None
        if problem:
            yield Row(number, None, problem, _excerpt(value))
        else:
            yield _row(number, value)


def _csv(raw: bytes) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    # Not splitlines(): cells may hold U+2028 and its like unquoted.
    text, stray = _decoded(raw)
    header = text.partition("\n")[0]
    # Spreadsheets write semicolons where the comma stands in numbers.
    comma = "," if "," in header else next((mark for mark in ";\t" if mark in header), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=comma)
    if stray and (problem := _stray_byte([*(reader.fieldnames or [])])):
        raise ValueError(f"the header is {problem}")
    line = 2
    for value in reader:
        problem = _stray_byte([*value.values()]) if stray else None
        cells = len(reader.fieldnames or [])
        if None in value:
            problem = problem or f"has more cells than the header's {cells}"
        elif None in value.values():
            problem = problem or f"has fewer cells than the header's {cells}"
        if problem:
            yield Row(line, None, problem, _excerpt([*value.values()]))
        else:
            yield Row(line, dict(value))
        line = reader.line_num + 1


def _parquet(raw: bytes) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, value in enumerate(pq.read_table(pa.BufferReader(raw)).to_pylist(), start=1):
        yield _row(number, _without_padding(value))


def _without_padding(value: Any) -> Any:
    """Arrow gives every object all the keys that the column's others have, with nulls: those are left out."""
    if isinstance(value, dict):
        return {key: _without_padding(one) for key, one in value.items() if one is not None}
    return [_without_padding(one) for one in value] if isinstance(value, list) else value


def _load_hub(source: SourceSection) -> Table:
    import datasets

    name = source.path
    try:
        loaded = datasets.load_dataset(
            name, source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name}: no such file, and not loadable from the Hub ({reason}). Check the spelling; a path "
            "in a recipe is taken from the recipe's folder. Offline, point data.sources at a local file."
        ) from None
    rows = [_row(number, _without_padding(value)) for number, value in enumerate(loaded, start=1)]
    return Table(f"{name}[{source.split}]", "row", f"hub:{loaded._fingerprint}", rows)
