"""Held-out rows answered before and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlora.export.answers import Question, answer, exact_matches, questions, save_answers

if TYPE_CHECKING:
    from peft import PeftModel

    from fastlora.train.job import Job


def pick_questions(job: Job) -> list[Question]:
    """As many as eval.exact_match_rows says; says which held-out rows cannot be asked or cannot match."""
    rows, limit = job.data.eval, job.recipe.eval.max_new_tokens
    if rows is None or not job.recipe.eval.exact_match_rows:
        return []
    wanted = min(job.recipe.eval.exact_match_rows, len(rows))
    asked = questions(rows, wanted, job.run.manifest["stop_token_ids"])
    if len(asked) < wanted:
        job.notes(
            f"eval.exact_match_rows: {wanted - len(asked)} of {wanted} held-out rows are not asked, because all of "
            'them is supervised (data.supervise = "all", or text); prompts need data.supervise = "completion"'
        )
    lengths = [len(question.expected_ids) for question in asked]
    if long := sum(length > limit for length in lengths):
        job.notes(
            f"eval.exact_match_rows: {long} of {len(asked)} expected answers are longer than eval.max_new_tokens = "
            f"{limit} and count as wrong; set eval.max_new_tokens = {max(lengths) + 1}"
        )
    return asked


def ask(job: Job, model: PeftModel, asked: list[Question]) -> int:
    """How many answers are right; all of them go into answers.json."""
    settings = {
        "stop_token_ids": job.run.manifest["stop_token_ids"],
        "pad_token_id": int(job.tokenizer.pad_token_id),
        "max_new_tokens": job.recipe.eval.max_new_tokens,
    }
    with job.engine.generating(model):
        answers = answer(model, asked, **settings)
    save_answers(
        job.run.path / "answers.json",
        asked,
        answers,
        compute_dtype=job.run.manifest["dtype"],
        **settings,
    )
    return exact_matches(asked, answers)
