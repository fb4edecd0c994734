"""One run from its recipe to its result."""

from __future__ import annotations

import contextlib
import gc
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fastlora.check.brief import check_before_run
from fastlora.data.prepare import prepare_data
from fastlora.data.prepared import Prepared
from fastlora.engines import Engine, choose_engine
from fastlora.engines.base import load_tokenizer, resolve_dtype
from fastlora.engines.engaged import load_model, plan_kernels
from fastlora.engines.memory import explained_loading, in_words, is_out_of_memory, memory_now
from fastlora.errors import EngineError, RunDirError
from fastlora.export.gated import save_held_out
from fastlora.recipe.advice import Filled, default_epochs
from fastlora.recipe.schema import Recipe
from fastlora.rundir import provenance
from fastlora.rundir.report import keep_report
from fastlora.rundir.store import RunDir, check_place, is_disk_full
from fastlora.train.advising import advise_before, fill_open_keys
from fastlora.train.checks import check_model
from fastlora.train.job import Job
from fastlora.train.loss import takes_own_loss
from fastlora.train.notes import Notes
from fastlora.train.planned import fit_memory, longest_row, micro_batches_of
from fastlora.train.resume import as_begun, changed_keys, open_for_resume
from fastlora.train.steps import count_steps, effective_batch
from fastlora.train.stop import Interrupted, StopSignals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastlora.train.learn import OnTrained

_PROBE_TOKENS = 512  # of the first training row: what the merged model's logits are compared on


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed."""

    recipe: Recipe
    recipe_file: str
    """As it is to be typed again: a bundled name or a path."""
    settings: Sequence[str] = ()
    resume: bool = False
    auto: bool = False

    @property
    def resume_command(self) -> str:
        return self.command(resume=True)

    def command(self, *more_settings: str, resume: bool = False) -> str:
        parts = ["fastlora", "run", self.recipe_file]
        for setting in (*self.settings, *more_settings):
            parts += ["--set", setting]
        flags = [*(["--auto"] if self.auto else []), *(["--resume"] if resume else [])]
        return shlex.join([*parts, *flags])


def dry_run(request: Request, console: Console) -> dict[str, Any]:
    """All that comes before the first step, and nothing left behind: the data prepared and counted, the first
    row shown with its supervised part coloured, the model loaded with its adapter and kernels.

    Raises FastloraError: what would keep the run from its first step.
    """
    notes = Notes(console)
    check_place(Path(request.recipe.output.dir))
    start = _prepare(request.recipe, notes, auto=request.auto)
    data, recipe = start.data, start.recipe
    preview = Text()
    for text, supervised in data.stats.preview:
        preview.append(text, style="bold green" if supervised else "dim")
    console.print(
        "\nThe first training row; [bold green]green[/] is what the model is taught to say:\n"
    )
    console.print(preview, soft_wrap=True)
    steps, epochs = count_steps(recipe, data)
    console.print(f"\n{steps:,} steps of {effective_batch(recipe)} sequences, {epochs:g} epochs")
    advice = advise_before(recipe, data, start.engine.name, notes)
    with explained_loading():
        model, kernels = load_model(start.engine, recipe, notes)
    takes_own_loss(recipe, model, start.engine, notes)
    return {
        "steps": steps,
        "epochs": epochs,
        "effective_batch": effective_batch(recipe),
        "data": _data_report(data),
        "check": start.found,
        "preview": _preview(data),
        "engine": start.engine.name,
        "kernels": [asdict(row) for row in kernels],
        "advice": advice,
        **_chosen(start, request),
        "notes": notes.said,
    }


@dataclass(frozen=True, slots=True)
class _Start:
    """All that there is before the run's folder and the model."""

    recipe: Recipe
    """With what --auto filled and what was chosen for the GPU."""
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    found: dict[str, Any]
    """By the check."""
    filled: list[Filled]
    """By --auto."""
    memory: dict[str, Any] | None
    """What was chosen for the GPU."""


def _prepare(recipe: Recipe, notes: Notes, *, auto: bool, resumed: bool = False) -> _Start:
    """`auto` fills open keys. A run that is `resumed` has its micro-batches recorded, or not, as when it began."""
    engine = choose_engine(recipe.engine, notes, recipe.lora.why_not_unsloth)
    engine.prepare()
    tokenizer = load_tokenizer(recipe.model)
    check_model(recipe, tokenizer, engine, notes)
    filled: list[Filled] = []
    if auto:  # what is held out is then known first
        recipe, data, filled = fill_open_keys(recipe, engine.name, tokenizer, notes)
        found = check_before_run(recipe, tokenizer, notes)
    else:
        found = check_before_run(recipe, tokenizer, notes)
        data = prepare_data(recipe, tokenizer, notes)
    weighed = None if resumed or not _records(recipe) else partial(micro_batches_of, data)
    recipe, memory = fit_memory(recipe, engine.name, longest_row(recipe, data), notes, weighed)
    return _Start(recipe, engine, tokenizer, data, found, filled, memory)


def _records(recipe: Recipe) -> bool:
    from fastlora.train.graphs import can_record

    return can_record() and plan_kernels(recipe).ours


def _chosen(start: _Start, request: Request) -> dict[str, Any]:
    """For the manifest: what the recipe did not say itself."""
    chosen: dict[str, Any] = {"memory": start.memory} if start.memory else {}
    if request.auto:
        chosen["auto"] = [asdict(one) for one in start.filled]
    return chosen


def train_run(
    request: Request, console: Console, on_trained: OnTrained | None = None
) -> dict[str, Any]:
    """Train as the recipe says; returns the manifest.

    `on_trained` is called with the trained model and the manifest when the adapter is on the disk.

    Raises Interrupted after a stop signal, with the run saved; FastloraError for everything that the
    user can mend. In both cases the message ends with the command that resumes, if there is a run.
    """
    recipe, notes = request.recipe, Notes(console)
    with contextlib.ExitStack() as opened:
        signals = opened.enter_context(StopSignals())
        run = None
        if request.resume:
            run = opened.enter_context(
                contextlib.closing(open_for_resume(recipe, auto=request.auto))
            )
            recipe = as_begun(recipe, run.manifest)
        else:
            check_place(Path(recipe.output.dir))
        begins_auto = request.auto and run is None
        start = _prepare(recipe, notes, auto=begins_auto, resumed=run is not None)
        data, recipe = start.data, start.recipe
        request = replace(request, recipe=recipe)
        if run is None:
            run = opened.enter_context(contextlib.closing(RunDir.create(Path(recipe.output.dir))))
        elif run.manifest["data"]["key"] != data.stats.key:
            raise RunDirError(
                f"{run.path}: the data have changed since it began; start a new run without --resume"
            )
        notes.say(f"run: {run.path}")
        job = Job(run, recipe, start.engine, start.tokenizer, data, start.found, notes, signals)
        try:
            _begin(job, request, _chosen(start, request))
            _go_through(job, on_trained)
            return run.manifest
        except Interrupted as stopped:
            run.update(status="interrupted", ended=_now())
            notes.say(f"stopped by {stopped}; resume with:\n  {request.resume_command}")
            stopped.told = True
            raise
        except BaseException as error:
            explained = _failed(run, request, error)
            if explained is error:
                raise
            raise explained from error
        finally:
            keep_report(run, notes.say)


def _go_through(job: Job, on_trained: OnTrained | None) -> None:
    # Here and not above: an engine may have to be imported before what these import.
    import torch

    from fastlora.export.process import export_in_new_process
    from fastlora.train.learn import learn

    learn(job, on_trained)
    output = job.recipe.output
    if output.merge == "16bit" or output.export:
        # The merge, in its own process, wants the memory. Interrupted, raised in a finaliser, would be lost.
        with job.signals.deferring():
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if output.merge == "16bit":
        job.notes.say("merging into 16-bit weights")
        job.run.update(merge=export_in_new_process(job.run, "16bit"))
    for quant in output.export:
        job.notes.say(f"exporting to GGUF, {quant}")
        report = export_in_new_process(job.run, "gguf", quant)
        job.run.record_export(quant, report)
        for note in report.get("notes", []):
            job.notes(f"{quant}: {note}")
    job.signals.raise_pending()  # in case another finaliser swallowed it
    job.run.update(status="finished", ended=_now())


def _data_report(data: Prepared) -> dict[str, Any]:
    report = asdict(data.stats)
    del report["preview"]
    return report


def _preview(data: Prepared) -> list[dict[str, Any]]:
    return [{"text": text, "supervised": supervised} for text, supervised in data.stats.preview]


def _begin(job: Job, request: Request, chosen: dict[str, Any]) -> None:
    import torch

    run, recipe, data, notes = job.run, job.recipe, job.data, job.notes
    if recipe.train.optimizer != "adamw" and not torch.cuda.is_available():
        notes(f"train.optimizer: {recipe.train.optimizer} needs a GPU; adamw in its place")
    if recipe.train.steps is None and recipe.train.epochs is None:
        notes(
            f"train.epochs: {default_epochs(data.stats.train.rows)}, for {data.stats.train.rows:,} rows"
        )
    stop_tokens = dict.fromkeys(
        token
        for token in (
            job.tokenizer.convert_tokens_to_ids(data.stats.stop_token),
            job.tokenizer.eos_token_id,
        )
        if token is not None
    )
    began: dict[str, Any] = {
        "status": "running",
        "notes": notes.said,
        "check": job.check,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "commit": provenance.commit(Path(__file__).parent),
    }
    if run.manifest:
        if changed := changed_keys(run.manifest["recipe"], recipe.model_dump(mode="json")):
            began["changed"] = changed
        resumed = run.manifest.setdefault("resumed", [])
        memory = {"memory": chosen["memory"]} if "memory" in chosen else {}
        resumed.append({"at": _now(), **began, **memory})
        run.update(status="running")
        return
    dtype = str(resolve_dtype(recipe.model)).removeprefix("torch.")
    run.update(
        **began,
        path=str(run.path),
        recipe_file=request.recipe_file,
        resume_command=request.resume_command,
        recipe=recipe.model_dump(mode="json"),
        engine=job.engine.name,
        dtype=dtype,
        seed=recipe.train.seed,
        data=_data_report(data),
        preview=_preview(data),
        stop_token_ids=list(stop_tokens),
        probe_ids=data.train[0]["input_ids"][:_PROBE_TOKENS],
        started=_now(),
        **chosen,
        advice=advise_before(recipe, data, job.engine.name, notes),
    )
    if data.eval is not None:
        save_held_out(run, data.eval)


def _failed(run: RunDir, request: Request, error: BaseException) -> BaseException:
    """What went wrong, in the user's words, with the way on; the manifest keeps it."""
    from fastlora.train.oom import DoesNotFit

    way_on = f"resume with:\n  {request.resume_command}"
    mended: BaseException = error
    if is_disk_full(error):
        mended = RunDirError(f"{run.path}: the disk is full; free some space, then {way_on}")
    elif isinstance(error, DoesNotFit):
        resumed = request.command(*error.resumed_with, resume=True)
        how = "In less memory" if error.resumed_with else "With more memory free"
        mended = EngineError(
            f"{error}.\n{how}, {'go on' if run.complete_checkpoints() else 'begin it again'} with:\n  {resumed}\n"
            f"Or start a new run with shorter rows ({error.why_shorter}):\n  {request.command(error.shorter)}"
        )
    elif is_out_of_memory(error):
        figures = in_words(memory_now(error))
        mended = EngineError(
            f"out of memory{figures}: end other processes on this GPU, then {way_on}"
        )
    with contextlib.suppress(OSError):  # disk full: the manifest says "running", which resumes too
        run.update(status="failed", error=f"{type(error).__name__}: {error}", ended=_now())
    return mended


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
