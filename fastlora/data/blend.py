"""Which rows of which source are trained on, and which are held out.

The unit of a mix is the supervised token or the row. No row comes twice: a source that is too small for its share
makes the mix smaller (weights) or gets a smaller share (rehearsal), and `describe` says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastlora.data.load import FILE_TYPES
from fastlora.errors import DataError
from fastlora.recipe.schema import DataSection, MixUnit, SourceSection

Role = Literal["train", "rehearsal", "eval"]
UNIT_NAMES: dict[MixUnit, str] = {"tokens": "supervised tokens", "rows": "rows"}


@dataclass(frozen=True, slots=True)
class Pool:
    """A source to mix from."""

    label: str
    role: Role
    weight: float | None
    units: Sequence[int]
    """What each of its rows counts in the mix: its supervised tokens, or 1; 0 for a row that has none."""


@dataclass(frozen=True, slots=True)
class Blend:
    """Places of rows in each pool, in their order there."""

    train: list[list[int]]
    held_out: list[list[int]]


def blend(pools: Sequence[Pool], data: DataSection, seed: int) -> Blend:
    """Hold out by each pool's part of the mix, then mix what is left.

    Raises DataError: a pool with a share has nothing to give, or nothing would be left to train on.
    """
    units = [pool.units for pool in pools]
    if not data.eval_split:
        return Blend(_mix(pools, units, data, seed), [[] for _ in pools])
    mixed = [len(places) for places in _mix(pools, units, data, seed)]
    counts = _held_out_counts(mixed, data.eval_split)
    # The same draw for every source: which of its rows are held out does not change with what is beside it.
    held_out = [
        sorted(random.Random(seed).sample(range(len(pool.units)), count))
        for pool, count in zip(pools, counts, strict=True)
    ]
    left = [
        sorted(set(range(len(pool.units))).difference(taken))
        for pool, taken in zip(pools, held_out, strict=True)
    ]
    units = [[pool.units[n] for n in rest] for pool, rest in zip(pools, left, strict=True)]
    picked = _mix(pools, units, data, seed)
    train = [[rest[n] for n in places] for rest, places in zip(left, picked, strict=True)]
    if not any(places for pool, places in zip(pools, train, strict=True) if pool.role == "train"):
        held = max(sum(counts), int(data.eval_split))
        raise DataError(
            f"data.eval_split holds out {held} of {sum(mixed)} rows, which leaves none to train on"
        )
    return Blend(train, held_out)


def _held_out_counts(mixed: Sequence[int], share: float) -> list[int]:
    if share < 1:
        return [min(rows, max(1, round(rows * share))) for rows in mixed]
    total, available = int(share), sum(mixed)
    if total > available:
        return list(mixed)
    # Largest remainders, so that the parts sum to what is asked for.
    quotas = [total * rows / available for rows in mixed]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(mixed)), key=lambda n: counts[n] - quotas[n])
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def _mix(
    pools: Sequence[Pool], units: Sequence[Sequence[int]], data: DataSection, seed: int
) -> list[list[int]]:
    places: dict[int, list[int]] = {}
    own = [n for n, pool in enumerate(pools) if pool.role == "train"]
    rehearsed = [n for n, pool in enumerate(pools) if pool.role == "rehearsal"]
    places |= _part(pools, units, own, seed)
    if data.rehearsal:
        share = data.rehearsal.share
        taken = sum(units[n][place] for n in own for place in places[n])
        places |= _part(pools, units, rehearsed, seed, limit=taken * share / (1 - share))
    return [places[n] for n in range(len(pools))]


def _part(
    pools: Sequence[Pool],
    units: Sequence[Sequence[int]],
    members: Sequence[int],
    seed: int,
    limit: float | None = None,
) -> dict[int, list[int]]:
    """The largest mix of `members`, of `limit` units at most, that has their weights and no row twice; without
    weights each gives in proportion to what it has."""
    available = {n: sum(units[n]) for n in members}
    weights = {n: float(pools[n].weight or available[n]) for n in members}
    for n in members:
        if pools[n].weight is not None and not available[n]:
            raise DataError(f"{pools[n].label}: has a weight, but no row with a supervised token")
    whole = sum(weights.values())
    if not whole:
        return {n: list(range(len(units[n]))) for n in members}
    # Not by division of sums alone: the source that limits the mix is to be used to its last row.
    scale = min(available[n] / weights[n] for n in members if weights[n])
    if limit is not None:
        scale = min(scale, limit / whole)
    return {n: _take(units[n], scale * weights[n], f"{seed}/{pools[n].label}") for n in members}


def _take(units: Sequence[int], target: float, seed: str) -> list[int]:
    """Rows drawn at random until another would lead further from `target`: at most half a row off."""
    if target >= sum(units) - 1e-6:
        return list(range(len(units)))
    order = list(range(len(units)))
    random.Random(seed).shuffle(order)
    taken, total = [], 0
    for place in order:
        if abs(total + units[place] - target) >= abs(total - target) and units[place]:
            break
        taken.append(place)
        total += units[place]
    return sorted(taken)


def sources_of(data: DataSection) -> list[tuple[Role, SourceSection]]:
    """Every source in the order in which its rows are read."""
    rehearsed = data.rehearsal.source if data.rehearsal else []
    return [
        *(("train", source) for source in data.sources),
        *(("rehearsal", source) for source in rehearsed),
        *(("eval", source) for source in data.eval_sources),
    ]


def labels(paths: Sequence[str]) -> list[str]:
    """A short name for each source: the file's own, as long as no two are the same."""
    files = [Path(path) for path in paths]
    short = [file.stem if file.suffix.lower() in FILE_TYPES else file.name for file in files]
    named: list[str] = []
    for path, name in zip(paths, short, strict=True):
        label = name if short.count(name) == 1 else path
        again = sum(label == other.partition(" #")[0] for other in named)
        named.append(f"{label} #{again + 1}" if again else label)
    return named


def is_mixed(data: DataSection) -> bool:
    return data.rehearsal is not None or data.weighted


def describe(sources: Sequence[dict[str, Any]], data: DataSection) -> Iterator[str]:
    """What the mix came to. `sources`: those of DataStats."""
    mixed = [source for source in sources if source["role"] != "eval"]
    if not is_mixed(data):
        return
    key = "rows" if data.mix_unit == "rows" else "supervised_tokens"
    total = max(1, sum(source["train"][key] for source in mixed))
    parts = []
    for source in mixed:
        train, role = source["train"], " (rehearsal)" if source["role"] == "rehearsal" else ""
        parts.append(f"{source['label']}{role} {train[key] / total:.2%} ({train['rows']:,} rows)")
    yield f"data: mix by {UNIT_NAMES[data.mix_unit]}: {'; '.join(parts)}"
    for source in mixed:
        kept_out = source["rows"] - source["train"]["rows"] - source["held_out"] - source["dropped"]
        if source["role"] == "train" and kept_out > 0:
            yield (
                f"data: mix: {kept_out:,} rows of {source['label']} are left out: the others have no more rows for "
                "their weights, and none is repeated; change the weights, or leave them out to train on all"
            )
    if data.rehearsal:
        rehearsed = [source for source in mixed if source["role"] == "rehearsal"]
        share = sum(source["train"][key] for source in rehearsed) / total
        used_up = [
            source["label"]
            for source in rehearsed
            if source["train"]["rows"] + source["held_out"] + source["dropped"] == source["rows"]
        ]
        if used_up and share < data.rehearsal.share * 0.995:
            yield (
                f"data: mix: rehearsal is {share:.2%} and not {data.rehearsal.share:.2%}: {', '.join(used_up)} has no "
                "more rows, and none is repeated; add rows, or lower data.rehearsal.share"
            )
