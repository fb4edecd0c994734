"""Mixes: shares exact to a row in both units, deterministic, nothing repeated, hold-out by parts of the mix."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastlora.data.blend import Blend, Pool, blend, labels
from fastlora.data.prepare import prepare_data
from fastlora.data.prepared import Prepared
from fastlora.errors import DataError
from fastlora.recipe.schema import DataSection, Recipe

SOURCE = "general.jsonl"


def pool(label: str, rows: int, role: Any = "train", weight: float | None = None) -> Pool:
    draw = random.Random(label)
    return Pool(label, role, weight, [draw.randint(1, 60) for _ in range(rows)])


def by_rows(one: Pool) -> Pool:
    return Pool(one.label, one.role, one.weight, [1] * len(one.units))


def data(**given: Any) -> DataSection:
    return DataSection.model_validate({"sources": ["own.jsonl"], **given})


def units(pools: list[Pool], mix: Blend) -> list[int]:
    return [sum(one.units[n] for n in places) for one, places in zip(pools, mix.train, strict=True)]


@pytest.mark.parametrize("unit", ["tokens", "rows"])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("eval_split", [0, 0.1, 40])
def test_rehearsal_is_its_share_to_within_a_row(unit: str, share: float, eval_split: Any) -> None:
    pools = [pool("own", 400), pool("a", 900, "rehearsal"), pool("b", 300, "rehearsal")]
    if unit == "rows":
        pools = [by_rows(one) for one in pools]
    section = data(rehearsal={"source": SOURCE, "share": share, "by": unit}, eval_split=eval_split)
    mix = blend(pools, section, seed=1)
    own, *rest = units(pools, mix)
    # Each of the two sources is within half of its longest row, in any unit.
    assert abs(sum(rest) - (own + sum(rest)) * share) <= (60 if unit == "tokens" else 1)
    assert abs(rest[0] / sum(pools[1].units) - rest[1] / sum(pools[2].units)) < 0.05
    assert len(mix.train[0]) == 400 - len(mix.held_out[0])
    for places, held in zip(mix.train, mix.held_out, strict=True):
        assert len(set(places) | set(held)) == len(places) + len(held)
        assert places == sorted(places)


@pytest.mark.parametrize("unit", ["tokens", "rows"])
def test_weights_are_shares_and_the_smallest_source_is_used_up(unit: str) -> None:
    pools = [pool("a", 1000, weight=3), pool("b", 100, weight=1), pool("c", 500, weight=1)]
    if unit == "rows":
        pools = [by_rows(one) for one in pools]
    mix = blend(pools, data(weights_by=None), seed=1)
    found = units(pools, mix)
    assert mix.train[1] == list(range(100))
    longest = 1 if unit == "rows" else 60
    for count, weight in zip(found, (3, 1, 1), strict=True):
        assert abs(count - found[1] * weight) <= longest / 2


def test_the_seed_decides_and_nothing_else() -> None:
    pools = [pool("own", 100), pool("a", 900, "rehearsal")]
    section = data(rehearsal={"source": SOURCE, "share": 0.2}, eval_split=0.1)
    assert blend(pools, section, 1) == blend(pools, section, 1)
    assert blend(pools, section, 1).train[1] != blend(pools, section, 2).train[1]
    # The user's own held-out rows are those of a run without rehearsal: the two can be compared.
    alone = blend(pools[:1], data(eval_split=0.1), 1)
    assert alone.held_out[0] == blend(pools, section, 1).held_out[0]
    assert alone.held_out[0] == sorted(random.Random(1).sample(range(100), 10))


@pytest.mark.parametrize("eval_split", [0.1, 55])
def test_every_source_gives_held_out_rows_by_its_part_of_the_mix(eval_split: float) -> None:
    pools = [by_rows(pool("own", 400)), by_rows(pool("a", 9000, "rehearsal"))]
    section = data(rehearsal={"source": SOURCE, "share": 0.2, "by": "rows"}, eval_split=eval_split)
    mix = blend(pools, section, 1)
    assert [len(held) for held in mix.held_out] == ([40, 10] if eval_split == 0.1 else [44, 11])


def test_a_small_source_caps_rehearsal_and_rows_without_supervision_are_no_part_of_it() -> None:
    own, small = pool("own", 400), pool("a", 20, "rehearsal")
    section = data(rehearsal={"source": SOURCE, "share": 0.5})
    assert blend([own, small], section, 1).train == [list(range(400)), list(range(20))]
    empty = Pool("b", "train", 1.0, [0, 0])
    with pytest.raises(DataError, match="b: has a weight, but no row with a supervised token"):
        blend([Pool("own", "train", 1.0, own.units), empty], data(), 1)


def test_labels_are_short_and_differ() -> None:
    paths = [
        "/x/own.jsonl",
        "org/general-v1",
        "/x/a/rows.csv",
        "/x/b/rows.csv",
        "org/s1.5",
        "org/s1.5",
    ]
    assert labels(paths) == [
        "own", "general-v1", "/x/a/rows.csv", "/x/b/rows.csv", "org/s1.5", "org/s1.5 #2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(path: Path, rows: int, answer: int) -> str:
    lines = [
        json.dumps({"instruction": f"Say {n} of {path.stem}", "output": "x" * (1 + n % answer)})
        for n in range(rows)
    ]
    path.write_text("\n".join(lines))
    return str(path)


def prepared(tokenizer: Any, said: list[str], seed: int = 3407, **section: Any) -> Prepared:
    recipe = Recipe.model_validate(
        {
            "model": {"name": "tiny", "seq_len_tokens": 64},
            "data": section,
            "train": {"seed": seed},
            "output": {"dir": "runs"},
        }
    )
    return prepare_data(recipe, tokenizer, said.append)


@pytest.mark.parametrize("packing", [False, True])
def test_the_mix_of_a_recipe_and_its_report(tmp_path: Path, tokenizer: Any, packing: bool) -> None:
    own, general = write(tmp_path / "own.jsonl", 90, 9), write(tmp_path / "general.jsonl", 300, 20)
    section: dict[str, Any] = {
        "sources": [own], "rehearsal": {"source": [general], "share": 0.15}, "eval_split": 0.1, "packing": packing,
    }  # fmt: skip
    said: list[str] = []
    found = prepared(tokenizer, said, **section)
    mine, theirs = found.stats.sources
    assert (mine["role"], theirs["role"]) == ("train", "rehearsal")
    total = mine["train"]["supervised_tokens"] + theirs["train"]["supervised_tokens"]
    assert total == found.stats.train.supervised_tokens
    assert abs(theirs["train"]["supervised_tokens"] - 0.15 * total) <= 21
    mixed = next(line for line in said if line.startswith("data: mix by supervised tokens"))
    assert f"general (rehearsal) {theirs['train']['supervised_tokens'] / total:.2%}" in mixed
    parts = found.eval_by_source()
    assert [len(part) for part in parts.values()] == [9, theirs["held_out"]]
    assert found.eval is not None
    together = [ids for part in parts.values() for ids in part["input_ids"]]
    assert together == found.eval["input_ids"][:]
    for label, part in parts.items():
        assert all(label in tokenizer.decode(ids) for ids in part["input_ids"])
    trained = [ids for row in found.train["input_ids"] for ids in row]
    assert len(trained) == found.stats.train.tokens
    # From the cache the same, told alike; any key of the mix makes it anew.
    again: list[str] = []
    assert prepared(tokenizer, again, **section).stats == found.stats
    assert "from the cache" in again[0]
    assert again[1:] == said
    for other in (
        section | {"rehearsal": section["rehearsal"] | {"share": 0.2}},
        section | {"rehearsal": section["rehearsal"] | {"by": "rows"}},
        section | {"sources": [{"path": own, "weight": 2.0}]},
    ):
        fresh: list[str] = []
        prepared(tokenizer, fresh, **other)
        assert "from the cache" not in fresh[0]
    fresh = []
    prepared(tokenizer, fresh, seed=1, **section | {"eval_split": 0})
    assert "from the cache" not in fresh[0]
    with Path(general).open("a") as file:
        file.write('\n{"instruction": "more", "output": "of it"}')
    fresh = []
    prepared(tokenizer, fresh, **section)
    assert "from the cache" not in fresh[0]


def test_a_mix_that_cannot_be_as_asked_says_so(tmp_path: Path, tokenizer: Any) -> None:
    own, small = write(tmp_path / "own.jsonl", 90, 9), write(tmp_path / "small.jsonl", 10, 9)
    said: list[str] = []
    prepared(
        tokenizer, said, sources=[own], rehearsal={"source": small, "share": 0.5, "by": "rows"}
    )
    assert (
        "data: mix: rehearsal is 10.00% and not 50.00%: small has no more rows, and none is repeated; add rows, or "
        "lower data.rehearsal.share"
    ) in said
    said = []
    weighted = [{"path": own, "weight": 1.0}, {"path": small, "weight": 1.0}]
    found = prepared(tokenizer, said, sources=weighted, weights_by="rows")
    assert found.stats.train.rows == 20
    assert any("80 rows of own are left out" in line for line in said)
    assert not any("rows of small" in line for line in said)
    # Sources without weights are put together, and nothing is said of a mix.
    said = []
    assert prepared(tokenizer, said, sources=[own, small]).stats.train.rows == 100
    assert not any("data: mix" in line for line in said)


def test_rows_without_an_answer_left_are_counted_and_do_not_shift_the_shares(
    tmp_path: Path, tokenizer: Any
) -> None:
    own, general = write(tmp_path / "own.jsonl", 50, 9), write(tmp_path / "general.jsonl", 200, 9)
    with Path(own).open("a") as file:
        file.write("\n" + json.dumps({"instruction": "y" * 80, "output": "cut off"}))
    said: list[str] = []
    found = prepared(
        tokenizer, said, sources=[own], rehearsal={"source": general, "share": 0.2, "by": "rows"}
    )
    assert found.stats.sources[0]["train"]["rows"] == 50
    assert abs(found.stats.sources[1]["train"]["rows"] - 12.5) <= 1
    assert found.stats.train.unsupervised_rows == found.stats.sources[0]["dropped"] == 1
