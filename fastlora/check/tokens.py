"""What the model's tokenizer and template make of the rows, and what each length would cut off."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlora.check.findings import Findings
from fastlora.check.rows import Rows, example_of
from fastlora.data.format import BadRow, Chat, Plain
from fastlora.data.mask import IGNORED, Encoded, Encoder, Rendered
from fastlora.errors import DataError, FastloraError
from fastlora.plan.predict import Card, predict
from fastlora.plan.shape import read_config, shape_of
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 500
_SHOWN_LETTERS = 8
_LONGER = (1, 1.5, 2, 4)


@dataclass(slots=True)
class PricedLength:
    """What one model.seq_len_tokens costs, and below what it saves against the chosen one."""

    seq_len_tokens: int
    rows_cut: int = 0
    rows_without_answer: int = 0
    tokens_lost: int = 0
    answer_tokens_lost: int = 0
    peak_gib: float | None = None
    """What training on rows cut there needs of a GPU, as `fastlora plan` predicts it."""


@dataclass(slots=True)
class TokenStats:
    """Of the rows looked at that can be trained on."""

    lengths: list[PricedLength]
    """The chosen one first."""
    rows: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    longest_row_tokens: int = 0

    @property
    def lost_answer_share(self) -> float:
        return self.lengths[0].answer_tokens_lost / max(1, self.answer_tokens)


def check_tokens(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    places: Sequence[int],
    findings: Findings,
) -> TokenStats | None:
    """Rows that the template refuses leave `rows.good`. None where the tokenizer or the template cannot be used."""
    limit = recipe.model.seq_len_tokens
    try:
        encoder = Encoder(tokenizer, template=recipe.data.template, supervise=recipe.data.supervise)
        if encoder.templated and any(rows.source(place).format != "text" for place in places):
            encoder.require_template()
    except DataError as error:
        findings.add_general("template_unusable", str(error))
        return None
    letters = Letters(tokenizer)
    stats = TokenStats([PricedLength(int(limit * factor)) for factor in _LONGER])
    refused: set[int] = set()
    for start in range(0, len(places), _CHUNK):
        laid_out = []
        for place in places[start : start + _CHUNK]:
            row = rows.all[place]
            example = example_of(row, rows, templated=encoder.templated)
            assert not isinstance(example, BadRow)
            try:
                laid_out.append((place, example, encoder.render(example)))
            except BadRow as problem:
                refused.add(place)
                row.problem = problem
                findings.add("template_refused", place, str(problem), f"{row.prompt} -> {row.rest}")
            if lost := letters.lost(f"{row.prompt}{row.rest}"):
                shown = ", ".join(map(repr, lost[:_SHOWN_LETTERS]))
                findings.add("token_lost", place, shown, f"{row.prompt} -> {row.rest}")
        encoded = encoder.encode([rendered for _, _, rendered in laid_out])
        for (place, example, rendered), one in zip(laid_out, encoded, strict=True):
            _count(one, stats)
            for code, detail, shown in _faults(example, rendered, one, encoder, recipe):
                findings.add(code, place, detail, shown)
    rows.good = [place for place in rows.good if place not in refused]
    _add_memory(stats, recipe)
    return stats


class Letters:
    """Which characters come back when they are made tokens and read again. A tokenizer of another kind than the model's
    files were written for loses some without a word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._comes_back: dict[str, bool] = {}

    def lost(self, text: str) -> list[str]:
        letters = set(text)
        for letter in letters - self._comes_back.keys():
            # Others than these, tokenizers may fold and leave out on purpose.
            plain = letter == " " or (
                unicodedata.category(letter)[0] in "LNPS" and letter != "\ufffd"
            )
            self._comes_back[letter] = not plain or self._is_kept(f"a{letter}a")
        return sorted(letter for letter in letters if not self._comes_back[letter])

    def _is_kept(self, text: str) -> bool:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        again = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        # Uncased and normalising tokenizers change a letter, and do not lose it.
        return _folded(text) in _folded(str(again))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _add_memory(stats: TokenStats, recipe: Recipe) -> None:
    """Left out where the model has no config.json that is understood; the tokenizer has brought a Hub model's."""
    with contextlib.suppress(FastloraError):
        shape = shape_of(read_config(recipe.model.name, recipe.model.revision, local=True))
        for priced in stats.lengths:
            model = recipe.model.model_copy(update={"seq_len_tokens": priced.seq_len_tokens})
            longer = recipe.model_copy(update={"model": model})
            # A packed sequence is always full.
            longest = None if recipe.data.packing else stats.longest_row_tokens
            found = predict(longer, shape, Card(gpu=None, vram_gib=None), row_tokens=longest)
            priced.peak_gib = round(found.memory.comfortable_gib, 2)


def _count(row: Encoded, stats: TokenStats) -> None:
    length = len(row.input_ids)
    answer = length - row.labels.count(IGNORED)
    stats.rows += 1
    stats.tokens += length
    stats.answer_tokens += answer
    stats.longest_row_tokens = max(stats.longest_row_tokens, length)
    for priced in stats.lengths:
        lost = length - priced.seq_len_tokens
        if lost <= 0:
            break  # and so at the longer ones
        lost_answer = lost - row.labels[-lost:].count(IGNORED)
        priced.rows_cut += 1
        priced.tokens_lost += lost
        priced.answer_tokens_lost += lost_answer
        priced.rows_without_answer += lost_answer == answer


def _faults(
    example: Chat | Plain, rendered: Rendered, row: Encoded, encoder: Encoder, recipe: Recipe
) -> Iterator[tuple[str, str, str]]:
    """Kind of finding, detail, example."""
    ids, labels, limit = row.input_ids, row.labels, recipe.model.seq_len_tokens
    bos, text = encoder.tokenizer.bos_token_id, rendered.text
    if bos is not None and ids[:2] == [bos, bos]:
        yield "template_bos", encoder.tokenizer.bos_token, text
    supervised = [label for label in labels if label != IGNORED]
    stops = {encoder.tokenizer.eos_token_id, encoder.template.stop_token_id}
    # With data.supervise = "all" a template may write a line break behind it.
    if isinstance(example, Chat) and not stops.intersection(supervised[-3:]):
        yield "template_stop", f"the row ends with {text[-20:]!r}", text[-150:]
    count, lost = len(supervised), max(0, len(ids) - limit)
    lost_answer = lost - labels[limit:].count(IGNORED)
    if lost_answer == count:
        yield "truncated_all", f"it begins after {_first(labels)} of {len(ids)} tokens", text
    elif lost_answer:
        yield "truncated_answer", f"{lost_answer} of {count} answer tokens lost", text[-150:]
    least, most = recipe.check.min_answer_tokens, recipe.check.max_answer_tokens
    if least is not None and count < least:
        yield "answer_short", f"{count} tokens", text[-150:]
    if most is not None and count > most:
        yield "answer_long", f"{count} tokens", text[-150:]


def _first(labels: Sequence[int]) -> int:
    return next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))


def special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> frozenset[str]:
    """Those that would be taken for markup in the words of a row."""
    if tokenizer is None:
        return frozenset()
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    marked = {str(token.content) for token in added.values() if token.special}
    return frozenset(one for one in {*tokenizer.all_special_tokens, *marked} if one.strip())
