"""The data side of a run: read, check, lay out, tokenize, mask, truncate, split, pack; with a cache.

Nothing is dropped silently: what is skipped, cut or dropped is counted in DataStats.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.cache import cache_folder
from fastlora.data.blend import Pool, Role, blend, describe, is_mixed, labels, sources_of
from fastlora.data.format import FIELDS, BadRow, Chat, Plain, detect_format, to_example
from fastlora.data.load import Table, load_table
from fastlora.data.mask import IGNORED, Encoded, Encoder, Rendered
from fastlora.data.pack import pack_rows
from fastlora.data.prompts import Question, prompt_encoder, read_prompts
from fastlora.errors import DataError
from fastlora.recipe.schema import DataFormat, Recipe, SourceSection

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Part of the cache key: raise it when the same input would give other tokens.
CACHE_VERSION = 4
_SHOWN_BAD_ROWS = 10
_OPENING_ROWS = 2000
_CHUNK = 1000  # rows per tokenizer call: enough for its threads, little memory

Announce = Callable[[str], None]


@dataclass(slots=True)
class SplitStats:
    rows: int = 0
    """Rows trained on, before packing."""
    sequences: int = 0
    """What the trainer sees: rows, or packed groups of rows."""
    tokens: int = 0
    supervised_tokens: int = 0
    longest_row_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    truncated_supervised_tokens: int = 0
    unsupervised_rows: int = 0
    """Dropped: truncation left them no supervised token."""


@dataclass(slots=True)
class DataStats:
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Per source: name, label (short), role (train, rehearsal or eval), format, fingerprint, rows, bad_rows as
    [number, reason], and of its rows: train and eval (rows and supervised_tokens of each), held_out, dropped."""
    train: SplitStats = field(default_factory=SplitStats)
    eval: SplitStats | None = None
    stop_token: str = ""
    preview: list[tuple[str, bool]] = field(default_factory=list)
    """The first row trained on, as cut, in pieces of text, each with whether it is supervised."""
    key: str = ""
    common_openings: float = 0.0
    """The part of the answers, rehearsal aside, that begin in one of the ten commonest ways."""

    @property
    def bad_rows(self) -> int:
        return sum(len(source["bad_rows"]) for source in self.sources)


@dataclass(frozen=True, slots=True)
class Prepared:
    train: Dataset
    """Columns input_ids and labels (lists of ints); when packed, seq_lengths too."""
    eval: Dataset | None
    """Never packed: held-out loss is per row, and answers are read from its rows."""
    stats: DataStats
    prompts: tuple[Question, ...] = ()
    """Those of eval.prompts."""

    def eval_by_source(self) -> dict[str, Dataset]:
        """The held-out rows of each source that has any, by its label. Together, and in order, they are `eval`."""
        parts: dict[str, Dataset] = {}
        start = 0
        for source in self.stats.sources:
            if (rows := source["eval"]["rows"]) and self.eval is not None:
                parts[source["label"]] = self.eval.select(range(start, start + rows))
                start += rows
        return parts


@dataclass(frozen=True, slots=True)
class _Input:
    source: SourceSection
    table: Table
    role: Role
    label: str


def _read(recipe: Recipe) -> list[_Input]:
    wanted = sources_of(recipe.data)
    names = labels([source.path for _, source in wanted])
    return [
        _Input(source, load_table(source), role, name)
        for (role, source), name in zip(wanted, names, strict=True)
    ]


def prepare_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, announce: Announce
) -> Prepared:
    """Turn a recipe's sources into token ids and labels, from the cache where it holds them.

    Raises DataError: unreadable sources, bad rows (unless data.on_bad_row is "skip"), no rows, no
    supervised token, or prompts that cannot be asked.
    """
    prompts = _prompts(recipe, tokenizer)
    encoder = Encoder(tokenizer, template=recipe.data.template, supervise=recipe.data.supervise)
    inputs = _read(recipe)
    key = _cache_key(recipe, encoder, [one.table for one in inputs])
    folder = cache_folder() / "tokens" / key
    prepared = _read_cache(folder)
    if prepared is None:
        prepared = _prepare(recipe, encoder, inputs, key)
        _write_cache(folder, prepared, announce)
    else:
        announce(f"data: tokens from the cache ({folder})")
    _announce_stats(prepared.stats, recipe, announce)
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


def _prepare(recipe: Recipe, encoder: Encoder, inputs: Sequence[_Input], key: str) -> Prepared:
    stats, limit = DataStats(key=key), recipe.model.seq_len_tokens
    rendered = _examples(recipe, encoder, inputs, stats)
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


def _examples(
    recipe: Recipe,
    encoder: Encoder,
    inputs: Sequence[_Input],
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
        bad: list[tuple[int, str]] = []
        good: list[Rendered] = []
        rendered.append(good)
        for row in table.rows:
            try:
                if row.value is None:
                    raise BadRow(row.problem)
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


def _announce_stats(stats: DataStats, recipe: Recipe, announce: Announce) -> None:
    for source in stats.sources:
        how = "detected" if source["detected"] else "as the recipe says"
        skipped = f", {len(source['bad_rows'])} bad rows skipped" if source["bad_rows"] else ""
        announce(
            f"data: {source['name']}: {source['rows']:,} rows, format {source['format']} ({how}){skipped}"
        )
    for line in describe(stats.sources, recipe.data):
        announce(line)
    for name, split in (("train", stats.train), ("eval", stats.eval)):
        if split is None:
            continue
        share = split.supervised_tokens / max(1, split.tokens)
        announce(
            f"data: {name}: {split.rows:,} rows, {split.sequences:,} sequences, {split.tokens:,} tokens, "
            f"{split.supervised_tokens:,} supervised ({share:.0%})"
        )
        held_out = [source for source in stats.sources if source["eval"]["rows"]]
        if split is stats.eval and len(held_out) > 1:
            parts = [f"{source['label']} {source['eval']['rows']:,}" for source in held_out]
            announce(f"data: eval: rows by source: {', '.join(parts)}")
        if split.truncated_rows:
            announce(
                f"data: {name}: {split.truncated_rows:,} rows cut at {recipe.model.seq_len_tokens} tokens, "
                f"{split.truncated_tokens:,} tokens lost ({split.truncated_supervised_tokens:,} supervised); "
                f"the longest row has {split.longest_row_tokens:,}"
            )
        if split.unsupervised_rows:
            announce(
                f"data: {name}: {split.unsupervised_rows:,} rows dropped: no supervised token is left in them"
            )


def _cache_key(recipe: Recipe, encoder: Encoder, tables: Sequence[Table]) -> str:
    tokenizer = encoder.tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left by whatever call came last; ours sets its own
        content.pop(state, None)
    parts = {
        "version": CACHE_VERSION,
        "data": recipe.data.model_dump(),
        "tables": [table.fingerprint for table in tables],
        "template": encoder.template.source,
        "tokenizer": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "seq_len_tokens": recipe.model.seq_len_tokens,
        "seed": recipe.train.seed if recipe.data.eval_split or is_mixed(recipe.data) else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _read_cache(folder: Path) -> Prepared | None:
    """None where the cache holds nothing usable; a damaged entry is made again."""
    from datasets import load_from_disk

    try:
        raw = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
        raw["train"] = SplitStats(**raw["train"])
        raw["eval"] = SplitStats(**raw["eval"]) if raw["eval"] else None
        raw["preview"] = [(text, supervised) for text, supervised in raw["preview"]]
        stats = DataStats(**raw)
        train = load_from_disk(str(folder / "train"), keep_in_memory=True)
        held_out = load_from_disk(str(folder / "eval"), keep_in_memory=True) if stats.eval else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    splits = ((train, stats.train), (held_out, stats.eval))
    if any(rows is not None and split and len(rows) != split.sequences for rows, split in splits):
        return None
    return Prepared(train, held_out, stats)


def _write_cache(folder: Path, prepared: Prepared, announce: Announce) -> None:
    """Written beside and renamed, so that no reader ever sees half an entry. A full disk costs only the cache."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
        prepared.train.save_to_disk(str(scratch / "train"))
        if prepared.eval is not None:
            prepared.eval.save_to_disk(str(scratch / "eval"))
        (scratch / "stats.json").write_text(json.dumps(asdict(prepared.stats)), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    except OSError as error:
        announce(f"data: tokens not cached: {error}")
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch, ignore_errors=True)
