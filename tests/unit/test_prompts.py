"""Rows that are asked: with their answer or without, of every format, laid out as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastlora.data.mask import Encoder
from fastlora.data.prompts import Question, last_question, prompt_encoder, read_prompts
from fastlora.errors import DataError

# The form of Qwen2.5's: tools first, calls in the assistant's turn, what tools say in a turn of their own.
TOOLS = (
    "{{ bos_token }}{% if tools %}{{ 'tools:' + (tools | map(attribute='name') | join(',')) + eos_token }}{% endif %}"
    "{% for m in messages %}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.name + '</call>' }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
USER, ASK = {"role": "user", "content": "Hi"}, "<|bos|><|user|>Hi<|end|><|assistant|>"
PLACES = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]},
    {"role": "tool", "content": "9"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "tiny" / "model")


def encoder(tokenizer: Any, template: str = "tokenizer") -> Encoder:
    return prompt_encoder(tokenizer, template)


def read(
    folder: Path, encoder: Encoder, *rows: Any, limit: int | None = None
) -> list[tuple[int, str, str | None]]:
    path = folder / "prompts.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    decode = encoder.tokenizer.decode
    return [
        (number, decode(q.prompt_ids), None if q.expected_ids is None else decode(q.expected_ids))
        for number, q in read_prompts(str(path), encoder, name="x", limit_tokens=limit)
    ]


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({"prompt": "Hi"}, ASK, None),
        ({"prompt": "Hi", "completion": ""}, ASK, None),
        ({"prompt": "Hi", "completion": "Yo"}, ASK, "Yo"),
        ({"prompt": [USER]}, ASK, None),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": "Yo"}]}, ASK, "Yo"),
        ({"messages": [USER]}, ASK, None),
        ({"messages": [{**USER, "weight": 0}]}, ASK, None),
        ({"messages": json.dumps([USER])}, ASK, None),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, ASK, None),
        ({"instruction": "Hi"}, ASK, None),
        ({"instruction": "Hi", "output": "Yo"}, ASK, "Yo"),
        ({"instruction": "Hi", "input": "you"}, ASK.replace("Hi", "Hi\n\nyou"), None),
        ({"prompt": "Hi", "system": "S"}, "<|bos|><|system|>S<|end|>" + ASK[7:], None),
        (
            {"messages": [USER, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "So?"}]},
            "<|bos|><|user|>Hi<|end|><|assistant|>Yo<|end|><|user|>So?<|end|><|assistant|>",
            None,
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "So?"},
                          {"role": "assistant", "content": "No"}]},
            "<|bos|><|user|>Hi<|end|><|assistant|>Yo<|end|><|user|>So?<|end|><|assistant|>",
            "No",
        ),
        ({"text": "Once"}, "Once", None),
    ],
)  # fmt: skip
def test_every_format(
    tokenizer: Any, tmp_path: Path, row: dict[str, Any], prompt: str, expected: str | None
) -> None:
    assert read(tmp_path, encoder(tokenizer), row) == [(1, prompt, expected)]


def test_tools_and_their_calls(tokenizer: Any, tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(TOOLS)
    row = {"messages": PLACES, "tools": [{"name": "look"}]}
    asked = "<|bos|>tools:look<|end|><|user|>Hi<|end|><|assistant|>"
    called = "<call>look</call>"
    answered = {**row, "messages": [*PLACES, {"role": "assistant", "content": "Nine"}]}
    assert read(
        tmp_path, encoder(tokenizer, str(template)), row, answered, {**row, "messages": PLACES[:2]}
    ) == [
        (1, f"{asked}{called}<|end|><|user|>9<|end|><|assistant|>", None),
        (2, f"{asked}{called}<|end|><|user|>9<|end|><|assistant|>", "Nine"),
        (3, asked, called),
    ]


def test_without_a_template_prompts_stand_as_they_are(tokenizer: Any, tmp_path: Path) -> None:
    rows = ({"prompt": "Hi", "system": "S"}, {"prompt": "Hi", "completion": "Yo"})
    assert read(tmp_path, encoder(tokenizer, "none"), *rows) == [
        (1, "S\n\nHi", None),
        (2, "Hi", "Yo"),
    ]


def test_the_same_tokens_as_in_training(tokenizer: Any) -> None:
    """The question of a row that was trained on, and the same row without its answer."""
    ours = encoder(tokenizer)
    ((_, alone),) = read_prompts(["Cipher: ab"], ours, name="x")
    labels = [-100] * len(alone.prompt_ids)
    answer = tokenizer("de<|end|>", add_special_tokens=False)["input_ids"]
    whole = last_question(alone.prompt_ids + answer, labels + answer, [answer[-1]])
    assert whole == Question(alone.prompt_ids, answer[:-1])
    assert last_question(answer, answer, [answer[-1]]) is None


def test_all_bad_rows_are_named_at_once(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(
            tmp_path, encoder(tokenizer), {"prompt": "Hi"}, "", "{", {"question": "Hi"}, {"prompt": " "},
            {"messages": [{"role": "owl", "content": "Hu"}]}, {"prompt": "x" * 50}, {"prompt": "\ud800"}, limit=40,
        )  # fmt: skip
    lines = str(error.value).splitlines()
    path = tmp_path / "prompts.jsonl"
    assert [line.removeprefix(f"{path}: line ").partition(":")[0] for line in lines] == list(
        "345678"
    )
    for line, words in zip(
        lines,
        (
            "not JSON",
            "has none of messages",
            "is empty",
            "role 'owl'",
            "at most 40 fit",
            "surrogate",
        ),
        strict=True,
    ):
        assert words in line


def test_lists_and_files_that_are_none(tokenizer: Any, tmp_path: Path) -> None:
    ours = encoder(tokenizer)
    with pytest.raises(DataError, match=r"eval\.prompts: item 2: prompt is empty"):
        read_prompts(["a", ""], ours, name="eval.prompts")
    with pytest.raises(
        DataError, match=r"--prompts: x\.txt is not a data file; use one of \.jsonl"
    ):
        read_prompts("x.txt", ours, name="--prompts")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_prompts(str(tmp_path / "x.jsonl"), ours, name="--prompts")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(str(tmp_path / "empty.jsonl"), ours, name="--prompts")
