"""Every row format from every file type, and rows that are refused with their place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastlora.data.format import BadRow, Chat, Plain, detect_format, to_example
from fastlora.data.load import FILE_TYPES, load_table
from fastlora.engines.base import load_tokenizer
from fastlora.errors import DataError, EngineError
from fastlora.recipe.schema import ModelSection, SourceSection

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, \u201cyou\u201d"},
]
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Say hello.", "input": "to Ann", "output": "Hello, Ann"},
    "messages": {"messages": TURNS},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    },
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "text": {"text": 'Once upon a time\nthere was, "a" line.'},
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                for row in rows:
                    writer.writerow(
                        {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                    )
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def said(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("suffix", FILE_TYPES)
@pytest.mark.parametrize("name", ROWS)
def test_each_format_from_each_file_type(name: Any, suffix: str, tmp_path: Path) -> None:
    table = load_table(SourceSection(path=str(write(tmp_path / f"rows{suffix}", [ROWS[name]] * 3))))
    assert len(table.rows) == 3
    values = [row.value for row in table.rows if row.value is not None]
    assert detect_format(values) == name
    example = to_example(values[0], name, templated=True)
    if name == "text":
        assert example == Plain(ROWS["text"]["text"])
    else:
        assert isinstance(example, Chat)
        assert [turn["role"] for turn in example.messages] == ["user", "assistant"]
        assert example.messages[0]["content"] == {"alpaca": "Say hello.\n\nto Ann"}.get(name, "Hi")


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [ROWS["text"]])
    before = load_table(SourceSection(path=str(path))).fingerprint
    write(path, [ROWS["text"], ROWS["text"]])
    assert load_table(SourceSection(path=str(path))).fingerprint != before


def test_bad_lines_keep_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n[1]\n{"text": "b\u2028c"}\n')
    rows = load_table(SourceSection(path=str(path))).rows
    assert [row.number for row in rows] == [1, 3, 4, 5]
    assert rows[1].problem is not None
    assert rows[1].problem.startswith("not JSON")
    assert rows[2].problem == "is list, not an object with fields"
    assert rows[3].value == {"text": "b\u2028c"}


def test_csv_lines_count_line_breaks_in_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,n\n"two\nlines",1\nshort\nthree,2,3\nlast,4\n')
    rows = load_table(SourceSection(path=str(path))).rows
    assert [(row.number, row.value is None) for row in rows] == [
        (2, False),
        (4, True),
        (5, True),
        (6, False),
    ]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_of_spreadsheets_that_write_no_commas(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'prompt{mark}completion\n"a{mark}b"{mark}1,5\n')
    (row,) = load_table(SourceSection(path=str(path))).rows
    assert row.value == {"prompt": f"a{mark}b", "completion": "1,5"}


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c"])
def test_csv_cells_hold_what_python_takes_for_a_line_break(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(f"text\r\na{odd}b\r\nc\r\n".encode())
    rows = load_table(SourceSection(path=str(path))).rows
    assert [(row.number, row.value) for row in rows] == [
        (2, {"text": f"a{odd}b"}),
        (3, {"text": "c"}),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [("[" * 100_000, "nested too deeply"), (f'{{"n": {"9" * 5000}}}', "5000 digits")],
)
def test_json_that_python_cannot_read_is_one_bad_line(
    line: str, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n')
    rows = load_table(SourceSection(path=str(path))).rows
    assert [(row.number, row.value is None) for row in rows] == [(1, False), (2, True), (3, False)]
    assert problem in str(rows[1].problem)
    path = tmp_path / "rows.json"
    path.write_text(line)
    with pytest.raises(DataError, match="not readable as json"):
        load_table(SourceSection(path=str(path)))
    with pytest.raises(BadRow, match="messages is text that is not JSON"):
        to_example({"messages": line}, "messages", templated=True)


@pytest.mark.parametrize("name", ROWS)
def test_a_json_file_may_hold_one_row_alone(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[name]))
    assert [row.value for row in load_table(SourceSection(path=str(path))).rows] == [ROWS[name]]
    path.write_text(json.dumps({"data": [ROWS[name]] * 2}))
    assert len(load_table(SourceSection(path=str(path))).rows) == 2


def test_parquet_pads_objects_with_nulls_that_are_left_out(tmp_path: Path) -> None:
    def row(name: str, **arguments: Any) -> dict[str, Any]:
        call = {"function": {"name": name, "arguments": arguments}}
        tool = {"name": name, "parameters": dict.fromkeys(arguments, "any")}
        turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
        return {"messages": turns, "tools": [tool]}

    rows = [row("get", city="paris"), row("add", x=[1, None], y=2)]
    path = write(tmp_path / "rows.parquet", rows)
    for read, written in zip(load_table(SourceSection(path=str(path))).rows, rows, strict=True):
        assert read.value is not None
        example = to_example(read.value, "messages", templated=True)
        assert isinstance(example, Chat)
        assert example.messages[1]["tool_calls"] == written["messages"][1]["tool_calls"]
        assert example.tools == written["tools"]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(load_table(SourceSection(path=str(path))).rows) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "No such file"),
        ("rows.json", b"{", "not readable as json"),
        ("rows.json", b'{"a": 1}', "a list of objects"),
        ("rows.parquet", b"nonsense", "not readable as parquet"),
        ("rows.jsonl", b"\xff\xfe{\x00", "not UTF-8"),
        ("rows.txt", b"hello", "not a data file"),
        ("org/no-such-set", None, "not loadable from the Hub"),
    ],
)
def test_unreadable_sources(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_table(SourceSection(path=name if "/" in name else str(path)))


@pytest.mark.parametrize(
    ("row", "data_format", "reason"),
    [
        ({"instruction": "x"}, "alpaca", "has no output"),
        ({"instruction": "x", "output": " "}, "alpaca", "output is empty"),
        ({"instruction": 3, "output": "y"}, "alpaca", "instruction is int, not text"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": "not json"}, "messages", "not JSON"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "no assistant turn"),
        ({"messages": [{"role": "boss", "content": "hi"}]}, "messages", "role 'boss'"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "message 1 is empty"),
        ({"messages": ["hi"]}, "messages", "message 1 is str"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "sharegpt", "content of type int"),
        (
            {"messages": [said([{"type": "image_url"}])]},
            "messages",
            "message 1 has a part of type image_url",
        ),
        ({"messages": [said([{"type": "text"}])]}, "messages", "message 1 has a part of type text"),
        ({"messages": [said(["a"])]}, "messages", "message 1 has a part of type str"),
        ({"messages": [said([])]}, "messages", "message 1 is empty"),
        ({"text": None}, "text", "has no text"),
        ({"messages": [{**TURNS[1], "weight": 0.5}]}, "messages", "weight 0.5; known: 0, 1"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "messages", "no assistant turn"),
        ({"prompt": TURNS, "completion": [TURNS[0]]}, "prompt_completion", "no assistant turn"),
        (
            {"messages": [{"role": "assistant", "tool_calls": "x"}]},
            "messages",
            "not a list of calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages",
            "not a list of calls",
        ),
        (
            {"conversations": [{"from": "system", "value": "S1"}, *TURNS], "system": "S2"},
            "sharegpt",
            "field system and a system turn",
        ),
    ],
)
def test_bad_rows_say_why(row: dict[str, Any], data_format: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_example(row, data_format, templated=True)


def test_content_may_be_a_list_of_texts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    example = to_example({"messages": [said(parts), TURNS[1]]}, "messages", templated=True)
    assert example == Chat([said("Hello"), TURNS[1]])


def test_detection_goes_with_most_rows_and_may_find_nothing() -> None:
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}]
    assert detect_format(rows) == "prompt_completion"
    assert detect_format([{"question": "a"}]) is None


def test_without_template_pairs_stay_plain_and_conversations_are_refused() -> None:
    assert to_example(ROWS["prompt_completion"], "prompt_completion", templated=False) == Plain(
        "Hello", "Hi"
    )
    with pytest.raises(BadRow, match="conversation"):
        to_example(ROWS["messages"], "messages", templated=False)


def test_turns_of_weight_0_and_turns_of_the_prompt_are_given() -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[0], {**TURNS[1], "weight": 1}]
    assert to_example({"messages": turns}, "messages", templated=True) == Chat(
        TURNS * 2, given=frozenset({1})
    )
    row = {"system": "S", "prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]}
    assert to_example(row, "prompt_completion", templated=True) == Chat(
        [{"role": "system", "content": "S"}, *TURNS * 2], given=frozenset({1, 2, 3})
    )


@pytest.mark.parametrize("name", ["alpaca", "messages", "sharegpt", "prompt_completion"])
def test_a_system_field_leads_every_kind_of_chat(name: Any) -> None:
    example = to_example({**ROWS[name], "system": "Be short."}, name, templated=True)
    assert isinstance(example, Chat)
    assert example.messages[0] == {"role": "system", "content": "Be short."}
    bare = to_example(ROWS[name], name, templated=True)
    assert isinstance(bare, Chat)
    assert example.messages[1:] == bare.messages
    for nothing in (None, "", " \n"):
        assert to_example({**ROWS[name], "system": nothing}, name, templated=True) == bare


def test_a_system_field_that_a_turn_repeats_is_said_once() -> None:
    turns = [{"role": "system", "content": "Be short."}, *TURNS]
    row = {"messages": turns, "system": "Be short.\n"}
    assert to_example(row, "messages", templated=True) == Chat(turns)


@pytest.mark.parametrize("name", ["alpaca", "prompt_completion"])
def test_a_system_field_leads_the_prompt_where_there_is_no_template(name: Any) -> None:
    bare = to_example(ROWS[name], name, templated=False)
    assert isinstance(bare, Plain)
    example = to_example({**ROWS[name], "system": "Be short."}, name, templated=False)
    assert example == Plain(bare.completion, "Be short.\n\n" + bare.prompt)


def test_a_blank_input_is_none() -> None:
    row = {"instruction": "Say hello.", "input": " \n", "output": "Hello"}
    assert to_example(row, "alpaca", templated=False) == Plain("Hello", "Say hello.")


def test_a_model_that_is_half_there_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"gone cannot be loaded \(no such folder\)"):
        load_tokenizer(ModelSection(name=str(tmp_path / "gone")))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        EngineError, match=r"\(no tokenizer.json or other vocabulary is in it\). Copy"
    ):
        load_tokenizer(ModelSection(name=str(tmp_path)))
