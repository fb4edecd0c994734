"""From the base model to the adapter on the disk, with its answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastlora_kernels.layers.head import detach_head

from fastlora.data.template import ChatTemplate
from fastlora.engines.base import resolve_checkpointing
from fastlora.engines.engaged import load_model
from fastlora.engines.memory import explained, explained_loading
from fastlora.rundir.curves import plot_loss
from fastlora.rundir.store import whole_folder
from fastlora.train.advising import advise_on_curves
from fastlora.train.answers import ask_after, ask_before, pick_questions
from fastlora.train.callbacks import Metrics, TokenCounter
from fastlora.train.checkpoints import Checkpoints
from fastlora.train.held_out import BaseLosses, CurveWatch
from fastlora.train.job import Job
from fastlora.train.loss import takes_own_loss
from fastlora.train.oom import Continuation
from fastlora.train.planned import compare_with_plan, predict_run
from fastlora.train.probe import Probe
from fastlora.train.steps import count_steps
from fastlora.train.trackers import Trackers
from fastlora.train.trainer import build_trainer

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel

OnTrained = Callable[["PeftModel", dict[str, Any]], None]


def learn(job: Job, on_trained: OnTrained | None) -> None:
    """Load, train, save. A run whose training was over when it was stopped goes on behind that.

    `on_trained` is called with the trained model and the manifest when the adapter is on the disk.
    """
    run, recipe, notes, signals = job.run, job.recipe, job.notes, job.signals
    for torn in run.drop_incomplete_checkpoints():
        notes(f"resume: {torn.name} was not written to its end; removed")

    predicted = predict_run(job)
    loading = time.perf_counter()
    with explained_loading():
        model, kernels = load_model(job.engine, recipe, notes)
    run.update(load_s=round(time.perf_counter() - loading, 1))
    # A resumed run may be on another machine, with other kernels.
    began = run.manifest.get("resumed", [run.manifest])[-1]
    began["kernels"] = [asdict(row) for row in kernels]
    run.update()
    own_loss = takes_own_loss(recipe, model, job.engine, notes)
    asked = pick_questions(job)
    if asked:
        ask_before(job, model, asked)

    counter = TokenCounter()
    checkpoints = Checkpoints(run, recipe.train, counter, signals)
    base_losses = BaseLosses(run, notes.say)
    continuation = Continuation(
        run, recipe, job.engine, resolve_checkpointing(recipe, job.engine), notes
    )
    metrics = Metrics(run, counter, notes.console)
    probe = Probe(job, continuation, counter, metrics, predicted)
    trackers = Trackers(recipe, run)
    _, epochs = count_steps(recipe, job.data)
    trainer = build_trainer(
        recipe, model, job.tokenizer, job.data, run, job.engine, counter, checkpoints, base_losses,
        continuation, [probe, metrics, CurveWatch(run, recipe, notes), *trackers.callbacks], epochs,
        own_loss, notes,
    )  # fmt: skip
    newest = checkpoints.newest()
    started = time.perf_counter()
    with probe.remembered_if_cut_short(), signals.deferring():
        try:
            with explained("training", continuation.way_out):
                trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        finally:
            metrics.close()
            trackers.close(notes)

    # The trainer may have wrapped the model; from here on it is the plain PEFT model again.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    detach_head(model)
    state = trainer.state
    best = checkpoints.best() if recipe.train.keep_best else None
    if best is not None:
        _load_adapter(model, best)
        notes(
            f"keep_best: the adapter of step {state.best_global_step}, "
            f"held-out loss {state.best_metric:.4f}"
        )
    if recipe.data.template not in ("tokenizer", "none"):
        # What is made of the adapter's folder then lays chats out as they were trained.
        job.tokenizer.chat_template = ChatTemplate(job.tokenizer, recipe.data.template).source
    with whole_folder(run.adapter) as folder:
        model.save_pretrained(str(folder))
        job.tokenizer.save_pretrained(str(folder))
    entries = run.read_metrics()
    plot_loss(entries, run.path / "loss.png")
    result = _result(entries, state.global_step, time.perf_counter() - started)
    planned = compare_with_plan(
        predicted,
        result["peak_reserved_gib"],
        notes,
        run=str(run.path),
        ran_out=continuation.ran_out,
    )
    run.update(
        result=result | {"best_step": state.best_global_step if recipe.train.keep_best else None},
        **({"plan": run.manifest.get("plan", {}) | planned} if planned else {}),
        notes=notes.said,
        advice=advise_on_curves(
            run, recipe, state.best_global_step if best is not None else state.global_step, notes
        ),
    )
    if on_trained is not None:
        on_trained(model, run.manifest)
    if asked:
        ask_after(job, model)


def _load_adapter(model: PeftModel, checkpoint: Path) -> None:
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device=str(model.device)))


def _result(entries: list[dict[str, Any]], steps: int, seconds: float) -> dict[str, Any]:
    losses = [entry for entry in entries if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    by_source: dict[str, list[float]] = {}
    for entry in entries:
        for label, loss in entry.get("eval_loss_by_source", {}).items():
            by_source.setdefault(label, []).append(loss)
    # The first steps compile and tune kernels; the median of the rest is what a long run sees.
    speeds = sorted(entry["tokens_per_s"] for entry in losses[2:] or losses)
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "first_loss": losses[0]["loss"] if losses else None,
        "last_loss": losses[-1]["loss"] if losses else None,
        "eval_losses": held_out,
        "eval_losses_by_source": by_source,
        "tokens": losses[-1]["tokens"] if losses else 0,
        "tokens_per_s_median": speeds[len(speeds) // 2] if speeds else None,
        "peak_allocated_gib": max(
            (entry.get("peak_allocated_gib", 0) for entry in losses), default=0
        )
        or None,
        "peak_reserved_gib": max((entry.get("peak_reserved_gib", 0) for entry in losses), default=0)
        or None,
    }
