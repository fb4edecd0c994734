"""Prepared data on the disk, under a key of all that decides its tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastlora.data.blend import is_mixed
from fastlora.data.load import Table
from fastlora.data.mask import Encoder
from fastlora.data.prepared import Announce, DataStats, Prepared, SplitStats
from fastlora.recipe.schema import Recipe

# Part of the cache key: raise it when the same input would give other tokens or counts.
CACHE_VERSION = 5


def cache_key(recipe: Recipe, encoder: Encoder, tables: Sequence[Table]) -> str:
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


def read_cache(folder: Path) -> Prepared | None:
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


def write_cache(folder: Path, prepared: Prepared, announce: Announce) -> None:
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
