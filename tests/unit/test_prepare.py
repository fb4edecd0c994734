"""From sources to token ids: counting, refusing, truncating, splitting, packing, caching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastlora.data import cache
from fastlora.data.mask import IGNORED
from fastlora.data.prepare import prepare_data
from fastlora.data.prepared import Prepared
from fastlora.errors import DataError
from fastlora.recipe.schema import Recipe


def row(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "tiny" / "model")


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write(tmp_path, [row(f"Say {n}", "x" * (n + 1)) for n in range(10)])


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def recipe(source: Path | str, seq_len_tokens: int = 64, seed: int = 3407, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "tiny", "seq_len_tokens": seq_len_tokens},
            "data": {"sources": [str(source)], **data},
            "train": {"seed": seed},
            "output": {"dir": "runs"},
        }
    )


def run(wanted: Recipe, tokenizer: Any) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    return prepare_data(wanted, tokenizer, said.append), said


def test_counts_by_hand(rows_file: Path, tokenizer: Any) -> None:
    data, said = run(recipe(rows_file), tokenizer)
    stats = data.stats.train
    # bos user S a y _ n end assistant x*(n+1) end: 10 + n tokens and 1 more, n + 2 of them supervised
    assert stats.rows == stats.sequences == 10
    assert stats.tokens == sum(8 + 1 + (n + 1) + 1 for n in range(10))
    assert stats.supervised_tokens == sum(n + 2 for n in range(10))
    assert stats.longest_row_tokens == 20
    assert any("format messages (detected)" in line for line in said)
    first = data.train[0]
    assert (
        tokenizer.decode([t for t, label in zip(*first.values(), strict=True) if label != IGNORED])
        == "x<|end|>"
    )
    assert [supervised for _, supervised in data.stats.preview] == [False, True]


def test_truncation_is_counted(rows_file: Path, tokenizer: Any) -> None:
    data, said = run(recipe(rows_file, seq_len_tokens=12), tokenizer)
    stats = data.stats.train
    assert max(len(ids) for ids in data.train["input_ids"]) == 12
    assert stats.truncated_rows == 8
    assert stats.truncated_tokens == stats.truncated_supervised_tokens == sum(range(1, 9))
    assert any("8 rows cut at 12 tokens" in line for line in said)


def test_rows_without_an_answer_left_are_dropped_aloud(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [row("a" * 40, "yes"), row("a", "yes")])
    data, said = run(recipe(path, seq_len_tokens=20), tokenizer)
    assert (data.stats.train.rows, data.stats.train.unsupervised_rows) == (1, 1)
    assert any("1 rows dropped" in line for line in said)


def test_no_supervised_token_refuses_to_start(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [row("a" * 40, "yes")])
    with pytest.raises(
        DataError, match=r"Raise model\.seq_len_tokens \(the longest row has 48 tokens\)"
    ):
        run(recipe(path, seq_len_tokens=20), tokenizer)


def test_empty_data_refuses_to_start(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no rows"):
        run(recipe(write(tmp_path, [])), tokenizer)


def test_bad_rows_are_refused_with_their_lines(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [row("a", "b"), "{", {"messages": []}, row("a", "b")])
    with pytest.raises(DataError) as caught:
        run(recipe(path), tokenizer)
    message = str(caught.value)
    assert f"{path}: line 2: not JSON" in message
    assert f"{path}: line 3: messages is empty" in message
    assert 'data.on_bad_row = "skip"' in message


def test_bad_rows_are_skipped_and_counted_on_request(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [row("a", "b"), "{", row("a", "c")])
    data, said = run(recipe(path, on_bad_row="skip"), tokenizer)
    assert data.stats.train.rows == 2
    assert data.stats.sources[0]["bad_rows"][0][0] == 2
    assert any("1 bad row skipped" in line for line in said)
    with pytest.raises(DataError, match="no rows"):
        run(recipe(write(tmp_path, ["{"], "all_bad.jsonl"), on_bad_row="skip"), tokenizer)


def test_columns_that_nothing_reads_are_named(tmp_path: Path, tokenizer: Any) -> None:
    asked = {"question": "a", "output": "b", "input": "", "empty": "", "tags": None}
    rows = [asked, {**asked, "history": [["c", "d"]], "id": 7}]
    source = {"path": str(write(tmp_path, rows)), "columns": {"instruction": "question"}}
    data, said = run(recipe("", sources=[source]), tokenizer)
    assert data.stats.sources[0]["unread"] == ["history", "id"]
    assert any(line.endswith("(detected); not read: history, id") for line in said)


def test_unknown_columns_name_what_is_known_and_can_be_renamed(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write(tmp_path, [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r"columns question, answer.*columns = "):
        run(recipe(path), tokenizer)
    source = {"path": str(path), "columns": {"instruction": "question", "output": "answer"}}
    renamed = Recipe.model_validate(
        {
            "model": {"name": "tiny", "seq_len_tokens": 64},
            "data": {"sources": [source]},
            "output": {"dir": "runs"},
        }
    )
    assert run(renamed, tokenizer)[0].stats.sources[0]["format"] == "alpaca"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mesages": "x"}, "no field is named mesages; did you mean messages"),
        ({"messages": "turns"}, "messages is to come from 'turns', which no row has"),
    ],
)
def test_columns_that_rename_nothing_are_refused(
    columns: dict[str, str], message: str, rows_file: Path, tokenizer: Any
) -> None:
    wanted = recipe(rows_file).model_dump()
    wanted["data"]["sources"][0]["columns"] = columns
    with pytest.raises(DataError, match=message):
        run(Recipe.model_validate(wanted), tokenizer)


def test_the_preview_is_the_first_row_trained_on_as_cut(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [row("a" * 40, "dropped"), row("a", "b" * 40)])
    data, _ = run(recipe(path, seq_len_tokens=20), tokenizer)
    assert data.stats.preview == [("<|bos|><|user|>a<|end|><|assistant|>", False), ("b" * 15, True)]


def test_text_never_meets_the_template(tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "tiny" / "model")
    own.chat_template = "{{ raise_exception('no chats') }}"
    text = write(tmp_path, [{"text": "abc"}], "text.jsonl")
    data, said = run(recipe(text), own)
    assert data.stats.stop_token == "<|end|>"
    assert not any("stops at both" in line for line in said)
    with pytest.raises(DataError) as caught:
        run(recipe(write(tmp_path, [row("a", "b")] * 40)), own)
    assert str(caught.value).count("no chats") == 1


def test_what_no_tokenizer_takes_is_refused_with_its_line(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [row("a", "b"), row("a", "x \ud83d y")])
    with pytest.raises(DataError, match=r"line 2: holds '\\ud83d', half of a surrogate pair"):
        run(recipe(path), tokenizer)


def test_a_problem_is_told_once(tmp_path: Path, tokenizer: Any) -> None:
    path = str(write(tmp_path, ["{"]))
    wanted = recipe(path).model_dump()
    wanted["data"]["sources"] = [{"path": path, "format": "text"}] * 2
    with pytest.raises(DataError) as caught:
        run(Recipe.model_validate(wanted), tokenizer)
    assert str(caught.value).count("line 1") == 1


def test_a_tokenizer_without_template_refuses(tmp_path: Path, rows_file: Path) -> None:
    bare = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "tiny" / "model")
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        run(recipe(rows_file), bare)
    text = write(tmp_path, [{"text": "abc"}], "text.jsonl")
    assert run(recipe(text), bare)[0].stats.train.supervised_tokens == 3  # b, c and EOS


def test_split_holds_out_the_same_rows_every_time(rows_file: Path, tokenizer: Any) -> None:
    first, _ = run(recipe(rows_file, eval_split=0.3), tokenizer)
    second, _ = run(recipe(rows_file, eval_split=3), tokenizer)
    other, _ = run(recipe(rows_file, eval_split=3, seed=1), tokenizer)
    assert first.eval is not None
    assert second.eval is not None
    assert other.eval is not None
    assert (len(first.train), len(first.eval)) == (7, 3)
    assert first.eval["input_ids"] == second.eval["input_ids"]
    assert first.eval["input_ids"] != other.eval["input_ids"]
    everything = [tuple(ids) for ids in [*first.train["input_ids"], *first.eval["input_ids"]]]
    assert len(set(everything)) == 10
    with pytest.raises(DataError, match="leaves none to train on"):
        run(recipe(rows_file, eval_split=10), tokenizer)


def test_packing_keeps_every_token_and_no_boundary_is_supervised(
    rows_file: Path, tokenizer: Any
) -> None:
    plain, _ = run(recipe(rows_file), tokenizer)
    packed, _ = run(recipe(rows_file, packing=True), tokenizer)
    assert packed.stats.train.rows == 10
    assert packed.stats.train.sequences == len(packed.train) < 10
    assert sum(map(sum, packed.train["seq_lengths"])) == plain.stats.train.tokens
    count = sum(label != IGNORED for labels in packed.train["labels"] for label in labels)
    assert count == plain.stats.train.supervised_tokens
    for labels, lengths in zip(packed.train["labels"], packed.train["seq_lengths"], strict=True):
        starts = [sum(lengths[:n]) for n in range(len(lengths))]
        assert all(labels[start] == IGNORED for start in starts)


def test_cache_is_used_until_anything_that_matters_changes(
    rows_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    tokenizer("left behind", truncation=True, max_length=9, padding="max_length")
    first, _ = run(recipe(rows_file, eval_split=2), tokenizer)
    again, said = run(recipe(rows_file, eval_split=2), tokenizer)
    assert any("from the cache" in line for line in said)
    assert again.train["input_ids"] == first.train["input_ids"]
    assert again.stats == first.stats

    def misses(wanted: Recipe, with_tokenizer: Any = tokenizer) -> bool:
        return not any("from the cache" in line for line in run(wanted, with_tokenizer)[1])

    assert misses(recipe(rows_file, eval_split=2, seq_len_tokens=32))
    assert misses(recipe(rows_file, eval_split=2, supervise="all"))
    assert misses(recipe(rows_file, eval_split=2, packing=True))
    assert misses(recipe(rows_file, eval_split=2, seed=1))
    other = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "tiny" / "model")
    other.chat_template = other.chat_template.replace("| trim", "")
    assert misses(recipe(rows_file, eval_split=2), other)
    with rows_file.open("a") as file:
        file.write(json.dumps(row("one", "more")) + "\n")
    assert misses(recipe(rows_file, eval_split=2))


def test_a_damaged_cache_is_made_again(
    rows_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    first, _ = run(recipe(rows_file), tokenizer)
    for file in (tmp_path / "cache").rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:40])
    again, said = run(recipe(rows_file), tokenizer)
    assert not any("from the cache" in line for line in said)
    assert again.train["input_ids"] == first.train["input_ids"]


def test_a_full_disk_costs_only_the_cache(
    rows_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", full)
    data, said = run(recipe(rows_file), tokenizer)
    assert len(data.train) == 10
    assert any("not cached" in line for line in said)
