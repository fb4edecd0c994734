"""Answers to prompts: generated in batches, and kept.

A run keeps them twice. RUN/answers.json has the token ids, which the merged model's answers are compared with:
{settings of `answer`, compute_dtype, rows: [{prompt_ids, expected_ids, before_ids, answer_ids}]}; expected_ids may be
left out, and a row not yet answered, or not in time, lacks before_ids or answer_ids (of the tuned model).
RUN/comparison.json has the same for people: a list of {prompt, expected, before, after}, all of them text as the model
reads and writes it, special tokens included; what is not there is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.data.prompts import Question, last_question
from fastlora.engines.memory import free_memory, is_out_of_memory
from fastlora.rundir.store import write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

BATCH_ROWS = 32
BATCH_TOKENS = 16_384
"""Of prompts and answers: 2 GiB of keys and values in an 8B model with 16 bits."""


def questions(rows: Dataset, limit: int, stop_token_ids: Sequence[int]) -> list[Question]:
    """The last answer of `limit` rows, evenly spread, and what comes before it. Rows that are all answer are left
    out."""
    count = min(limit, len(rows))
    picked = rows.select([place * len(rows) // count for place in range(count)])
    found = (last_question(row["input_ids"], row["labels"], stop_token_ids) for row in picked)
    return [question for question in found if question is not None]


def generation_config(
    *,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> GenerationConfig:
    """Greedy at temperature 0, else sampling from the whole distribution as top_p cuts it. What the model's own
    generation_config.json asks for, such as a repetition penalty, does not apply: what is unset here would."""
    from transformers import GenerationConfig

    sampled = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    return GenerationConfig(
        do_sample=bool(sampled),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids),
        pad_token_id=pad_token_id,
        repetition_penalty=1.0,
        use_cache=True,
        **sampled,
    )


def answered(
    model: PreTrainedModel,
    asked: Sequence[Question],
    *,
    batch_rows: int = BATCH_ROWS,
    batch_tokens: int = BATCH_TOKENS,
    announce: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Batch by batch, prompts of like length together: (place in `asked`, continuation without the token that
    ended it). A batch has at most `batch_rows`, and `batch_tokens` of prompts and answers, or is a single row; one that
    does not fit into the memory is halved, which is announced, and no later one has more rows.
    `settings` are those of `generation_config`. `model` must be in evaluation mode."""
    config = generation_config(**settings)
    lengths = [len(question.prompt_ids) for question in asked]
    new, most = settings["max_new_tokens"], batch_rows
    due = list(_batches([length + new for length in lengths], batch_rows, batch_tokens))
    while due:
        places, rest = due[0][:most], due[0][most:]
        due[:1] = [rest] if rest else []
        try:
            answers = _answers(model, asked, places, config)
        except Exception as error:
            if len(places) == 1 or not is_out_of_memory(error):
                raise
            answers, most = [], (len(places) + 1) // 2
        if answers:
            yield answers
        else:
            free_memory()  # not in the handler: there the exception still holds what it came through
            due.insert(0, places)
            announce(
                f"answers: out of memory with {len(places)} prompts at a time; at most {most} from now on"
            )


def _answers(
    model: PreTrainedModel,
    asked: Sequence[Question],
    places: Sequence[int],
    config: GenerationConfig,
) -> list[tuple[int, list[int]]]:
    import torch

    pad, stops = config.pad_token_id, set(config.eos_token_id)
    prompts = [asked[place].prompt_ids for place in places]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
        )
    done = []
    for place, continuation in zip(places, output[:, width:].tolist(), strict=True):
        ends = [at for at, token in enumerate(continuation) if token in stops]
        done.append((place, continuation[: ends[0]] if ends else continuation))
    return done


def answer(model: PreTrainedModel, asked: Sequence[Question], **settings: Any) -> list[list[int]]:
    """All of `answered`, in the order of `asked`."""
    answers: list[list[int]] = [[] for _ in asked]
    for batch in answered(model, asked, **settings):
        for place, given in batch:
            answers[place] = given
    return answers


def _batches(lengths: Sequence[int], most_rows: int, most_tokens: int) -> Iterator[list[int]]:
    """Places by length, in groups that fit into the memory."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = len(batch) == most_rows or (len(batch) + 1) * lengths[place] > most_tokens
        if batch and full:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def in_words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Special tokens stay: a tool call may be made of them, and the token that ends an answer is off already."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(slots=True)
class Row:
    """A question with its answers."""

    question: Question
    before_ids: list[int] | None = None
    answer_ids: list[int] | None = None


def save_answers(
    folder: Path, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> None:
    """Write answers.json and comparison.json. `settings` are those of `answer`, and compute_dtype."""

    def words(ids: list[int] | None) -> str | None:
        return None if ids is None else in_words(tokenizer, ids)

    tokens, compared = [], []
    for row in rows:
        asked = row.question
        entry = {
            "prompt_ids": asked.prompt_ids,
            "expected_ids": asked.expected_ids,
            "before_ids": row.before_ids,
            "answer_ids": row.answer_ids,
        }
        if row.before_ids is not None:
            compared.append(
                {
                    "prompt": words(asked.prompt_ids),
                    "expected": words(asked.expected_ids),
                    "before": words(row.before_ids),
                    "after": words(row.answer_ids),
                }
            )
        tokens.append({key: ids for key, ids in entry.items() if ids is not None})
    write_atomic(folder / "answers.json", json.dumps({**settings, "rows": tokens}) + "\n")
    shown = [{key: text for key, text in one.items() if text is not None} for one in compared]
    # Escaped, since a model may write half of a surrogate pair, which is no UTF-8.
    write_atomic(folder / "comparison.json", json.dumps(shown, indent=1) + "\n")


def read_rows(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of an answers.json, and its settings."""
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        Row(
            Question(row["prompt_ids"], row.get("expected_ids")),
            row.get("before_ids"),
            row.get("answer_ids"),
        )
        for row in document.pop("rows")
    ]
    return rows, document


def read_answers(path: Path) -> tuple[list[Question], list[list[int]], dict[str, Any]]:
    """What the tuned model was asked and answered, and the settings."""
    rows, settings = read_rows(path)
    pairs = [(row.question, row.answer_ids) for row in rows if row.answer_ids is not None]
    return [asked for asked, _ in pairs], [given for _, given in pairs], settings
