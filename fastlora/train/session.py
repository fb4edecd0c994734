"""One run from its recipe to its result."""

from __future__ import annotations

import contextlib
import gc
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fastlora.data.prepare import Prepared, prepare_data
from fastlora.engines import Engine, choose_engine
from fastlora.engines.base import load_tokenizer, resolve_dtype
from fastlora.errors import EngineError, RunDirError
from fastlora.recipe.advice import default_epochs
from fastlora.recipe.schema import Recipe
from fastlora.rundir import provenance
from fastlora.rundir.report import plot_loss
from fastlora.rundir.store import RunDir, is_disk_full, whole_folder
from fastlora.train.checks import check_model
from fastlora.train.stop import Interrupted, StopSignals

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

OnTrained = Callable[["PeftModel", dict[str, Any]], None]

_PROBE_TOKENS = 512  # of the first training row: what the merged model's logits are compared on


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed."""

    recipe: Recipe
    recipe_file: str
    """As it is to be typed again: a bundled name or a path."""
    settings: Sequence[str] = ()
    resume: bool = False

    @property
    def resume_command(self) -> str:
        parts = ["fastlora", "run", self.recipe_file]
        for setting in self.settings:
            parts += ["--set", setting]
        return shlex.join([*parts, "--resume"])


def dry_run(request: Request, console: Console) -> dict[str, Any]:
    """Prepare the data, show the first row with its supervised part coloured, count; train nothing."""
    recipe, notes = request.recipe, _Notes(console)
    tokenizer = load_tokenizer(recipe.model)
    check_model(recipe, tokenizer, None, notes)
    data = prepare_data(recipe, tokenizer, notes)
    preview = Text()
    for text, supervised in data.stats.preview:
        preview.append(text, style="bold green" if supervised else "dim")
    console.print(
        "\nThe first training row; [bold green]green[/] is what the model is taught to say:\n"
    )
    console.print(preview, soft_wrap=True)
    steps, epochs = _steps(recipe, data)
    console.print(f"\n{steps:,} steps of {_effective_batch(recipe)} sequences, {epochs:g} epochs")
    return {
        "steps": steps,
        "epochs": epochs,
        "effective_batch": _effective_batch(recipe),
        "data": _data_report(data),
        "preview": [
            {"text": text, "supervised": supervised} for text, supervised in data.stats.preview
        ],
        "notes": notes.said,
    }


def train_run(
    request: Request, console: Console, on_trained: OnTrained | None = None
) -> dict[str, Any]:
    """Train as the recipe says; returns the manifest.

    `on_trained` is called with the trained model and the manifest when the adapter is on the disk.

    Raises Interrupted after a stop signal, with the run saved; FastloraError for everything that the
    user can mend. In both cases the message ends with the command that resumes, if there is a run.
    """
    with StopSignals() as signals:
        run = RunDir.open_unfinished(_parent(request)) if request.resume else None
        if run is not None:
            _refuse_other_recipe(run, request)
        notes = _Notes(console)
        recipe = request.recipe
        engine = choose_engine(recipe.engine, notes)
        engine.prepare()
        tokenizer = load_tokenizer(recipe.model)
        check_model(recipe, tokenizer, engine, notes)
        data = prepare_data(recipe, tokenizer, notes)
        if run is None:
            run = RunDir.create(_parent(request))
        elif run.manifest["data"]["key"] != data.stats.key:
            raise RunDirError(
                f"{run.path}: the data have changed since it began; start a new run without --resume"
            )
        console.print(f"run: {run.path}")
        try:
            _begin(run, request, engine, tokenizer, data, notes)
            _train(run, request, engine, tokenizer, data, notes, signals, console, on_trained)
            return run.manifest
        except Interrupted as stopped:
            run.update(status="interrupted", ended=_now())
            console.print(f"stopped by {stopped}; resume with:\n  {request.resume_command}")
            raise
        except BaseException as error:
            explained = _failed(run, request, error)
            if explained is error:
                raise
            raise explained from error
        finally:
            run.close()


def _parent(request: Request) -> Path:
    return Path(request.recipe.output.dir)


class _Notes:
    """Says things on stderr and remembers them for the manifest."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.said: list[str] = []

    def __call__(self, message: str) -> None:
        self.said.append(message)
        self.console.print(message, markup=False, highlight=False)


def _refuse_other_recipe(run: RunDir, request: Request) -> None:
    """A resumed run goes on with what it began with."""
    then, now = run.manifest["recipe"], request.recipe.model_dump(mode="json")
    changed = [
        f"{section}.{key}: was {then[section].get(key)!r}, now {value!r}"
        for section, values in now.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if then[section].get(key) != value
    ]
    if then["engine"] != now["engine"]:
        changed.append(f"engine: was {then['engine']!r}, now {now['engine']!r}")
    if changed:
        run.close()
        raise RunDirError(
            "\n".join([f"{run.path}: cannot be resumed with another recipe:", *changed, "Resume with the first one, "
                       "or start a new run without --resume."])
        )  # fmt: skip


def _effective_batch(recipe: Recipe) -> int:
    return recipe.train.micro_batch * recipe.train.accumulation_steps


def _steps(recipe: Recipe, data: Prepared) -> tuple[int, float]:
    """(optimizer steps, epochs), as the trainer counts them."""
    micro_batches = -(-len(data.train) // recipe.train.micro_batch)
    per_epoch = max(1, -(-micro_batches // recipe.train.accumulation_steps))
    if recipe.train.steps is not None:
        return recipe.train.steps, round(recipe.train.steps / per_epoch, 4)
    epochs = recipe.train.epochs or default_epochs(data.stats.train.rows)
    return max(1, round(per_epoch * epochs)), epochs


def _data_report(data: Prepared) -> dict[str, Any]:
    from dataclasses import asdict

    report = asdict(data.stats)
    del report["preview"]
    return report


def _begin(
    run: RunDir,
    request: Request,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    notes: _Notes,
) -> None:
    import torch

    recipe = request.recipe
    if recipe.train.optimizer != "adamw" and not torch.cuda.is_available():
        notes(f"train.optimizer: {recipe.train.optimizer} needs a GPU; adamw in its place")
    if recipe.train.steps is None and recipe.train.epochs is None:
        notes(
            f"train.epochs: {default_epochs(data.stats.train.rows)}, for {data.stats.train.rows:,} rows"
        )
    stop_tokens = dict.fromkeys(
        token
        for token in (
            tokenizer.convert_tokens_to_ids(data.stats.stop_token),
            tokenizer.eos_token_id,
        )
        if token is not None
    )
    began: dict[str, Any] = {
        "status": "running",
        "notes": notes.said,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "commit": provenance.commit(Path(__file__).parent),
    }
    if run.manifest:
        resumed = run.manifest.setdefault("resumed", [])
        resumed.append({"at": _now(), **began})
        run.update(status="running")
        return
    dtype = str(resolve_dtype(recipe.model)).removeprefix("torch.")
    run.update(
        **began,
        path=str(run.path),
        recipe_file=request.recipe_file,
        resume_command=request.resume_command,
        recipe=recipe.model_dump(mode="json"),
        engine=engine.name,
        dtype=dtype,
        merge_dtype="float16" if dtype == "float16" else "bfloat16",
        seed=recipe.train.seed,
        data=_data_report(data),
        stop_token_ids=list(stop_tokens),
        probe_ids=data.train[0]["input_ids"][:_PROBE_TOKENS],
        started=_now(),
    )


def _train(
    run: RunDir,
    request: Request,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    notes: _Notes,
    signals: StopSignals,
    console: Console,
    on_trained: OnTrained | None,
) -> None:
    from transformers import EarlyStoppingCallback

    from fastlora.export.answers import questions
    from fastlora.export.merge import merge_in_new_process
    from fastlora.train.callbacks import (
        Checkpoints,
        Metrics,
        StopOnNonFinite,
        StopOnSignal,
        TokenCounter,
        best_checkpoint,
    )
    from fastlora.train.trainer import build_trainer

    recipe = request.recipe
    for torn in run.drop_incomplete_checkpoints():
        notes(f"resume: {torn.name} was not written to its end; removed")
    complete = run.complete_checkpoints()
    run.rewind_metrics(complete[-1][0] if complete else 0)

    loading = time.perf_counter()
    model = engine.load(recipe, notes)
    run.update(load_s=round(time.perf_counter() - loading, 1))
    asked = []
    if recipe.eval.exact_match_rows and data.eval is not None:
        asked = questions(data.eval, recipe.eval.exact_match_rows, run.manifest["stop_token_ids"])
    if asked and "exact_match" not in run.manifest:
        before, _ = _ask(run, recipe, engine, model, tokenizer, asked)
        run.update(exact_match={"rows": len(asked), "before": before})
        console.print(f"exact match before training: {before} of {len(asked)}")

    counter, non_finite = TokenCounter(), StopOnNonFinite()
    metrics = Metrics(run, counter, console)
    checkpoints = Checkpoints(run, recipe.train.keep_checkpoints, recipe.train.keep_best)
    callbacks: list[Any] = [metrics, checkpoints, StopOnSignal(signals), non_finite]
    if recipe.train.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(recipe.train.early_stopping_patience))
    _, epochs = _steps(recipe, data)
    trainer = build_trainer(recipe, model, tokenizer, data, run, engine, counter, callbacks, epochs)
    started = time.perf_counter()
    signals.deferred = True
    try:
        trainer.train(resume_from_checkpoint=str(complete[-1][1]) if complete else None)
    finally:
        metrics.close()
        signals.deferred = False
    signals.raise_pending()
    if non_finite.step is not None:
        raise EngineError(
            f"the loss is not finite at step {non_finite.step}: lower train.lr ({recipe.train.lr:g}), raise "
            'train.warmup_fraction, or set model.dtype = "bfloat16" if it is float16'
        )

    # The trainer may have wrapped the model; from here on it is the plain PEFT model again.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    best = best_checkpoint(run, trainer.state) if recipe.train.keep_best else None
    if best is not None:
        _load_adapter(model, best)
        state = trainer.state
        notes(
            f"keep_best: the adapter of step {state.best_global_step}, "
            f"held-out loss {state.best_metric:.4f}"
        )
    with whole_folder(run.adapter) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    entries = run.read_metrics()
    plot_loss(entries, run.path / "loss.png")
    run.update(
        result=_result(entries, trainer.state.global_step, time.perf_counter() - started)
        | {"best_step": trainer.state.best_global_step if recipe.train.keep_best else None},
        notes=notes.said,
    )
    if on_trained is not None:
        on_trained(model, run.manifest)
    if asked:
        after, _ = _ask(run, recipe, engine, model, tokenizer, asked)
        run.update(exact_match=run.manifest["exact_match"] | {"after": after})
        console.print(f"exact match after training: {after} of {len(asked)}")
    if recipe.output.merge == "16bit":
        import torch

        del trainer, model, callbacks  # the merge, in its own process, wants the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        console.print("merging into 16-bit weights")
        run.update(merge=merge_in_new_process(run))
    run.update(status="finished", ended=_now())


def _ask(
    run: RunDir,
    recipe: Recipe,
    engine: Engine,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Any],
) -> tuple[int, list[list[int]]]:
    from fastlora.export.answers import answer, exact_matches, save_answers

    settings = {
        "stop_token_ids": run.manifest["stop_token_ids"],
        "pad_token_id": int(tokenizer.pad_token_id),
        "max_new_tokens": recipe.eval.max_new_tokens,
    }
    with engine.generating(model):
        answers = answer(model, asked, **settings)
    save_answers(
        run.path / "answers.json", asked, answers, compute_dtype=run.manifest["dtype"], **settings
    )
    return exact_matches(asked, answers), answers


def _load_adapter(model: PeftModel, checkpoint: Path) -> None:
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device=str(model.device)))


def _result(entries: list[dict[str, Any]], steps: int, seconds: float) -> dict[str, Any]:
    losses = [entry for entry in entries if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    # The first steps compile and tune kernels; the median of the rest is what a long run sees.
    speeds = sorted(entry["tokens_per_s"] for entry in losses[2:] or losses)
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "first_loss": losses[0]["loss"] if losses else None,
        "last_loss": losses[-1]["loss"] if losses else None,
        "eval_losses": held_out,
        "tokens": losses[-1]["tokens"] if losses else 0,
        "tokens_per_s_median": speeds[len(speeds) // 2] if speeds else None,
        "peak_allocated_gib": max(
            (entry.get("peak_allocated_gib", 0) for entry in losses), default=0
        )
        or None,
        "peak_reserved_gib": max((entry.get("peak_reserved_gib", 0) for entry in losses), default=0)
        or None,
    }


def _failed(run: RunDir, request: Request, error: BaseException) -> BaseException:
    """What went wrong, in the user's words, with the way on; the manifest keeps it."""
    import torch

    way_on = f"resume with:\n  {request.resume_command}"
    mended: BaseException = error
    if is_disk_full(error):
        mended = RunDirError(f"{run.path}: the disk is full; free some space, then {way_on}")
    elif isinstance(error, torch.OutOfMemoryError):
        recipe = request.recipe
        mended = EngineError(
            f"the GPU is out of memory with train.micro_batch = {recipe.train.micro_batch} and model.seq_len_tokens = "
            f"{recipe.model.seq_len_tokens}. Halve micro_batch and set train.effective_batch = "
            f"{_effective_batch(recipe)} (the training stays the same), or shorten the sequences, and start a new run."
        )
    with contextlib.suppress(OSError):  # disk full: the manifest says "running", which resumes too
        run.update(status="failed", error=f"{type(error).__name__}: {error}", ended=_now())
    return mended


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
