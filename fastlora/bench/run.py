"""`fastlora bench`: one process after another, then gates, then a report."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console

from fastlora.bench import work
from fastlora.bench.assess import assess, ledger
from fastlora.bench.processes import COMMAND, Failed, run_worker
from fastlora.bench.schema import (
    AXES,
    Arm,
    ArmResult,
    Frontier,
    Report,
    Work,
    kind_of,
)
from fastlora.bench.suites import Plan, does_nothing, ingredients, plan_for, renamed
from fastlora.cache import cache_folder
from fastlora.engines.base import load_tokenizer, not_loadable
from fastlora.errors import EngineError, UsageError
from fastlora.plan.measured import remember_ceilings
from fastlora.plan.setup import (
    EngineName,
    memory_problems,
    policy_of,
    setup_of,
    why_embedding_stays,
)
from fastlora.plan.shape import shape_of
from fastlora.recipe.schema import KernelsSection, ModelSection, Recipe
from fastlora.rundir import provenance
from fastlora.train.stop import Interrupted, StopSignals

FRONTIER_BATCHES = 1024
"""Larger micro-batches are not searched for: nobody trains with them."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed."""

    target: str | None = None
    arms: list[Arm] = field(default_factory=list)
    """Empty: the suite's own."""
    steps: int | None = None
    lengths: str | None = None
    vram_cap_gib: float | None = None
    model: str | None = None
    """A real checkpoint in the place of random weights."""
    ledger: bool = False
    frontier: bool = False
    timeout_s: float = 900.0
    command: str = ""
    """As it is to be typed again."""


def check(request: Request) -> None:
    """Find out what is wrong before the machine is asked and a folder made.

    Raises UsageError.
    """
    if request.target is not None:
        _asked_work(plan_for(request.target, 0.0), request)


def _asked_work(plan: Plan, request: Request) -> Work:
    changes: dict[str, Any] = {}
    if request.steps is not None:
        changes["steps"] = request.steps
    if request.lengths is not None:
        changes["lengths"] = request.lengths
    asked = plan.work.model_copy(update=changes)
    if asked.steps < 2 * asked.warmup_steps:
        raise UsageError(
            f"--steps {asked.steps}: too few beside {asked.warmup_steps} steps of warm-up; "
            f"give {2 * asked.warmup_steps} or more"
        )
    return asked


class Bench:
    """One benchmark. `folder` gets the processes' logs; `command` starts a process (see processes)."""

    def __init__(
        self,
        request: Request,
        folder: Path,
        console: Console,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.request, self.folder, self.console, self.command = request, folder, console, command
        self.plan: Plan
        self.machine: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        """What each arm's process sent, by the arm's name."""
        self.failures: dict[str, Failed] = {}
        self.frontiers: list[Frontier] = []
        self.stopped: Interrupted | None = None
        """The signal that ended it early."""

    def run(self, keep: Callable[[Report], None] = lambda _: None) -> Report:
        """Measure, and hand the report to `keep`, which no signal cuts. An arm that fails is a row of the
        report; a signal gives a report of what there is.

        Raises UsageError or EngineError: nothing could be measured; Interrupted: nothing was yet.
        """
        with StopSignals() as signals:  # so that SIGTERM too ends the process that measures
            return self._run(signals, keep)

    def _run(self, signals: StopSignals, keep: Callable[[Report], None]) -> Report:
        began, started = datetime.now(UTC), time.perf_counter()
        self.machine = self._worker("probe", "")
        if gpu := self.machine["machine"].get("gpu"):
            remember_ceilings(gpu, self.machine["ceilings"])  # for `fastlora plan`
        self.plan = self._plan()
        self._say(
            f"{self.plan.name} on {self.machine['machine'].get('gpu', 'the CPU')}; "
            f"arms {', '.join(arm.name for arm in self.plan.arms)}"
        )
        self._warn()
        with tempfile.TemporaryDirectory(prefix="fastlora-bench-") as scratch:
            try:
                self._measure(Path(scratch))
            except Interrupted as stopped:
                self.stopped = stopped
                self._say("interrupted: the report has what was measured so far")
            try:
                with signals.deferring("the report is written"):
                    arms = assess(
                        self.plan.arms,
                        self.results,
                        self.failures,
                        scratch=Path(scratch),
                        seq_len_tokens=self.plan.recipe.model.seq_len_tokens,
                        warmup_steps=self.plan.work.warmup_steps,
                        ceilings=self.machine["ceilings"],
                        vram_cap_gib=self.request.vram_cap_gib,
                    )
                    report = self._report(arms, began, time.perf_counter() - started)
                    keep(report)
            except Interrupted as stopped:  # it came meanwhile, or is the one from above
                self.stopped = stopped
        return report

    def _say(self, text: str) -> None:
        """Tell the user. Names of files and models are no markup; a terminal that is gone (SIGHUP) must
        not cost the report."""
        with suppress(OSError):
            self.console.print(f"bench: {text}", markup=False, emoji=False, soft_wrap=True)

    def _warn(self) -> None:
        """Of what is not measured as one might think."""
        in_use, recipe = self.machine.get("in_use_gib", 0.0), self.plan.recipe
        if in_use > 1:  # a CUDA context of our own, which counts in it, has less
            self._say(
                f"warning: {in_use:.1f} GiB of the GPU are in use by other processes; the driver's figures "
                "and --vram-cap count them in, and speeds may suffer"
            )
        if recipe.train.chunked_loss:
            self._say(
                "train.chunked_loss is not used by the benchmark: each engine has its own loss"
            )
        if recipe.kernels != KernelsSection():
            self._say(
                "kernels: not used by the benchmark; the arms say which they have: +fastlora, -kernels"
            )
        if self.plan.own_data and recipe.data.packing:
            padded = [arm.name for arm in self.plan.arms if not arm.packed]
            if padded:
                self._say(f"data.packing: not in {', '.join(padded)}, which pad; write +packing")

    def _plan(self) -> Plan:
        request = self.request
        vram = self.machine["machine"].get("gpu_gib", 0.0)
        plan = plan_for(request.target, min(vram, request.vram_cap_gib or vram))
        if request.vram_cap_gib is not None and not vram:
            raise UsageError("--vram-cap: there is no CUDA GPU here to cap")
        if (request.vram_cap_gib or 0) > vram + 0.05:  # vram is rounded
            raise UsageError(
                f"--vram-cap {request.vram_cap_gib:g}GiB: this GPU has no more than {vram:g} GiB"
            )
        if request.frontier and not vram:
            raise UsageError("--frontier: there is no CUDA GPU here to fill")
        settings = _asked_work(plan, request)
        eager = [arm for arm in plan.arms if "+record" not in arm.options]
        # Recorded are few shapes, on a GPU: not rows of many lengths.
        arms = list(request.arms or (plan.arms if vram and settings.lengths == "full" else eager))
        if settings.lengths == "real" and not request.arms:
            packed = [Arm.parse(f"{arm.name}+packing") for arm in eager if not arm.packed]
            arms += [arm for arm in packed if arm not in arms]
        if not arms:
            why = "rows of many lengths" if vram else "what has no CUDA GPU"
            raise UsageError(
                f"{plan.name}: all its arms are recorded (+record), which {why} cannot be; name others with --arms"
            )
        if request.ledger:
            whole = request.arms[-1] if request.arms else (eager or arms)[-1]
            own = ingredients(whole, plan.recipe, gpu=bool(vram))
            arms += [arm for arm in own if arm not in arms]
        recipe, shape = plan.recipe, plan.shape
        if request.model is not None:
            recipe, shape = renamed(recipe, request.model), None
        problems = [line for arm in arms for line in self._cannot_keep(arm, recipe, shape)]
        problems += [
            f"--arms {arm.name}: it is named {count} times"
            for arm, count in Counter(arms).items()
            if count > 1
        ]
        if request.frontier:
            asked = ((arm, _no_frontier(arm)) for arm in request.arms)
            problems += [
                f"--frontier: {arm.name} has none: {why}; leave one of both out"
                for arm, why in asked
                if why
            ]
            if not request.arms and all(map(_no_frontier, arms)):
                why = _no_frontier(arms[0])
                problems.append(f"--frontier: no arm has one: {why}; name another with --arms")
        if problems:
            raise UsageError("\n".join(problems))
        return replace(plan, recipe=recipe, arms=arms, work=settings, shape=shape)

    def _cannot_keep(self, arm: Arm, recipe: Recipe, shape: dict[str, Any] | None) -> Iterator[str]:
        """Where [memory] would do nothing, or not what the arm's name says, and where a step is no multiple of its
        micro-batches."""
        rows = recipe.train.micro_batch * recipe.train.accumulation_steps
        if (size := arm.micro_batch) is not None and (size < 1 or rows % size):
            yield f"--arms {arm.name}: a step has {rows} rows, which micro-batches of {size} do not make"
            return
        made = arm.recipe(recipe, self.request.vram_cap_gib)
        policy = policy_of(made, arm.engine)
        gpu = "gpu" in self.machine["machine"]
        nothing = ((one, does_nothing(arm, one, recipe, gpu=gpu)) for one in sorted(arm.options))
        problems = [f"{option} would change nothing: {why}" for option, why in nothing if why]
        problems += list(memory_problems(made, arm.engine, policy, streams=arm.engine == "unsloth"))
        if made.memory.embedding == "host" and not problems:
            if not gpu:
                problems.append("+hostembed: there is no CUDA GPU here that it would be kept from")
            elif shape is not None:
                known = shape_of(shape)
                setup = setup_of(made, known, engine=cast(EngineName, arm.engine))
                if why := why_embedding_stays(known, setup):
                    problems.append(f"+hostembed: the embedding stays where it is: {why}")
        yield from (f"--arms {arm.name}: {line}" for line in problems)

    def _measure(self, scratch: Path) -> None:
        plan = self.plan
        if plan.shape is not None:
            made = self._worker(
                "weights",
                _json(
                    shape=plan.shape,
                    model=plan.recipe.model.model_dump(mode="json"),
                    cache=str(cache_folder() / "checkpoints"),
                ),
            )
            how = f"made in {made['seconds']:.0f} s" if made["made"] else "from the cache"
            self._say(f"random weights {how}: {made['folder']}")
            self.plan = plan = replace(plan, recipe=renamed(plan.recipe, made["folder"]))
        from fastlora.bench.weights import cut_down

        model = plan.recipe.model
        small = cut_down(model.name, model.revision, plan.parity_layers, scratch / "cut-down")
        rows = scratch / "rows.json"
        self._save_rows(rows)
        common = {
            "recipe": plan.recipe.model_dump(mode="json"),
            "parity_checkpoint": str(small),
            "rows": str(rows),
            "work": plan.work.model_dump(mode="json"),
            "compared_rows": plan.recipe.train.micro_batch,
            "vram_cap_gib": self.request.vram_cap_gib,
        }
        peft = Arm.parse("peft")
        self._worker(
            "reference",
            _json(
                **common,
                arm=peft.model_dump(mode="json"),
                gradients=str(scratch / "exact.safetensors"),
                plain_gradients=str(scratch / "plain.safetensors"),
            ),
        )
        for arm in plan.arms:
            own = {
                **common,
                "arm": arm.model_dump(mode="json"),
                "recipe": arm.recipe(plan.recipe, self.request.vram_cap_gib).model_dump(
                    mode="json"
                ),
            }
            self._arm(arm, {**own, "gradients": str(scratch / f"{arm.name}.safetensors")})
        if self.request.frontier:
            for arm in plan.arms:
                self._frontier(arm, {**common, "gradients": ""})

    def _save_rows(self, path: Path) -> None:
        """The rows that every arm is fed, drawn or from the recipe's data."""
        plan = self.plan
        per_step = plan.recipe.train.micro_batch * plan.recipe.train.accumulation_steps
        if plan.own_data:
            rows = self._own_rows(per_step)
        else:
            rows = work.random_rows(
                plan.work,
                vocabulary=int(_config(plan.recipe.model).vocab_size),
                seq_len_tokens=plan.recipe.model.seq_len_tokens,
                rows_per_step=per_step,
                padding=_padding(plan.recipe.model),
            )
        work.save(rows, path)

    def _own_rows(self, per_step: int) -> list[work.Row]:
        from fastlora.data.prepare import prepare_data

        recipe = self.plan.recipe
        unpacked = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"packing": False})}
        )
        data = prepare_data(unpacked, load_tokenizer(recipe.model), self._say)
        packing = any(arm.packed for arm in self.plan.arms)
        return work.dataset_rows(
            data.train,
            self.plan.work,
            rows_per_step=per_step,
            pack_tokens=recipe.model.seq_len_tokens if packing else None,
        )

    def _arm(self, arm: Arm, task: dict[str, Any]) -> None:
        self._say(f"{arm.name} ...")
        try:
            answer = self._worker("arm", _json(**task), name=arm.name, environment=arm.environment)
        except Exception as error:  # whatever goes wrong with one arm, the others are measured
            self.failures[arm.name] = failed = _failed(error)
            self._say(f"{arm.name}: {failed.status}: {failed.detail}")
            return
        self.results[arm.name] = answer

    def _frontier(self, arm: Arm, task: dict[str, Any]) -> None:
        if why := _no_frontier(arm):
            self._say(f"{arm.name}: no frontier: {why}")
            return
        self._say(f"{arm.name}: how much fits ...")
        own = {
            **task,
            "arm": arm.model_dump(mode="json"),
            "recipe": arm.recipe(self.plan.recipe).model_dump(mode="json"),
            "limits": {
                "seq_len_tokens": _config(self.plan.recipe.model).max_position_embeddings,
                "micro_batch": FRONTIER_BATCHES,
            },
        }
        try:
            answer = self._worker(
                "frontier", _json(**own), name=arm.name, environment=arm.environment
            )
        except Exception as error:
            failed = _failed(error)
            nothing = {"fits": 0, "fails": None, "tokens_per_s": None, "peak_reserved_gib": None}
            detail = f"{failed.status}: {failed.detail}"
            answer = {axis: {**nothing, "detail": detail} for axis in AXES}
            answer |= {axis: failed.told[axis] for axis in AXES if axis in failed.told}
        self.frontiers += [Frontier(arm=arm.name, axis=axis, **answer[axis]) for axis in AXES]

    def _worker(
        self, kind: str, task: str, name: str = "", environment: dict[str, str] | None = None
    ) -> dict[str, Any]:
        try:
            return run_worker(
                kind,
                task,
                log=self.folder / f"{name or kind}.log",
                timeout_s=self.request.timeout_s,
                environment=environment,
                command=self.command,
            )
        except Failed as failed:
            if name:  # an arm's failure is a row; without the rest there is nothing to measure
                raise
            raise EngineError(f"bench: {kind}: {failed.detail}") from None

    def _report(self, arms: list[ArmResult], began: datetime, seconds: float) -> Report:
        plan = self.plan
        states = {arm.status for arm in arms}
        status: Literal["passed", "red", "partial"] = (
            "red" if "red" in states else "passed" if states == {"ok"} else "partial"
        )
        commit = provenance.commit(Path(__file__).parent) or ""
        return Report(
            name=plan.name,
            model=self.request.model or (plan.name if plan.shape else plan.recipe.model.name),
            status="partial" if self.stopped else status,
            started=began.isoformat(timespec="seconds"),
            seconds=round(seconds, 1),
            vram_cap_gib=self.request.vram_cap_gib,
            settings={
                "command": self.request.command,
                # Where random weights lay on this machine says nothing to others.
                "recipe": (
                    renamed(plan.recipe, "random weights") if plan.shape else plan.recipe
                ).model_dump(mode="json"),
                "work": plan.work.model_dump(mode="json"),
                "weights": "random, true shape" if plan.shape else plan.recipe.model.name,
                "shape": plan.shape,
            },
            environment={
                "machine": self.machine["machine"],
                "driver": self.machine["driver"],
                "versions": provenance.versions(),
                "commit": commit.removesuffix("+changes") or None,
                "dirty": commit.endswith("+changes"),
                "ceilings": self.machine["ceilings"],
            },
            arms=arms,
            ledger=ledger(arms) if self.request.ledger else [],
            frontier=self.frontiers,
        )


_NO_FRONTIER = {
    "+record": "a size is tried twice, too seldom to be recorded",
    "+batch": "it searches for the micro-batch, from one row on",
    "+budget": "what is chosen depends on the size, which it searches for",
    "+packing": "its rows are full, so that there is nothing to pack",
}


def _no_frontier(arm: Arm) -> str:
    """Why none is searched for; "": one is."""
    kinds = {kind_of(option) for option in arm.options}
    return next((why for kind, why in _NO_FRONTIER.items() if kind in kinds), "")


def _failed(error: Exception) -> Failed:
    return (
        error if isinstance(error, Failed) else Failed("failed", f"{type(error).__name__}: {error}")
    )


def _padding(model: ModelSection) -> int | None:
    """The padding token; None where there is no tokenizer that would have one."""
    try:
        token: int | None = load_tokenizer(model).pad_token_id
    except EngineError:
        return None
    return token


def _config(model: ModelSection) -> Any:
    """Raises EngineError: the model cannot be found."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # the Hub client raises many unrelated types
        raise EngineError(not_loadable(model.name, error)) from error
    return config.get_text_config()


def _json(**task: Any) -> str:
    import json

    return json.dumps(task)
