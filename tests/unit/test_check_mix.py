"""The check of a mix: the rows that a run would hold out, every source looked at, clean files that keep the mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastlora.check.check import check_data
from fastlora.check.clean import plan_files, write_clean
from fastlora.data.prepare import prepare_data
from fastlora.engines.base import load_tokenizer
from fastlora.recipe.load import load_recipe

MIX = """
[model]
name = "{model}"
seq_len_tokens = 200
[data]
sources = [{{ path = "a.jsonl", weight = 3.0 }}, {{ path = "b.jsonl", weight = 1.0 }}]
rehearsal = {{ source = "general.jsonl", share = 0.2, by = "rows" }}
eval_split = {split}
[output]
dir = "runs"
"""


def write(path: Path, rows: int) -> None:
    lines = [{"prompt": f"{path.stem} {n}", "completion": f" says {n}"} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def recipe_path(tmp_path: Path, tiny_model: Path) -> Any:
    for name, rows in (("a", 60), ("b", 30), ("general", 40)):
        write(tmp_path / f"{name}.jsonl", rows)

    def made(split: float | int) -> Path:
        path = tmp_path / f"mix{split}.toml"
        path.write_text(MIX.format(model=tiny_model, split=split))
        return path

    return made


@pytest.mark.parametrize("split", [0.1, 12])
def test_it_holds_out_what_a_run_does(recipe_path: Any, split: float) -> None:
    recipe = load_recipe(recipe_path(split), [])
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare_data(recipe, tokenizer, lambda _: None)
    assert prepared.eval is not None
    said = [tokenizer.decode(row["input_ids"]) for row in prepared.eval]
    rows = check_data(recipe, tokenizer).rows
    held_out = [rows.all[place].prompt for place in sorted(rows.held_out)]
    assert len(held_out) == len(said)
    assert all(prompt in text for prompt, text in zip(held_out, said, strict=True))


def test_clean_files_keep_the_mix(recipe_path: Any, tmp_path: Path) -> None:
    path = recipe_path(0.1)
    with (tmp_path / "general.jsonl").open("a") as file:
        file.write('{"prompt": "general 0", "completion": " "}\n')
    recipe = load_recipe(path, [])
    tokenizer = load_tokenizer(recipe.model)
    report = check_data(recipe, tokenizer)
    assert [rows.role for rows in report.rows.sources] == ["train", "train", "rehearsal"]
    clean = tmp_path / "clean.jsonl"
    written = write_clean(report, clean, plan_files(clean, recipe), recipe)
    assert written["rows_removed"] == 1
    again = load_recipe(path, written["settings"])
    assert [source.weight for source in again.data.sources] == [3.0, 1.0]
    assert again.data.rehearsal is not None
    assert [Path(one.path).name for one in again.data.rehearsal.source] == ["clean.3.general.jsonl"]
    assert again.data.eval_split == 0
    assert len(again.data.eval_sources) == 3
    assert not check_data(again, tokenizer).refused
    assert prepare_data(again, tokenizer, lambda _: None).stats.train.rows > 60
