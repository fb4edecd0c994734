"""All rows of a recipe as the check looks at them: those that cannot be read too, each with its place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora.data.blend import Pool, Role, blend, is_mixed, sources_of
from fastlora.data.format import BadRow, Chat, Plain, to_example
from fastlora.data.load import load_table
from fastlora.data.rows import check_columns, format_of, renamed
from fastlora.errors import DataError
from fastlora.recipe.schema import DataFormat, Recipe, SourceSection

_SURROGATE = re.compile("[\ud800-\udfff]")


class HalfCharacter(BadRow):
    """Half of a surrogate pair, which no encoding can write."""


@dataclass(frozen=True, slots=True)
class Source:
    section: SourceSection
    name: str
    unit: str
    """What a row's number counts: `line` or `row`."""
    format: DataFormat
    role: Role

    @property
    def eval(self) -> bool:
        """One of data.eval_sources."""
        return self.role == "eval"


@dataclass(slots=True)
class Row:
    source: int
    """Place in Rows.sources."""
    number: int
    value: dict[str, Any] | None
    problem: BadRow | None = None
    """Why it is no example."""
    excerpt: str = ""
    """The beginning of what could not be read."""
    prompt: str = ""
    """All that is said before the first answer that is taught."""
    answers: tuple[str, ...] = ()
    """The answers that are taught. Of a text all is."""
    rest: str = ""
    """The first answer, and what follows it."""


@dataclass(slots=True)
class Rows:
    sources: list[Source] = field(default_factory=list)
    all: list[Row] = field(default_factory=list)
    good: list[int] = field(default_factory=list)
    """Places in `all` of the rows that can be trained on."""
    held_out: set[int] = field(default_factory=set)
    """Places in `all` of the rows that are not trained on."""

    def source(self, place: int) -> Source:
        return self.sources[self.all[place].source]

    def split(self, place: int) -> str:
        return "eval" if place in self.held_out or self.source(place).eval else "train"

    def where(self, place: int) -> str:
        return f"{self.unit(place)} {self.all[place].number}"

    def unit(self, place: int) -> str:
        """`rows.jsonl: line`; with the folders only where two files have the same name."""
        source = self.source(place)
        short = Path(source.name).name
        alone = sum(Path(other.name).name == short for other in self.sources) == 1
        return f"{short if alone else source.name}: {source.unit}"


def read_rows(recipe: Recipe) -> Rows:
    """Raises DataError: a source that is missing, unreadable as a whole, or of no known format."""
    rows = Rows()
    templated = recipe.data.template != "none"
    for role, section in sources_of(recipe.data):
        table = load_table(section)
        if not table.rows:
            raise DataError(f"{table.name}: no rows; the file is empty or holds a header alone")
        check_columns(section, table)
        readable = any(row.value is not None for row in table.rows)
        data_format = format_of(section, table) if readable else "text"
        rows.sources.append(Source(section, table.name, table.unit, data_format, role))
        for read in table.rows:
            row = Row(len(rows.sources) - 1, read.number, read.value)
            if read.problem is not None:
                row.problem, row.excerpt = BadRow(read.problem), read.excerpt
            else:
                _fill(row, example_of(row, rows, templated=templated))
            rows.all.append(row)
    rows.good = [place for place, row in enumerate(rows.all) if row.problem is None]
    return rows


def example_of(row: Row, rows: Rows, *, templated: bool) -> Chat | Plain | BadRow:
    """Made anew at each call: to keep the examples of all rows would double the memory."""
    source = rows.sources[row.source]
    assert row.value is not None
    try:
        return to_example(
            renamed(row.value, source.section.columns), source.format, templated=templated
        )
    except BadRow as problem:
        return problem


def _fill(row: Row, example: Chat | Plain | BadRow) -> None:
    match example:
        case BadRow():
            row.problem = example
        case Plain():
            row.prompt, row.rest, row.answers = (
                example.prompt, example.completion, (example.completion,)
            )  # fmt: skip
        case Chat():
            taught = [
                place
                for place, turn in enumerate(example.messages)
                if turn["role"] == "assistant" and place not in example.given
            ]
            said = [turn["content"] for turn in example.messages]
            row.prompt = "\n\n".join(said[: taught[0]])
            row.rest = "\n\n".join(said[taught[0] :])
            row.answers = tuple(said[place] for place in taught)
    if found := _SURROGATE.search(row.prompt) or _SURROGATE.search(row.rest):
        row.problem = HalfCharacter(f"holds {found[0]!r}, half of a surrogate pair")


def hold_out(rows: Rows, recipe: Recipe) -> str:
    """Mark the rows that a run would hold out: those of data.eval_sources, or the same draw of data.eval_split. In a
    mix by tokens the sources' parts, and so how many rows of each, are estimated by the letters of the answers.

    Returns why a run would refuse to draw from these rows; they are still worth a look.
    """
    data = recipe.data
    rows.held_out = {place for place in rows.good if rows.source(place).eval}
    if not data.eval_split:
        return ""
    places: list[list[int]] = [[] for _ in rows.sources]
    for place in rows.good:
        places[rows.all[place].source].append(place)
    by_letters = is_mixed(data) and data.mix_unit == "tokens"
    pools = [
        Pool(
            f"{number} {source.name}",
            source.role,
            source.section.weight,
            [sum(map(len, rows.all[place].answers)) if by_letters else 1 for place in of_source],
        )
        for number, (source, of_source) in enumerate(zip(rows.sources, places, strict=True))
    ]
    try:
        drawn = blend(pools, data, recipe.train.seed).held_out
    except DataError as error:
        return str(error)
    rows.held_out = {
        of_source[n] for of_source, taken in zip(places, drawn, strict=True) for n in taken
    }
    return ""
