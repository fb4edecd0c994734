"""Held-out prompts answered before and after training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastlora.data.prompts import Question
from fastlora.engines.memory import explained
from fastlora.export.answers import Row, answered, in_words, questions, read_rows, save_answers
from fastlora.export.score import score
from fastlora.rundir.sections import shown_score

if TYPE_CHECKING:
    from peft import PeftModel

    from fastlora.train.job import Job


_WAY_OUT = (
    "It was one prompt alone: start a new run with a lower eval.max_new_tokens or eval.rows = 0, or end other "
    "processes on this GPU and go on with --resume, which does not train again what was trained"
)


def pick_questions(job: Job) -> list[Question]:
    """Those of the held-out rows, then those of eval.prompts; says what cannot be asked or cannot match."""
    rows, section = job.data.eval, job.recipe.eval
    wanted = 0 if rows is None else min(section.held_out_rows, len(rows))
    asked = questions(rows, wanted, job.run.manifest["stop_token_ids"]) if rows and wanted else []
    if len(asked) < wanted:
        job.notes(
            f"eval.rows: {wanted - len(asked)} of {wanted} held-out rows are not asked, because all of them is "
            'supervised (data.supervise = "all", or text); prompts need data.supervise = "completion"'
        )
    asked += job.data.prompts
    known = [question.expected_ids for question in asked if question.expected_ids is not None]
    lengths = [len(expected) for expected in known]
    if "exact_match" in section.metrics and (
        long := sum(length > section.max_new_tokens for length in lengths)
    ):
        job.notes(
            f"eval.max_new_tokens: {long} of {len(lengths)} expected answers are longer than {section.max_new_tokens} "
            f"tokens and count as wrong; set eval.max_new_tokens = {max(lengths) + 1}"
        )
    against = [metric for metric in section.metrics if metric != "json_valid"]
    if asked and against and not known:
        job.notes(
            f"eval.metrics: {', '.join(against)} not taken, because no prompt comes with its expected answer"
        )
    return asked


def ask_before(job: Job, model: PeftModel, asked: Sequence[Question]) -> None:
    """Unless the run is resumed and has been asked the same before. `model` is not trained yet."""
    path = job.run.path / "answers.json"
    if "answers" in job.run.manifest and path.exists():
        rows, _ = read_rows(path)
        if [row.question for row in rows] == list(asked):
            return
    rows = [Row(question) for question in asked]
    for place, given in _ask(job, model, asked).items():
        rows[place].before_ids = given
    _save(job, rows, "before")


def ask_after(job: Job, model: PeftModel) -> None:
    """The prompts that were answered before."""
    rows, _ = read_rows(job.run.path / "answers.json")
    known = [row for row in rows if row.before_ids is not None]
    for place, given in _ask(job, model, [row.question for row in known]).items():
        known[place].answer_ids = given
    _save(job, rows, "before", "after")


def _ask(job: Job, model: PeftModel, asked: Sequence[Question]) -> dict[int, list[int]]:
    """Answers by their place, of as many as there is time for."""
    import torch

    minutes = job.recipe.eval.max_minutes
    ends = time.monotonic() + 60 * minutes
    answers: dict[int, list[int]] = {}
    with explained("answering prompts", lambda: _WAY_OUT), job.engine.generating(model):
        for batch in answered(model, asked, announce=job.notes, **_settings(job)):
            answers.update(batch)
            if time.monotonic() > ends and len(answers) < len(asked):
                job.notes(
                    f"eval.max_minutes: {len(answers)} of {len(asked)} prompts were answered in {minutes:g} minutes, "
                    "the shortest ones; the others are left out"
                )
                break
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # keys and values: the training's peak is not to count them
    return answers


def _settings(job: Job) -> dict[str, Any]:
    return {
        "stop_token_ids": job.run.manifest["stop_token_ids"],
        "pad_token_id": int(job.tokenizer.pad_token_id),
        "max_new_tokens": job.recipe.eval.max_new_tokens,
        # What fits in training fits here.
        "batch_tokens": job.recipe.train.micro_batch * job.recipe.model.seq_len_tokens,
    }


def _save(job: Job, rows: Sequence[Row], *times: str) -> None:
    """The answers into their files; their scores, over rows that have every one of `times`, into the manifest."""
    run, metrics = job.run, job.recipe.eval.metrics
    save_answers(
        run.path, rows, job.tokenizer, compute_dtype=run.manifest["dtype"], **_settings(job)
    )
    given = {"before": [row.before_ids for row in rows], "after": [row.answer_ids for row in rows]}
    whole = [
        place for place in range(len(rows)) if all(given[when][place] is not None for when in times)
    ]
    asked = [rows[place].question.expected_ids for place in whole]
    expected = [None if ids is None else in_words(job.tokenizer, ids) for ids in asked]
    told: dict[str, Any] = {
        "rows": len(whole),
        "expected": sum(text is not None for text in expected),
    }
    for when in times:
        answers = [in_words(job.tokenizer, given[when][place] or []) for place in whole]
        told[when] = score(metrics, answers, expected)
    run.update(answers=told)
    if last := told[times[-1]]:
        scores = ", ".join(
            f"{metric} {shown_score(metric, value)}" for metric, value in last.items()
        )
        job.notes.say(f"answers {times[-1]} training to {len(whole)} prompts: {scores}")
