"""Each rule of advice fires where it should, with the user's own numbers, and nowhere else; what --auto fills."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastlora.errors import RecipeError
from fastlora.recipe.advice import Facts, _epochs_range, advise, apply, fill, fill_eval
from fastlora.recipe.curves import advise_after, overfitting
from fastlora.recipe.library import bundled
from fastlora.recipe.load import load_recipe
from fastlora.recipe.schema import Recipe

# A recipe and data with which nobody finds fault.
GOOD: dict[str, Any] = {
    "model": {"name": "org/model"},
    "lora": {"rank": 16, "alpha": 16},
    "data": {"sources": ["own.jsonl"], "eval_split": 0.05},
    "train": {"epochs": 2, "effective_batch": 16, "lr": 2e-4},
    "output": {"dir": "runs"},
}
FACTS = Facts(
    examples=5_200,
    rows=5_000,
    held_out=200,
    sequences=5_000,
    supervised_tokens=1_000_000,
    longest_row_tokens=1_900,
    common_openings=0.2,
    engine="unsloth",
)


def changed(**settings: Any) -> Recipe:
    table = {section: dict(values) for section, values in GOOD.items()}
    for key, value in settings.items():
        section, _, name = key.partition("__")
        if value is None:
            table[section].pop(name, None)
        else:
            table.setdefault(section, {})[name] = value
    return Recipe.model_validate(table)


def keys(recipe: Recipe, **facts: Any) -> list[str]:
    return [one.key for one in advise(recipe, replace(FACTS, **facts))]


def rows(count: int, **more: Any) -> dict[str, Any]:
    same = dict.fromkeys(("examples", "rows", "sequences"), count)
    return {**same, "held_out": 20, "supervised_tokens": 200 * count, **more}  # fmt: skip


REHEARSAL = {"source": "general.jsonl", "share": 0.15}
EVERY_9, EVERY_700 = {"train__eval_every_steps": 9}, {"train__eval_every_steps": 700}
PACKED = rows(5_000, sequences=500)


@pytest.mark.parametrize(
    ("key", "settings", "facts", "says"),
    [
        ("data.sources", {"train__epochs": 3}, rows(49), "only 49 examples"),
        (None, {"train__epochs": 3, "lora__rank": 8, "lora__alpha": 8}, rows(50), ""),
        ("train.lr", {"train__lr": 4e-3}, {}, "13.3 times the 0.0003"),
        ("train.lr", {"train__lr": 2e-5}, {}, "5 times below the 0.0001"),
        (None, {"train__lr": 1e-4}, {}, ""),
        (None, {"train__lr": 3e-4}, {}, ""),
        ("train.epochs", {"train__epochs": 6}, rows(999), "999 rows seen 6 times"),
        ("train.epochs", {"train__epochs": 1}, rows(999), "999 rows make few steps in 1 epoch;"),
        (None, {"train__epochs": 5}, rows(999), ""),
        ("train.epochs", {"train__epochs": 4}, {}, "5,000 rows seen 4 times"),
        (None, {"train__epochs": 3}, {}, ""),
        ("train.epochs", {"train__epochs": 2}, rows(10_001), "10,001 rows seen 2 times"),
        (None, {"train__epochs": 1}, rows(10_001), ""),
        (None, {"train__epochs": None}, rows(10_001), ""),
        (None, {"train__epochs": None}, rows(200), ""),
        ("train.epochs", {"train__epochs": None, "train__steps": 2_000}, {}, "seen 6.4 times"),
        (None, {"train__epochs": None, "train__steps": 20}, {}, ""),
        (None, {"train__epochs": 9, "train__early_stopping_patience": 3}, {}, ""),
        ("data.eval_split", {"data__eval_split": 0}, {}, "data.eval_split = 0.05 (260 rows)"),
        (None, {"data__eval_split": 0, "data__eval_sources": ["e.jsonl"]}, {}, ""),
        ("data.eval_split", {"train__epochs": 3}, rows(300, held_out=6), "6 rows is mostly luck, and you go by it"),
        ("data.eval_split", {"train__epochs": 3}, rows(300, held_out=6), "data.eval_split = 0.1 (30 rows)"),
        ("data.eval_split", EVERY_9 | {"train__keep_best": True}, {"held_out": 19}, "best checkpoint goes by it"),
        (None, {"train__epochs": 3}, rows(60, held_out=4), ""),
        ("data.eval_split", {"train__epochs": 3}, rows(300, held_out=200), "200 of 500 rows are not learnt from"),
        (None, {"data__eval_split": 0, "data__eval_sources": ["e.jsonl"]}, {"held_out": 6}, ""),
        ("train.eval_every_steps", EVERY_700 | {"train__keep_best": True}, {}, "626 steps are evaluated once, so none"),
        ("train.eval_every_steps", {"train__early_stopping_patience": 3}, {}, "626 steps are evaluated 2 times"),
        ("train.eval_every_steps", {"train__early_stopping_patience": 3}, {}, "Set train.eval_every_steps = 125"),
        (None, {"train__keep_best": True}, {}, ""),
        (None, EVERY_9 | {"train__early_stopping_patience": 3}, {}, ""),
        (None, {"train__keep_best": True, "train__epochs": None, "train__steps": 4}, {}, ""),
        (None, EVERY_700, {}, ""),
        ("train.effective_batch", {"train__effective_batch": 8}, {}, "gradient of 8 rows"),
        ("train.effective_batch", {"train__effective_batch": 64}, {}, "leave 79 steps an epoch"),
        (None, {"train__effective_batch": 32}, {}, ""),
        ("train.effective_batch", {"data__packing": True}, PACKED, "16 x 10 rows packed"),
        (None, {"data__packing": True, "train__effective_batch": 2}, PACKED, ""),
        (None, {"train__micro_batch": 64, "train__effective_batch": 64}, {}, ""),
        ("lora.alpha", {"lora__alpha": 64}, {}, "alpha / rank = 4 makes the adapter loud"),
        ("lora.alpha", {"lora__alpha": 4}, {}, "alpha / rank = 0.25 makes the adapter faint"),
        (None, {"lora__alpha": 32}, {}, ""),
        (None, {"lora__alpha": 64, "lora__rslora": True}, {}, ""),
        ("lora.rank", {"lora__rank": 64, "lora__alpha": 64}, {}, "5,000 rows with 200 answer tok"),
        ("lora.rank", {"lora__rank": 4, "lora__alpha": 4}, {}, "hold more than so small an adapter"),
        ("lora.rank", {"train__epochs": 1}, rows(60_000), "lora.rank = 64 and lora.alpha = 64"),
        (None, {"lora__rank": 32, "lora__alpha": 32}, {}, ""),
        (None, {}, {"supervised_tokens": 25_000}, ""),
        ("data.rehearsal", {}, {"common_openings": 0.62}, "62% of the answers in 5,000 rows"),
        (None, {"data__rehearsal": REHEARSAL}, {"common_openings": 0.62}, ""),
        (None, {"data__sources": ["a.jsonl", "b.jsonl"]}, {"common_openings": 0.62}, ""),
        (None, {}, rows(4_000, common_openings=0.62), ""),
        ("lora.dropout", {"lora__dropout": 0.1}, {}, "lora.dropout = 0.1 with unsloth"),
        (None, {"lora__dropout": 0.1}, {"engine": "peft"}, ""),
        ("model.seq_len_tokens", {"model__seq_len_tokens": 8192}, {}, "model.seq_len_tokens = 1920"),
        (None, {"model__seq_len_tokens": 4096}, {}, ""),
        (None, {"model__seq_len_tokens": 2048}, {"longest_row_tokens": 100}, ""),
        (
            "model.seq_len_tokens",
            {"model__seq_len_tokens": 8192, "data__packing": True},
            {"longest_row_tokens": 300},
            "take VRAM for it, though the longest row has 300 tokens. Set model.seq_len_tokens = 2048",
        ),
    ],
)  # fmt: skip
def test_a_rule_fires_alone_where_it_should(
    key: str | None, settings: dict[str, Any], facts: dict[str, Any], says: str
) -> None:
    recipe = changed(**settings)
    found = advise(recipe, replace(FACTS, **facts))
    assert [one.key for one in found] == ([key] if key else [])
    assert says in "".join(map(str, found))
    if key:
        quiet = changed(**settings, advice__ignore=[key])
        assert advise(quiet, replace(FACTS, **facts)) == []
        assert advise(changed(**settings, advice__ignore=["all"]), replace(FACTS, **facts)) == []


def test_the_most_important_comes_first() -> None:
    recipe = changed(
        train__lr=1e-2, train__epochs=20, lora__rank=128, lora__alpha=16, data__eval_split=0
    )
    assert keys(recipe) == ["train.lr", "train.epochs", "data.eval_split", "lora.alpha", "lora.rank"]  # fmt: skip


def test_a_key_that_no_advice_is_about_cannot_be_silenced(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        '[model]\nname = "m"\n[data]\nsources = ["a.jsonl"]\n[output]\ndir = "r"\n'
        '[advice]\nignore = ["train.lrr"]\n'
    )
    with pytest.raises(RecipeError, match=r"advice\.ignore\[0\].*'train\.lr'.*got 'train\.lrr'"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("name", sorted(bundled()))
def test_bundled_recipes_get_no_advice_on_data_as_theirs(name: str) -> None:
    recipe = load_recipe(bundled()[name])
    tiny = Facts(1_200, 1_000, 200, 1_000, 7_000, 40, 0.05, "peft")
    usual = Facts(10_000, 9_800, 200, 9_800, 3_000_000, 9_000, 0.2, "unsloth")
    assert advise(recipe, tiny if name == "tiny" else usual) == []


BARE: dict[str, Any] = {section: GOOD[section] for section in ("model", "output")} | {
    "data": {"sources": ["own.jsonl"]}
}


def test_auto_fills_every_open_key_and_no_advice_is_left() -> None:
    recipe = Recipe.model_validate(BARE)
    filled = fill_eval(recipe, 5_200)
    recipe = apply(recipe, filled)
    filled += fill(recipe, FACTS)
    recipe = apply(recipe, filled)
    assert {one.key: one.value for one in filled} == {
        "data.eval_split": 0.05, "lora.rank": 16, "lora.alpha": 16, "lora.dropout": 0.0, "train.lr": 2e-4,
        "train.epochs": 2.0, "train.effective_batch": 16,
    }  # fmt: skip
    assert all(one.why for one in filled)
    assert advise(recipe, FACTS) == []
    assert fill(recipe, FACTS) == fill_eval(recipe, 5_200) == []
    # Filling is the same every time, and what was filled can be applied again from a manifest.
    assert apply(Recipe.model_validate(BARE), filled) == recipe


@pytest.mark.parametrize(
    ("section", "written", "left"),
    [
        ("lora", {"rank": 16}, {"lora.alpha"}),
        ("lora", {"rank": 16, "alpha": 16, "dropout": 0.0}, set()),
        ("train", {"steps": 5}, {"train.lr", "train.effective_batch"}),
        ("train", {"accumulation": 8, "lr": 2e-4}, {"train.epochs"}),
        ("train", {"micro_batch": 3, "lr": 2e-4, "epochs": 1}, {"train.effective_batch"}),
    ],
)
def test_auto_leaves_what_is_written_even_where_it_is_the_default(
    section: str, written: dict[str, Any], left: set[str]
) -> None:
    recipe = Recipe.model_validate(BARE | {section: written})
    filled = fill(recipe, FACTS)
    assert {one.key for one in filled if one.key.startswith(section)} >= left
    assert not {f"{section}.{key}" for key in written} & {one.key for one in filled}
    after = apply(recipe, filled)
    for key, value in written.items():
        assert getattr(getattr(after, section), key) == value
    if written.get("micro_batch"):
        assert after.train.effective_batch == 18  # the first multiple of 3 that is enough


def test_auto_holds_out_nothing_where_the_recipe_says_so_or_rows_are_few() -> None:
    assert not fill_eval(Recipe.model_validate(BARE), 49)
    for said in ({"eval_split": 0}, {"eval_sources": ["e.jsonl"]}):
        recipe = Recipe.model_validate(BARE | {"data": BARE["data"] | said})
        assert not fill_eval(recipe, 5_000)


def curve(held_out: list[float], training: list[float] | None = None) -> list[dict[str, Any]]:
    """Evaluations at 10, 20, ...; training losses at 5, 15, ... that fall unless given."""
    entries: list[dict[str, Any]] = []
    for n, loss in enumerate(held_out):
        fall = training[n] if training else 3.0 - 0.2 * n
        entries += [
            {"step": 10 * n + 5, "epoch": n + 0.5, "loss": fall},
            {"step": 10 * n + 10, "epoch": n + 1.0, "eval_loss": loss},
        ]
    return entries


@pytest.mark.parametrize(
    ("held_out", "training", "began"),
    [
        ([2.0, 1.5, 1.2, 1.4, 1.7], None, 30),
        ([1.0, 1.1, 1.2], None, 10),
        ([2.0, 1.5, 1.6], None, 20),  # one rise, but a clear one
        ([2.0, 1.5, 1.52], None, None),  # one small rise
        ([2.0, 1.5, 1.501, 1.504], None, None),  # flat
        ([2.0, 1.5, 1.7, 1.4, 1.3], None, None),  # it fell again
        ([2.0, 1.5, 1.7, 1.4, 1.6, 1.8], None, 40),  # and rose again
        ([2.0, 1.5, 1.2], None, None),
        ([0.0011, 0.0009, 0.0013, 0.0014], None, None),  # thousandths of a nat
        ([2.0, 1.5, 2.5, 4.0], [3.0, 2.0, 3.5, 5.0], None),  # both rise: it diverges
        ([2.0], None, None),
        ([], None, None),
    ],
)
def test_the_step_where_overfitting_began(
    held_out: list[float], training: list[float] | None, began: int | None
) -> None:
    found = overfitting(curve(held_out, training))
    assert (found.began if found else None) == began


def test_what_is_said_after_training() -> None:
    entries = curve([2.0, 1.2, 1.4, 1.7])
    last = entries[-1]["step"]
    (said,) = advise_after(changed(), entries, adapter_step=last, before={})
    assert str(said) == (
        "overfitting began after step 20 (epoch 2): the held-out loss rose from 1.2000 to 1.7000 at step 40 while the "
        "training loss fell. Set train.keep_best = true, or train.epochs = 2"
    )
    (said,) = advise_after(changed(train__keep_best=True), entries, adapter_step=20, before={})
    assert said.set == "The adapter is the one of step 20; train.epochs = 2 saves the rest"
    assert not advise_after(
        changed(advice__ignore=["train.epochs"]), entries, adapter_step=last, before={}
    )


@pytest.mark.parametrize(("general", "forgotten"), [(1.6, True), (1.51, False), (1.2, False)])
def test_a_source_that_is_forgotten(general: float, forgotten: bool) -> None:
    entries = curve([2.0, 1.5, 1.2])
    entries[-1]["eval_loss_by_source"] = {"own": 1.0, "general": general}
    before = {"own": 2.5, "general": 1.5}
    said = advise_after(changed(data__rehearsal=REHEARSAL), entries, adapter_step=30, before=before)
    assert [one.what for one in said] == (["general is forgotten"] if forgotten else [])
    if forgotten:
        assert said[0].set == "Raise data.rehearsal.share above 0.15, or lower train.lr"


def test_the_readme_has_the_same_rules() -> None:
    """Its command for 800 rows gets no advice, and its table is what the rules say."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    command = next(part for part in readme.split("\n\n") if "train.eval_every_steps=" in part)
    words = [word.strip("'") for word in command.split()]
    settings = [word for word in words if "=" in word and not word.startswith("data.sources")]
    own = load_recipe(bundled()["llama31"], settings)
    assert keys(own, **rows(720, examples=800, held_out=80)) == []
    bare = Recipe.model_validate(BARE)
    named = {999: "under 1,000", 10_000: "to 10,000", 50_000: "to 50,000", 50_001: "more"}
    for count, name in named.items():
        filled = {one.key: one.value for one in fill(bare, replace(FACTS, **rows(count)))}
        low, high = _epochs_range(count)
        epochs = f"{low}" if low == high else f"{low} to {high}"
        split = fill_eval(bare, count)[0].value
        assert f"| {name} | {epochs} | {filled['lora.rank']} | {split} |" in readme
