"""The rows of a recipe's sources, read, checked and laid out."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.data.blend import Role, labels, sources_of
from fastlora.data.format import FIELDS, BadRow, Chat, Plain, detect_format, to_example, unread
from fastlora.data.load import Table, load_table
from fastlora.data.mask import Encoder, Rendered
from fastlora.data.prepared import DataStats
from fastlora.errors import DataError
from fastlora.recipe.schema import DataFormat, Recipe, SourceSection

_SHOWN_BAD_ROWS = 10


@dataclass(frozen=True, slots=True)
class Input:
    source: SourceSection
    table: Table
    role: Role
    label: str


def read_inputs(recipe: Recipe) -> list[Input]:
    wanted = sources_of(recipe.data)
    names = labels([source.path for _, source in wanted])
    return [
        Input(source, load_table(source), role, name)
        for (role, source), name in zip(wanted, names, strict=True)
    ]


def render_rows(
    recipe: Recipe,
    encoder: Encoder,
    inputs: Sequence[Input],
    stats: DataStats,
) -> list[list[Rendered]]:
    """Every good row of each source, laid out; the bad ones refused, or counted if so wished."""
    rendered: list[list[Rendered]] = []
    refused: list[str] = []
    for one in inputs:
        source, table = one.source, one.table
        check_columns(source, table)
        data_format = format_of(source, table)
        if encoder.templated and data_format != "text":
            encoder.require_template()
        columns: set[str] = set()
        bad: list[tuple[int, str]] = []
        good: list[Rendered] = []
        rendered.append(good)
        for row in table.rows:
            try:
                if row.value is None:
                    raise BadRow(row.problem)
                columns.update(
                    key for key, cell in row.value.items() if cell not in (None, "", [], {})
                )
                value = renamed(row.value, source.columns)
                example: Chat | Plain = to_example(value, data_format, templated=encoder.templated)
                good.append(encoder.render(example))
            except BadRow as problem:
                bad.append((row.number, str(problem)))
        stats.sources.append(
            {
                "name": table.name,
                "label": one.label,
                "role": one.role,
                "format": data_format,
                "detected": source.format == "auto",
                "fingerprint": table.fingerprint,
                "unread": unread(columns - {*source.columns.values()}, data_format),
                "rows": len(good),
                "bad_rows": bad,
            }
        )
        if bad and recipe.data.on_bad_row == "error":
            refused += [
                f"{table.name}: {table.unit} {number}: {why}"
                for number, why in bad[:_SHOWN_BAD_ROWS]
            ]
            if len(bad) > _SHOWN_BAD_ROWS:
                refused.append(
                    f"{table.name}: and {len(bad) - _SHOWN_BAD_ROWS} more bad rows of {len(table.rows)}"
                )
    if refused:
        raise DataError(
            "\n".join(
                [
                    *dict.fromkeys(refused),
                    'Mend the rows, or set data.on_bad_row = "skip" to leave them out; `fastlora check` with '
                    "--write-clean keeps what it leaves out in a file, with the reasons.",
                ]
            )
        )
    return rendered


def format_of(source: SourceSection, table: Table) -> DataFormat:
    if source.format != "auto":
        return source.format
    readable = (row.value for row in table.rows if row.value is not None)
    values = list(itertools.islice(readable, 100))
    found = detect_format(renamed(value, source.columns) for value in values)
    if found is None:
        if not values:
            raise DataError(f"{table.name}: no rows; the file is empty or none of it could be read")
        raise DataError(
            f"{table.name}: format not recognised from the columns {', '.join(map(str, values[0]))}. Known: "
            "messages | conversations | instruction+output | prompt+completion | text. "
            'Rename with data.sources = [{ path = "...", columns = { instruction = "question", output = "answer" } }].'
        )
    return found


def check_columns(source: SourceSection, table: Table) -> None:
    """Raises DataError for a field that nothing reads, or a column that is nowhere."""
    values = [row.value for row in table.rows if row.value is not None]
    problems = []
    for field_name, column in source.columns.items():
        if field_name not in FIELDS:
            near = difflib.get_close_matches(field_name, FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(
                f"columns: no field is named {field_name}{hint} Known: {', '.join(FIELDS)}"
            )
        elif values and not any(column in value for value in values):
            problems.append(
                f"columns: {field_name} is to come from {column!r}, which no row has; "
                f"the first has {', '.join(map(str, values[0]))}"
            )
    if problems:
        raise DataError("\n".join(f"{table.name}: {problem}" for problem in problems))


def renamed(value: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    if not columns:
        return value
    return {
        **value,
        **{field: value[column] for field, column in columns.items() if column in value},
    }
