"""What is answered and not trained on: rows of any format, with their answer or without, as questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlora.data.format import BadRow, to_prompt
from fastlora.data.load import FILE_TYPES, Row, load_table
from fastlora.data.mask import IGNORED, Encoder
from fastlora.errors import DataError
from fastlora.recipe.schema import SourceSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_BAD_ROWS = 10


@dataclass(frozen=True, slots=True)
class Question:
    prompt_ids: list[int]
    expected_ids: list[int] | None
    """The answer that the row holds, without the token that ends it; None where it holds none."""


def last_question(
    ids: Sequence[int], labels: Sequence[int], stop_token_ids: Sequence[int]
) -> Question | None:
    """The last supervised span of a row and what comes before it; None where nothing does."""
    end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    if start == 0:
        return None
    expected = list(ids[start:end])
    if expected and expected[-1] in stop_token_ids:
        expected.pop()
    return Question(list(ids[:start]), expected)


def prompt_encoder(tokenizer: PreTrainedTokenizerBase, template: str) -> Encoder:
    """Lays prompts out as data.template says; as they stand where there is no template, as for training on text."""
    encoder = Encoder(tokenizer, template=template, supervise="completion")
    if encoder.template.source is None:
        return Encoder(tokenizer, template="none", supervise="completion")
    return encoder


def read_prompts(
    source: str | Sequence[str], encoder: Encoder, *, name: str, limit_tokens: int | None = None
) -> list[tuple[int, Question]]:
    """(row number, question) of each row of a data file, or of each string of a list (`name` says whose).

    `encoder` is of `prompt_encoder`. Raises DataError, with all that is wrong: the file cannot be read, rows that
    cannot be asked, prompts of more than `limit_tokens`.
    """
    if isinstance(source, str):
        if not source.lower().endswith(FILE_TYPES):
            raise DataError(
                f"{name}: {source} is not a data file; use one of {', '.join(FILE_TYPES)}"
            )
        table = load_table(SourceSection(path=source))
        place, rows = f"{source}: {table.unit}", table.rows
    else:
        place = f"{name}: item"
        rows = [Row(number, {"prompt": text}) for number, text in enumerate(source, start=1)]
    if not rows:
        raise DataError(
            f"{name}: {source if isinstance(source, str) else 'the list'} holds no prompts"
        )
    questions: list[tuple[int, Question]] = []
    refused = []
    for row in rows:
        try:
            if row.value is None:
                raise BadRow(row.problem)
            asked = _question(row.value, encoder)
            if limit_tokens is not None and len(asked.prompt_ids) > limit_tokens:
                raise BadRow(
                    f"is {len(asked.prompt_ids):,} tokens long; at most {limit_tokens:,} fit"
                )
            questions.append((row.number, asked))
        except BadRow as problem:
            refused.append(f"{place} {row.number}: {problem}")
    if refused:
        shown = refused[:_SHOWN_BAD_ROWS]
        if more := len(refused) - len(shown):
            shown.append(f"and {more} more of {len(rows)} rows")
        raise DataError("\n".join(shown))
    return questions


def _question(row: dict[str, Any], encoder: Encoder) -> Question:
    example, answered = to_prompt(row, templated=encoder.templated)
    if encoder.templated and "text" not in row:
        encoder.require_template()
    if not answered:
        ids = encoder.ask(example)
        if not ids:
            raise BadRow("has no token")
        return Question(ids, None)
    (encoded,) = encoder.encode([encoder.render(example)])
    stops = (encoder.stop_token_id, int(encoder.tokenizer.eos_token_id))
    found = last_question(encoded.input_ids, encoded.labels, stops)
    if found is None:
        raise BadRow("is an answer to nothing")
    return found
