from __future__ import annotations

import re
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
    assert recipe.data.sources[0].path == str(Path.cwd() / "a.csv")
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
        ("eval", "exact_match_rows", "eval.rows"),
        ("output", "merg", "output.merge"),
        ("train", "warmup_steps", "train.warmup_fraction"),
        ("train", "train_on_responses_only", "data.supervise"),
        ("data", "type", "format"),
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
        ("model.name", "[7]"),
        ("model.seq_len_tokens", '"2048"'),
        ("model.quantization", '"nf5"'),
        ("model.trust_remote_code", '"yes"'),
        ("lora.rank", "16.5"),
        ("lora.rank", "true"),
        ("lora.dropout", "1.0"),
        ("lora.target_modules", '"all"'),
        ("data.packing", "1"),
        ("data.template", "chatml"),
        ("data.on_bad_row", '"ignore"'),
        ("data.eval_split", "-1"),
        ("data.eval_split", "true"),
        ("data.eval_split", "inf"),
        ("data.eval_split", "1.0"),
        ("data.sources", "[]"),
        ("lora.alpha", "inf"),
        ("train.epochs", "inf"),
        ("train.lr", "nan"),
        ("train.lr", "0"),
        ("train.lr", '"2e-4"'),
        ("train.steps", "0"),
        ("train.scheduler", '"cosin"'),
        ("train.seed", "-1"),
        ("train.seed", str(2**32)),
        ("eval.rows", '"10"'),
        ("output.merge", "16"),
        ("output.report_to", '["mlflow"]'),
    ],
)
def test_wrong_types_and_values_are_reported_with_their_key(
    tmp_path: Path, key: str, value: str
) -> None:
    found = problems(tmp_path, MINIMAL, f"{key}={value}")
    assert [re.split(r"[:\[]", problem)[0] for problem in found] == [key]


def test_problems_are_said_in_words_of_toml(tmp_path: Path) -> None:
    text = (
        MINIMAL.replace('"runs/x"', "2024-11-24")
        .replace('"rows.jsonl"', '"rows.jsonl", 3')
        .replace('"org/model"', "7")
    )
    settings = (
        "lora=7",
        "data.eval_split=true",
        'lora.target_modules="all"',
        "train.seed=x",
    )
    assert problems(tmp_path, text, *settings[1:]) == [
        "model.name: input should be a string, in quotes, got 7",
        "lora.target_modules: input should be 'all-linear' or a valid list, got 'all'",
        'data.sources[1]: input should be a string or a table with path = "...", got 3',
        "data.eval_split: input should be a valid integer or a valid number, got true",
        "train.seed: input should be a valid integer, got 'x'",
        "output.dir: input should be a string, in quotes, got 2024-11-24",
    ]
    assert problems(tmp_path, MINIMAL, settings[0]) == [
        "lora: is a section; write [lora], and its keys below, got 7"
    ]
    assert problems(tmp_path, MINIMAL, "lora.target_modules=[1]") == [
        "lora.target_modules[0]: input should be a string, in quotes, got 1"
    ]
    assert problems(tmp_path, MINIMAL, "data.eval_split=1.0") == [
        "data.eval_split: 1.0 may mean one row or all of them; write 1 for one row"
    ]


def test_set_takes_text_as_it_stands_where_a_string_is_wanted(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL), ["output.dir=2024-11-24", "model.revision=12345678"]
    )
    assert (recipe.output.dir, recipe.model.revision) == ("2024-11-24", "12345678")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = MINIMAL + (
        '[lora]\nrank = "16"\n[train]\nlerning_rate = 1\nepochs = 1\nsteps = 2\nmicro_batch = 3\neffective_batch = 16\n'
    )
    found = problems(tmp_path, text, "oops", "data.template=[7]")
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


def test_paths_of_settings_are_taken_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As absolute paths, so that the run can be merged from any other."""
    for folder in ("recipes/m", "work/m", "work/org/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "work/chat.jinja").touch()
    monkeypatch.chdir(tmp_path / "work")
    recipe = load_recipe(
        write(tmp_path / "recipes", MINIMAL),
        [
            "model.name=./m",
            "data.template=chat.jinja",
            'data.sources=["org/data", {path = "rows.csv"}, "org/other"]',
            "data.eval_sources=../rows.json",
        ],
    )
    work = tmp_path / "work"
    assert recipe.model.name == str(work / "m")
    assert recipe.data.template == str(work / "chat.jinja")
    assert [source.path for source in recipe.data.sources] == [
        str(work / "org/data"), str(work / "rows.csv"), "org/other",
    ]  # fmt: skip
    assert recipe.data.eval_sources[0].path == str(tmp_path / "rows.json")
    # The file's own are not looked for there.
    text = MINIMAL.replace("rows.jsonl", "org/data")
    assert load_recipe(write(tmp_path / "recipes", text)).data.sources[0].path == "org/data"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("alp.jsnol", "did you mean alp.jsonl?"),
        ("ALP.JSONLL", "data files: .jsonl, .json, .csv, .parquet"),
        ("./rows", "data files"),
        ("a/b/alp.cvs", "data files"),
        ("my rows", "data files"),
        ("x" * 300 + "/", "data files"),
    ],
)
def test_a_source_that_can_only_be_a_file_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    (tmp_path / "alp.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    text = MINIMAL.replace("rows.jsonl", name)
    for found in (
        problems(tmp_path, text),
        problems(tmp_path, MINIMAL, f'data.sources=["{name}"]'),
    ):
        assert len(found) == 1
        assert found[0].startswith(f"data.sources[0]: {tmp_path}")
        assert f"no such file; {hint}" in found[0]


@pytest.mark.parametrize("name", ["squad", "org/rows", "org/rows-v1.0", "org/wiki.cs", "o/c4.en"])
def test_hub_ids_stay_as_they_are(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("rows.jsonl", name)))
    assert recipe.data.sources[0].path == name


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(path).model.name == "org/model"
    assert library.read(path) == MINIMAL


def test_other_encodings_are_refused_by_name_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# caf\xe9\n")
    for read in (library.read, load_recipe):
        with pytest.raises(UsageError, match=r"latin.toml: not UTF-8 at byte 5; save it as UTF-8"):
            read(path)


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


def test_kernels(tmp_path: Path) -> None:
    kernels = load_recipe(write(tmp_path, MINIMAL)).kernels
    assert (kernels.mode, kernels.require_fast) == ("auto", False)
    text = MINIMAL + '[kernels]\nmode = "fast"\nrequire_fast = 1\nmod = 1\n'
    assert problems(tmp_path, text) == [
        "kernels.mod: unknown key; did you mean kernels.mode?",
        "kernels.mode: input should be 'auto', 'off' or 'all', got 'fast'",
        "kernels.require_fast: input should be a valid boolean, got 1",
    ]
    text = 'engine = "peft"\n' + MINIMAL + '[kernels]\nmode = "off"\nrequire_fast = true\n'
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("kernels.require_fast: with engine")
    assert problem.endswith('set kernels.mode = "auto"')
    load_recipe(write(tmp_path, text.replace("peft", "auto")))  # unsloth's may be all fused


REHEARSED = MINIMAL.replace(
    "[output]", 'rehearsal = { source = "general.jsonl", share = 0.15 }\n[output]'
)


def test_the_source_of_rehearsal_is_a_source_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rehearsal = load_recipe(write(tmp_path, REHEARSED)).data.rehearsal
    assert rehearsal is not None
    assert rehearsal.source[0].path == str(tmp_path / "general.jsonl")
    assert rehearsal.by == "tokens"
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", REHEARSED)
    for setting, expected in (
        ("data.rehearsal.share=0.2", tmp_path / "sub" / "general.jsonl"),
        ("data.rehearsal.source=mine.csv", tmp_path / "mine.csv"),
        ('data.rehearsal={source=["mine.csv"], share=0.1}', tmp_path / "mine.csv"),
    ):
        changed = load_recipe(path, [setting]).data.rehearsal
        assert changed is not None
        assert changed.source[0].path == str(expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.rehearsal.share=1.0", "data.rehearsal.share: input should be less than 1"),
        ("data.rehearsal.shar=0.1", "data.rehearsal.shar: unknown key; did you mean data.rehearsal.share?"),
        ('data.rehearsal.source=[{path="a.csv", wight=2}]', "data.rehearsal.source[0].wight: unknown key"),
        ('data.rehearsal.source="x.jsnol"', "data.rehearsal.source[0]: "),
        ('data.rehearsal.source=["a.csv", {path="b.csv", weight=2.0}]', "rehearsal.source[0]: has no weight"),
        ('data.sources=[{path="a.csv", weight=1.0}, "b.csv"]', "sources[1]: has no weight, while another has"),
        ('data.sources=[{path="a.csv", weight=0.0}]', "data.sources[0].weight: input should be greater than 0"),
        ('data.eval_sources=[{path="a.csv", weight=1.0}]', "eval_sources: a weight means nothing here"),
        ('data.weights_by="rows"', "weights_by: no source has a weight"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_mix(tmp_path: Path, setting: str, expected: str) -> None:
    assert expected in "\n".join(problems(tmp_path, REHEARSED, setting))
