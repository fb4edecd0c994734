"""The data side of a run: read, check, lay out, tokenize, mask, truncate, split, pack; with a cache.

Nothing is dropped silently: what is skipped, cut or dropped is counted in DataStats.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastlora.cache import cache_folder
from fastlora.data.blend import Pool, blend, is_mixed
from fastlora.data.cache import cache_key, read_cache, write_cache
from fastlora.data.mask import IGNORED, Encoded, Encoder, Rendered
from fastlora.data.pack import pack_rows
from fastlora.data.prepared import Announce, DataStats, Prepared, SplitStats, announce_stats
from fastlora.data.prompts import Question, prompt_encoder, read_prompts
from fastlora.data.rows import Input, read_inputs, render_rows
from fastlora.errors import DataError
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_OPENING_ROWS = 2000
_CHUNK = 1000  # rows per tokenizer call: enough for its threads, little memory


def prepare_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, announce: Announce
) -> Prepared:
    """Turn a recipe's sources into token ids and labels, from the cache where it holds them.

    Raises DataError: unreadable sources, bad rows (unless data.on_bad_row is "skip"), no rows, no
    supervised token, or prompts that cannot be asked.
    """
    prompts = _prompts(recipe, tokenizer)
    encoder = Encoder(tokenizer, template=recipe.data.template, supervise=recipe.data.supervise)
    inputs = read_inputs(recipe)
    key = cache_key(recipe, encoder, [one.table for one in inputs])
    folder = cache_folder() / "tokens" / key
    prepared = read_cache(folder)
    if prepared is None:
        prepared = _prepare(recipe, encoder, inputs, key)
        write_cache(folder, prepared, announce)
    else:
        announce(f"data: tokens from the cache ({folder})")
    announce_stats(prepared.stats, recipe, announce)
    if prepared.stats.stop_token != tokenizer.eos_token:
        announce(
            f"data: the chat template ends an answer with {prepared.stats.stop_token!r}, while the tokenizer's EOS is "
            f"{tokenizer.eos_token!r}; the saved model stops at both"
        )
    return replace(prepared, prompts=prompts)


def _prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Question, ...]:
    if not recipe.eval.prompts:
        return ()
    encoder = prompt_encoder(tokenizer, recipe.data.template)
    limit = recipe.model.seq_len_tokens
    read = read_prompts(recipe.eval.prompts, encoder, name="eval.prompts", limit_tokens=limit)
    return tuple(question for _, question in read)


def _prepare(recipe: Recipe, encoder: Encoder, inputs: Sequence[Input], key: str) -> Prepared:
    stats, limit = DataStats(key=key), recipe.model.seq_len_tokens
    rendered = render_rows(recipe, encoder, inputs, stats)
    own = [rows for one, rows in zip(inputs, rendered, strict=True) if one.role == "train"]
    if not any(own):
        names = ", ".join(one.table.name for one in inputs if one.role == "train")
        raise DataError(
            f"{names}: no rows to train on; the data set is empty or every row was skipped"
        )
    # Text alone never meets the template, so it is not to fail on one that takes no plain chat.
    chats = any(not row.special_tokens for rows in own for row in rows)
    stop = encoder.stop_token_id if chats else encoder.tokenizer.eos_token_id
    stats.stop_token = encoder.tokenizer.convert_ids_to_tokens(stop)
    encoded = [_encode(encoder, rows) for rows in rendered]
    pools = [
        Pool(one.label, one.role, one.source.weight, _units(rows, limit, recipe))
        for one, rows in zip(inputs, encoded, strict=True)
        if one.role != "eval"
    ]
    blended = blend(pools, recipe.data, recipe.train.seed)
    train: list[Encoded] = []
    held_out: list[Encoded] = []
    stats.eval = SplitStats() if recipe.data.has_eval else None
    for place, (source, rows) in enumerate(zip(stats.sources, encoded, strict=True)):
        is_eval = place >= len(pools)
        for_train = [] if is_eval else [rows[n] for n in blended.train[place]]
        for_eval = rows if is_eval else [rows[n] for n in blended.held_out[place]]
        source["held_out"] = len(for_eval)
        kept = _truncate(for_train, limit, stats.train)
        source["train"] = _counts(kept)
        source["dropped"] = len(for_train) - len(kept)
        train += kept
        kept_out = _truncate(for_eval, limit, stats.eval) if stats.eval else []
        source["eval"] = _counts(kept_out)
        held_out += kept_out
    if not stats.train.supervised_tokens:
        raise DataError(_no_supervision(stats.train, limit))
    if stats.eval and not stats.eval.supervised_tokens:
        raise DataError(
            "the held-out rows hold no supervised token; hold out more rows or raise model.seq_len_tokens"
        )
    stats.preview = _preview(train[0], encoder)
    own_rows = sum(source["train"]["rows"] for source in stats.sources if source["role"] == "train")
    stats.common_openings = _common_openings(train[:own_rows])
    dataset = _dataset(train, limit if recipe.data.packing else None)
    stats.train.sequences = len(dataset)
    if stats.eval:
        stats.eval.sequences = len(held_out)
    return Prepared(dataset, _dataset(held_out, None) if stats.eval else None, stats)


def _units(rows: Sequence[Encoded], limit: int, recipe: Recipe) -> list[int]:
    """What each row counts in the mix. The first token of a sequence is never predicted."""
    if not is_mixed(recipe.data):
        return [1] * len(rows)  # all of them are taken
    counts = [_supervised(row.labels[1:limit]) for row in rows]
    return counts if recipe.data.mix_unit == "tokens" else [min(1, count) for count in counts]


def _counts(rows: Sequence[Encoded]) -> dict[str, int]:
    return {
        "rows": len(rows),
        "supervised_tokens": sum(_supervised(row.labels[1:]) for row in rows),
    }


def _common_openings(rows: Sequence[Encoded]) -> float:
    """Of 2,000 rows at most, the part whose answer begins with one of the ten commonest three tokens."""
    sample = rows[:: max(1, len(rows) // _OPENING_ROWS)]
    openings = Counter(
        tuple(itertools.islice((label for label in row.labels if label != IGNORED), 3))
        for row in sample
    )
    return sum(count for _, count in openings.most_common(10)) / len(sample)


def _no_supervision(stats: SplitStats, limit: int) -> str:
    if stats.truncated_rows:
        return (
            f"no supervised token is left: all {stats.truncated_rows} rows reach their answer only after "
            f"{limit} tokens. Raise model.seq_len_tokens (the longest row has {stats.longest_row_tokens} tokens)."
        )
    return 'no supervised token in the data; check that the assistant turns hold text, or set data.supervise = "all"'


def _encode(encoder: Encoder, rows: Sequence[Rendered]) -> list[Encoded]:
    encoded: list[Encoded] = []
    for start in range(0, len(rows), _CHUNK):
        encoded += encoder.encode(rows[start : start + _CHUNK])
    return encoded


def _truncate(rows: Sequence[Encoded], limit: int, stats: SplitStats) -> list[Encoded]:
    kept = []
    for row in rows:
        length = len(row.input_ids)
        stats.longest_row_tokens = max(stats.longest_row_tokens, length)
        if length > limit:
            stats.truncated_rows += 1
            stats.truncated_tokens += length - limit
            stats.truncated_supervised_tokens += _supervised(row.labels[limit:])
            row = Encoded(row.input_ids[:limit], row.labels[:limit])
        # The first token of a sequence is never predicted.
        supervised = _supervised(row.labels[1:])
        if not supervised:
            stats.unsupervised_rows += 1
            continue
        stats.rows += 1
        stats.tokens += len(row.input_ids)
        stats.supervised_tokens += supervised
        kept.append(row)
    return kept


def _supervised(labels: Sequence[int]) -> int:
    return len(labels) - labels.count(IGNORED)


def _dataset(rows: Sequence[Encoded], pack_tokens: int | None) -> Dataset:
    from datasets import Dataset, Features, List, Value

    columns: dict[str, list[list[int]]] = {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
    }
    if pack_tokens is not None:
        packs = pack_rows(columns["input_ids"], columns["labels"], pack_tokens)
        columns = {
            name: [pack[name] for pack in packs] for name in ("input_ids", "labels", "seq_lengths")
        }
    return Dataset.from_dict(
        columns, features=Features({name: List(Value("int32")) for name in columns})
    )


def _preview(row: Encoded, encoder: Encoder) -> list[tuple[str, bool]]:
    """The row's own tokens, put together again where supervision does not change."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        supervised = label != IGNORED
        if not pieces or pieces[-1][1] is not supervised:
            pieces.append(([], supervised))
        pieces[-1][0].append(token)
    decode = encoder.tokenizer.decode
    return [(str(decode(ids, skip_special_tokens=False)), supervised) for ids, supervised in pieces]
