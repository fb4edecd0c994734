"""Greedy answers to held-out questions: exact match before and after, and adapter against merged model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.data.mask import IGNORED
from fastlora.rundir.store import write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_BATCH = 32


@dataclass(frozen=True, slots=True)
class Question:
    prompt_ids: list[int]
    expected_ids: list[int]
    """The last supervised span, without the token that ends it."""


def questions(rows: Dataset, limit: int, stop_token_ids: Sequence[int]) -> list[Question]:
    """The last answer of each of the first `limit` rows and what comes before it."""
    found = []
    for row in rows.select(range(min(limit, len(rows)))):
        labels, ids = row["labels"], row["input_ids"]
        end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
        start = end
        while start > 0 and labels[start - 1] != IGNORED:
            start -= 1
        if start == 0:
            continue  # all of it is supervised: there is no question
        expected = ids[start:end]
        if expected and expected[-1] in stop_token_ids:
            expected = expected[:-1]
        found.append(Question(ids[:start], expected))
    return found


def answer(
    model: PreTrainedModel,
    asked: Sequence[Question],
    *,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy continuations, without the token that ended them. `model` must be in evaluation mode."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    answers: list[list[int]] = []
    for first in range(0, len(asked), _BATCH):
        prompts = [question.prompt_ids for question in asked[first : first + _BATCH]]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
        for continuation in output[:, width:].tolist():
            ends = [place for place, token in enumerate(continuation) if token in stop_token_ids]
            answers.append(continuation[: ends[0]] if ends else continuation)
    return answers


def exact_matches(asked: Sequence[Question], answers: Sequence[Sequence[int]]) -> int:
    return sum(
        list(given) == question.expected_ids for question, given in zip(asked, answers, strict=True)
    )


def save_answers(
    path: Path, asked: Sequence[Question], answers: Sequence[Sequence[int]], **settings: Any
) -> None:
    rows = [
        {
            "prompt_ids": question.prompt_ids,
            "expected_ids": question.expected_ids,
            "answer_ids": list(given),
        }
        for question, given in zip(asked, answers, strict=True)
    ]
    write_atomic(path, json.dumps({**settings, "rows": rows}) + "\n")


def read_answers(path: Path) -> tuple[list[Question], list[list[int]], dict[str, Any]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = document.pop("rows")
    asked = [Question(row["prompt_ids"], row["expected_ids"]) for row in rows]
    return asked, [row["answer_ids"] for row in rows], document
