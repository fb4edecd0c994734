from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastlora.errors import RecipeError, UsageError
from fastlora.recipe import library
from fastlora.recipe.load import load_recipe, parse_value
from fastlora.recipe.schema import Recipe

MINIMAL = (
    '[model]\nname = "org/model"\n[data]\nsources = ["rows.jsonl"]\n[output]\ndir = "runs/x"\n'
)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *settings: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), settings)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml")), ids=lambda p: p.stem
)
def test_every_shipped_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.train.accumulation_steps * recipe.train.micro_batch in range(16, 33)
    about = library.describe(path)
    assert about[1].startswith(f"fastlora run {path.stem}")
    assert about[2].startswith("VRAM:")


def test_bundled_names() -> None:
    wanted = {
        "tiny", "llama31", "llama31-70b", "llama32-1b", "llama32-3b", "qwen25", "qwen3", "mistral", "gemma2", "phi4",
    }  # fmt: skip
    assert set(library.bundled()) == wanted


def test_defaults_and_set(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL),
        [
            "lora.rank=64",
            "train.lr=1e-4",
            "model.name=other/model",
            "train.keep_best=false",
            "data.sources=a.csv",
        ],
    )
    assert (recipe.lora.rank, recipe.train.lr, recipe.model.name) == (64, 1e-4, "other/model")
    assert recipe.train.keep_best is False
    assert recipe.data.sources[0].path == "a.csv"
    assert recipe.model.quantization == "nf4"


def test_set_of_one_alternative_puts_the_other_aside(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        "[output]", "eval_split = 0.1\n[train]\nepochs = 2\naccumulation = 8\n[output]"
    )
    settings = [
        "train.steps=20",
        "train.effective_batch=16",
        'data.eval_sources=["held_out.jsonl"]',
    ]
    recipe = load_recipe(write(tmp_path, text), settings)
    assert (recipe.train.epochs, recipe.train.steps) == (None, 20)
    assert recipe.train.accumulation_steps == 8
    assert (recipe.data.eval_split, len(recipe.data.eval_sources)) == (0, 1)
    found = problems(tmp_path, text, "train.steps=20", "train.epochs=1")
    assert found == ["train.epochs: give either epochs or steps, not both"]


def test_set_values_are_toml() -> None:
    assert [parse_value(text) for text in ("8", "1e-4", "true", '"8"', "[1, 2]", "plain words")] == [
        8, 1e-4, True, "8", [1, 2], "plain words",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "typo", "meant"),
    [
        ("model", "quantisation", "model.quantization"),
        ("model", "max_seq_length", "model.seq_len_tokens"),
        ("lora", "rnak", "lora.rank"),
        ("lora", "lora_alpha", "lora.alpha"),
        ("data", "surces", "data.sources"),
        ("data", "lr", "train.lr"),
        ("train", "learning_rate", "train.lr"),
        ("train", "learning_rte", "train.lr"),
        ("train", "gradient_accumulation_steps", "train.accumulation"),
        ("eval", "exact_match_row", "eval.exact_match_rows"),
        ("output", "merg", "output.merge"),
    ],
)
def test_typos_name_what_was_meant(tmp_path: Path, section: str, typo: str, meant: str) -> None:
    assert problems(tmp_path, MINIMAL, f"{section}.{typo}=1") == [
        f"{section}.{typo}: unknown key; did you mean {meant}?"
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine", '"axolotl"'),
        ("model.name", "7"),
        ("model.seq_len_tokens", '"2048"'),
        ("model.quantization", '"nf5"'),
        ("model.trust_remote_code", '"yes"'),
        ("lora.rank", "16.5"),
        ("lora.rank", "true"),
        ("lora.dropout", "1.0"),
        ("lora.target_modules", '"all"'),
        ("data.packing", "1"),
        ("data.on_bad_row", '"ignore"'),
        ("data.eval_split", "-1"),
        ("data.sources", "[]"),
        ("train.lr", "0"),
        ("train.lr", '"2e-4"'),
        ("train.steps", "0"),
        ("train.scheduler", '"cosin"'),
        ("train.seed", "-1"),
        ("eval.exact_match_rows", '"10"'),
        ("output.merge", "16"),
        ("output.report_to", '["mlflow"]'),
    ],
)
def test_wrong_types_and_values_are_reported_with_their_key(
    tmp_path: Path, key: str, value: str
) -> None:
    found = problems(tmp_path, MINIMAL, f"{key}={value}")
    assert found, key
    assert all(problem.startswith(key) for problem in found), found


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = MINIMAL + (
        '[lora]\nrank = "16"\n[train]\nlerning_rate = 1\nepochs = 1\nsteps = 2\nmicro_batch = 3\neffective_batch = 16\n'
    )
    found = problems(tmp_path, text, "oops", "data.template=7")
    assert [problem.split(":")[0] for problem in found] == [
        "--set oops", "train.lerning_rate", "lora.rank", "data.template", "train.epochs", "train.effective_batch",
    ] or sorted(problem.split(":")[0] for problem in found) == sorted([
        "--set oops", "train.lerning_rate", "lora.rank", "data.template", "train.epochs", "train.effective_batch",
    ])  # fmt: skip


def test_missing_sections_and_keys(tmp_path: Path) -> None:
    assert problems(tmp_path, "[model]\n") == [
        "model.name: missing; this key must be given",
        "data: missing; this key must be given",
        "output: missing; this key must be given",
    ]


def test_held_out_rows_are_asked_for(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL, "train.keep_best=true", "train.early_stopping_patience=2")
    assert [problem.split(":")[0] for problem in found] == [
        "train.keep_best",
        "train.early_stopping_patience",
    ]


def test_not_toml_names_the_line(tmp_path: Path) -> None:
    assert "line 1" in problems(tmp_path, "[model\n")[0]


def test_paths_are_taken_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("org/model", "model")))
    assert recipe.model.name == str(tmp_path / "model")
    assert recipe.data.sources[0].path == str(tmp_path / "rows.jsonl")
    assert load_recipe(write(tmp_path, MINIMAL)).model.name == "org/model"


def test_find(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert library.find(str(path)) == path
    assert library.find("tiny").name == "tiny.toml"
    with pytest.raises(UsageError, match="did you mean llama31"):
        library.find("lama31")
    with pytest.raises(UsageError, match="fastlora run tiny"):
        library.find("nowhere/tiny.toml")


def test_the_schema_documents_what_a_dump_round_trips(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    dumped: dict[str, Any] = recipe.model_dump(mode="json")
    assert Recipe.model_validate(dumped) == recipe
    assert tomllib.loads(MINIMAL).keys() <= dumped.keys()
