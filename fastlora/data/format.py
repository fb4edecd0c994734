"""The five row formats people have, turned into the two that are trained on: a Chat or a Plain text.

| format            | fields                                                          |
| ----------------- | --------------------------------------------------------------- |
| alpaca            | instruction, output; input and system if wanted                  |
| messages          | messages: list of {role, content}; tools if wanted               |
| sharegpt          | conversations: list of {from, value}; system if wanted           |
| prompt_completion | prompt, completion: both strings, or both lists of {role, content} |
| text              | text                                                             |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastlora.recipe.schema import DataFormat

Message = dict[str, Any]

# The field lists are tried in this order; the first whose fields are all there wins.
REQUIRED_FIELDS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool",
    "function_response": "tool", "observation": "tool", "developer": "developer",
}  # fmt: skip


class BadRow(ValueError):
    """A row that cannot be trained on; the message says why."""


@dataclass(frozen=True, slots=True)
class Chat:
    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """Text that no template touches; all of it is supervised unless a prompt is set apart."""

    completion: str
    prompt: str = ""


def detect_format(fields: Iterable[Iterable[str]]) -> DataFormat | None:
    """The format that most rows' field names speak for; None if none fits any row."""
    votes: Counter[DataFormat] = Counter()
    for names in fields:
        present = set(names)
        for data_format, required in REQUIRED_FIELDS.items():
            if present.issuperset(required):
                votes[data_format] += 1
                break
    return votes.most_common(1)[0][0] if votes else None


def to_example(row: dict[str, Any], data_format: DataFormat, *, templated: bool) -> Chat | Plain:
    """Turn one row into an example.

    `templated` is False with data.template = "none": then prompts and completions stay Plain.
    Raises BadRow with the reason.
    """
    for field in REQUIRED_FIELDS[data_format]:
        if row.get(field) is None:
            raise BadRow(f"has no {field}")
    match data_format:
        case "text":
            return Plain(_text(row, "text"))
        case "alpaca":
            prompt = _text(row, "instruction")
            if row.get("input"):
                prompt += "\n\n" + _text(row, "input")
            return _pair(prompt, _text(row, "output"), row.get("system"), templated)
        case "prompt_completion":
            if isinstance(row["prompt"], str):
                return _pair(_text(row, "prompt"), _text(row, "completion"), None, templated)
            turns = _messages(row, "prompt") + _messages(row, "completion")
        case "messages":
            turns = _messages(row, "messages")
        case "sharegpt":
            turns = _messages(row, "conversations")
            if row.get("system"):
                turns.insert(0, {"role": "system", "content": _text(row, "system")})
    if not templated:
        raise BadRow(
            'is a conversation, which data.template = "none" cannot lay out; use a chat template'
        )
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow("has no assistant turn to learn from")
    return Chat(turns, _parsed(row.get("tools"), "tools") or None)


def _pair(prompt: str, completion: str, system: Any, templated: bool) -> Chat | Plain:
    if not templated:
        return Plain(completion, prompt)
    turns = [{"role": "system", "content": str(system)}] if system else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Chat(turns)


def _text(row: dict[str, Any], field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{field} is empty")
    return value


def _parsed(value: Any, field: str) -> Any:
    """csv holds lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError:
        raise BadRow(f"{field} is text that is not JSON; expected a list of messages") from None


def _messages(row: dict[str, Any], field: str) -> list[Message]:
    turns = _parsed(row[field], field)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{field} is not a list of messages" if turns else f"{field} is empty")
    messages = []
    for place, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"{field}: message {place} is {type(turn).__name__}, not an object")
        said = turn.get("role", turn.get("from"))
        role = _ROLES.get(str(said).lower())
        if role is None:
            raise BadRow(f"{field}: message {place} has role {said!r}; known: {', '.join(_ROLES)}")
        content = turn.get("content", turn.get("value"))
        extras = {key: value for key, value in turn.items() if value is not None}
        for key in ("role", "from", "content", "value", "weight"):
            extras.pop(key, None)
        if content is None and extras.get("tool_calls"):
            content = ""
        elif not isinstance(content, str):
            raise BadRow(
                f"{field}: message {place} has content of type {type(content).__name__}, not text"
            )
        elif not content.strip() and not extras.get("tool_calls"):
            raise BadRow(f"{field}: message {place} is empty")
        messages.append({"role": role, "content": content, **extras})
    return messages
