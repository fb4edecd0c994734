from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastlora.cli.chat import check_sampling, sampling_options
from fastlora.errors import EngineError, UsageError

if TYPE_CHECKING:
    from fastlora.export.load import Who


@click.command("generate")
@click.argument("run")
@click.option(
    "--prompts",
    required=True,
    help="A .jsonl, .json, .csv or .parquet file; its rows are as for training, and may lack the answer.",
)
@click.option("--base", "base", is_flag=True, help="Answers of the model without its adapter.")
@click.option("--tuned", "tuned", is_flag=True, help="Answers with it; so too if neither is given.")
@click.option("--out", type=click.Path(path_type=Path), help="A new file; without it, stdout.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Prompts at a time; of long ones, fewer.",
)
@sampling_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True)
def command(
    run: str,
    prompts: str,
    base: bool,
    tuned: bool,
    out: Path | None,
    batch_size: int,
    temperature: float,
    top_p: float,
    seed: int,
    max_new_tokens: int,
) -> None:
    """Answer the prompts of a file with the model of RUN: a run's folder, or a recipe, for its newest finished run.

    One line of JSON for each row, in the file's order: row (its line or place), prompt (as the model reads it),
    expected (where the row holds an answer), and base or tuned or both. Greedily unless --temperature is given.
    """
    from fastlora.train.stop import Interrupted, StopSignals

    check_sampling(temperature, top_p)
    if out is not None:
        _check_new(out)
    who: list[Who] = ["base"] if base else []
    who += ["tuned"] if tuned or not base else []
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    try:
        with StopSignals(), contextlib.redirect_stdout(sys.stderr):
            rows = _answers(run, prompts, who, batch_size, seed, sampling)
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if out is None:
        click.echo(text, nl=False)
    else:
        _write_new(out, text)
        click.echo(f"answers   {out} ({len(rows)} rows)", err=True)


def _check_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UsageError(f"--out: {out} exists; give another name, or remove it first")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out: {out.absolute().parent} is not a folder; make it first")
    if not os.access(out.absolute().parent, os.W_OK):
        raise UsageError(f"--out: {out.absolute().parent} is not writable; give another place")


def _write_new(out: Path, text: str) -> None:
    from fastlora.rundir.store import write_atomic

    if out.exists():  # made while the model answered: neither is to be lost
        number = 1
        while (beside := out.with_name(f"{out.stem}-{number}{out.suffix}")).exists():
            number += 1
        click.echo(f"--out: {out} exists by now; written to {beside}", err=True)
        out = beside
    write_atomic(out, text)


def _answers(
    run: str, prompts: str, who: list[Who], batch_size: int, seed: int, sampling: dict[str, Any]
) -> list[dict[str, Any]]:
    from fastlora.rundir.find import find_run

    found = find_run(run)
    from rich.console import Console
    from rich.progress import Progress

    from fastlora.data.prompts import read_prompts
    from fastlora.export.answers import answered, in_words
    from fastlora.export.load import context_tokens, load_encoder, load_run

    found.require_adapter()
    room = context_tokens(found)
    asked = read_prompts(
        prompts,
        load_encoder(found),
        name="--prompts",
        limit_tokens=None if room is None else room - 1,
    )
    if room is not None:
        left = room - max(len(question.prompt_ids) for _, question in asked)
        if left < sampling["max_new_tokens"]:
            sampling["max_new_tokens"] = left
            click.echo(
                f"note: answers have at most {left:,} tokens: the model takes {room:,} with the longest prompt",
                err=True,
            )
    tuned = load_run(found)
    if "base" in who and tuned.base_note:
        click.echo(f"note: with the adapter off, {tuned.base_note}", err=True)
    settings = {
        "stop_token_ids": tuned.stop_token_ids,
        "pad_token_id": tuned.pad_token_id,
        "batch_rows": batch_size,
        **sampling,
    }
    rows: list[dict[str, Any]] = [{"row": number} for number, _ in asked]
    for row, (_, question) in zip(rows, asked, strict=True):
        row["prompt"] = in_words(tuned.tokenizer, question.prompt_ids)
        if question.expected_ids is not None:
            row["expected"] = in_words(tuned.tokenizer, question.expected_ids)
    cut = 0
    from transformers import set_seed

    from fastlora.engines.memory import is_out_of_memory

    set_seed(seed)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for one in who:
            bar = progress.add_task(one, total=len(asked))
            with tuned.speaking(one) as model:
                try:
                    questions = [question for _, question in asked]
                    for batch in answered(model, questions, announce=_note, **settings):
                        for place, ids in batch:
                            rows[place][one] = in_words(tuned.tokenizer, ids)
                            cut += len(ids) >= sampling["max_new_tokens"]
                        progress.advance(bar, len(batch))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    raise EngineError(
                        "the GPU is out of memory with one prompt at a time and --max-new-tokens "
                        f"{sampling['max_new_tokens']}; lower it"
                    ) from None
    if cut:
        click.echo(
            f"note: {cut} of {len(asked) * len(who)} answers end at --max-new-tokens ({sampling['max_new_tokens']:,})",
            err=True,
        )
    return rows


def _note(said: str) -> None:
    click.echo(f"note: {said}", err=True)
