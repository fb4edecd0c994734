"""The five row formats people have, turned into the two that are trained on: a Chat or a Plain text.

| format            | fields                                                             |
| ----------------- | ------------------------------------------------------------------ |
| alpaca            | instruction, output; input if wanted                               |
| messages          | messages: list of {role, content}; tools if wanted                 |
| sharegpt          | conversations: list of {from, value}; tools if wanted              |
| prompt_completion | prompt, completion: both strings, or both lists of {role, content} |
| text              | text                                                               |

A message's content is a string, or a list of parts {type: "text", text}. All but text may have a field system. An
assistant's message of weight 0 is not learnt (data.supervise = "all" means all).
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
_OPTIONAL_FIELDS: dict[DataFormat, tuple[str, ...]] = {
    "alpaca": ("input", "system"),
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("system", "tools"),
    "text": (),
}
FIELDS = tuple(dict.fromkeys(sum((*REQUIRED_FIELDS.values(), *_OPTIONAL_FIELDS.values()), ())))

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool",
    "function_response": "tool", "observation": "tool", "developer": "developer",
}  # fmt: skip


class BadRow(ValueError):
    """A row that cannot be trained on; the message says why."""


class EmptyText(BadRow):
    """A turn or field of nothing, or of whitespace alone."""


class UnknownRole(BadRow):
    """A turn whose speaker is not known."""


@dataclass(frozen=True, slots=True)
class Chat:
    messages: list[Message]
    tools: list[Any] | None = None
    given: frozenset[int] = frozenset()
    """The places of messages that are not to be learnt, whoever says them."""


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


def unread(fields: Iterable[str], data_format: DataFormat) -> list[str]:
    """Those that a row of this format may have and nothing reads."""
    read = {*REQUIRED_FIELDS[data_format], *_OPTIONAL_FIELDS[data_format]}
    return sorted({*map(str, fields)} - read)


def to_example(row: dict[str, Any], data_format: DataFormat, *, templated: bool) -> Chat | Plain:
    """Turn one row into an example.

    `templated` is False with data.template = "none": then prompts and completions stay Plain.
    Raises BadRow with the reason.
    """
    for field in REQUIRED_FIELDS[data_format]:
        if row.get(field) is None:
            raise BadRow(f"has no {field}")
    system = _optional(row, "system") if data_format != "text" else ""
    match data_format:
        case "text":
            return Plain(_text(row, "text"))
        case "alpaca":
            return _pair(_instruction(row), _text(row, "output"), system, templated)
        case "prompt_completion":
            if isinstance(row["prompt"], str):
                return _pair(_text(row, "prompt"), _text(row, "completion"), system, templated)
            if not isinstance(row["prompt"], list):
                raise BadRow("prompt is neither a string nor a list of messages")
            prompt_turns = [{**turn, "weight": 0} for turn in _messages(row, "prompt")]
            turns = prompt_turns + _messages(row, "completion")
        case "messages":
            turns = _messages(row, "messages")
        case "sharegpt":
            turns = _messages(row, "conversations")
    turns = _conversation(turns, system, templated)
    given = frozenset(place for place, turn in enumerate(turns) if turn.pop("weight", 1) == 0)
    if not any(
        turn["role"] == "assistant" and place not in given for place, turn in enumerate(turns)
    ):
        raise BadRow("has no assistant turn to learn from")
    return Chat(turns, _parsed(row.get("tools"), "tools") or None, given)


def to_prompt(row: dict[str, Any], *, templated: bool) -> tuple[Chat | Plain, bool]:
    """Turn a row that is to be answered into an example; and whether its last answer is in it already.

    The fields are those of training, of which the answer may be missing: output, completion, or the last turn of a
    conversation. A text is taken as a beginning, which no template touches. Raises BadRow with the reason.
    """
    known = ("messages", "conversations", "instruction", "prompt", "text")
    field = next((name for name in known if row.get(name) is not None), None)
    if field is None:
        raise BadRow(f"has none of {', '.join(known)}")
    if field == "text":
        return Plain("", _text(row, "text")), False
    said = field in ("messages", "conversations") or not isinstance(row[field], str)
    turns = _messages(row, field) if said else []
    if field in ("messages", "conversations"):
        answered = turns[-1]["role"] == "assistant"
    else:
        answered = bool(_filled(row.get("output" if field == "instruction" else "completion")))
    if answered:
        data_format = next(name for name, fields in REQUIRED_FIELDS.items() if field in fields)
        return to_example(row, data_format, templated=templated), True
    system = _optional(row, "system")
    if not said:
        prompt = _instruction(row) if field == "instruction" else _text(row, field)
        if not templated:
            return Plain("", f"{system}\n\n{prompt}" if system else prompt), False
        turns = [{"role": "user", "content": prompt}]
    turns = _conversation(turns, system, templated)
    for turn in turns:
        turn.pop("weight", None)
    return Chat(turns, _parsed(row.get("tools"), "tools") or None), False


def _instruction(row: dict[str, Any]) -> str:
    more = _optional(row, "input")
    return _text(row, "instruction") + ("\n\n" + more if more else "")


def _conversation(turns: list[Message], system: str, templated: bool) -> list[Message]:
    if not templated:
        raise BadRow(
            'is a conversation, which data.template = "none" cannot lay out; use a chat template'
        )
    return _with_system(turns, system) if system else turns


def _pair(prompt: str, completion: str, system: str, templated: bool) -> Chat | Plain:
    if not templated:
        return Plain(completion, f"{system}\n\n{prompt}" if system else prompt)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Chat(_with_system(turns, system) if system else turns)


def _with_system(turns: list[Message], system: str) -> list[Message]:
    """The field's words lead the conversation, unless a turn already says them."""
    said = [turn["content"] for turn in turns if turn["role"] in ("system", "developer")]
    if not said:
        return [{"role": "system", "content": system}, *turns]
    if system.strip() not in (words.strip() for words in said):
        raise BadRow("has a field system and a system turn that says something else; keep one")
    return turns


def _optional(row: dict[str, Any], field: str) -> str:
    """Nothing where the field is missing, empty or blank."""
    return _text(row, field) if _filled(row.get(field)) else ""


def _filled(value: Any) -> Any:
    return value if value and str(value).strip() else None


def _text(row: dict[str, Any], field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}, not text")
    if not value.strip():
        raise EmptyText(f"{field} is empty")
    return value


def _parsed(value: Any, field: str) -> Any:
    """csv holds lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise BadRow(f"{field} is text that is not JSON; expected a list of messages") from None


def _messages(row: dict[str, Any], field: str) -> list[Message]:
    turns = _parsed(row[field], field)
    if not turns:
        raise EmptyText(f"{field} is empty")
    if not isinstance(turns, list):
        raise BadRow(f"{field} is not a list of messages")
    messages = []
    for place, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"{field}: message {place} is {type(turn).__name__}, not an object")
        said = turn.get("role", turn.get("from"))
        role = _ROLES.get(str(said).lower())
        if role is None:
            raise UnknownRole(
                f"{field}: message {place} has role {said!r}; known: {', '.join(_ROLES)}"
            )
        content = turn.get("content", turn.get("value"))
        extras = {key: value for key, value in turn.items() if value is not None}
        for key in ("role", "from", "content", "value"):
            extras.pop(key, None)
        if extras.get("weight", 1) not in (0, 1):
            raise BadRow(f"{field}: message {place} has weight {extras['weight']!r}; known: 0, 1")
        # Templates ask whether there are tool calls, not how many.
        if not (calls := extras.get("tool_calls")):
            extras.pop("tool_calls", None)
        elif not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise BadRow(f"{field}: message {place} has tool_calls that are not a list of calls")
        if isinstance(content, list):
            content = _joined(content, f"{field}: message {place}")
        if content is None and calls:
            content = ""
        elif not isinstance(content, str):
            raise BadRow(
                f"{field}: message {place} has content of type {type(content).__name__}, not text"
            )
        elif not content.strip() and not calls:
            raise EmptyText(f"{field}: message {place} is empty")
        messages.append({"role": role, "content": content, **extras})
    return messages


def _joined(parts: list[Any], where: str) -> str:
    """The text of content that is a list of parts, {type: "text", text}, as templates of models that see join it."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) and kind == "text" else None
        if not isinstance(text, str):
            raise BadRow(f"{where} has a part of type {kind}; text alone is trained on")
        texts.append(text)
    return "".join(texts)


def _is_call(call: Any) -> bool:
    """{function: {name, arguments}}, or {name, arguments} alone."""
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
