"""`fastlora bench`: one process after another, then gates, then a report."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fastlora.bench import gates, work
from fastlora.bench.processes import COMMAND, Failed, run_worker
from fastlora.bench.schema import (
    OPTIONS,
    Arm,
    ArmResult,
    Frontier,
    Gate,
    LedgerEntry,
    Report,
    Spread,
)
from fastlora.bench.suites import Plan, plan_for
from fastlora.errors import EngineError, UsageError
from fastlora.rundir import provenance

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
        self.interrupted = False

    def run(self) -> Report:
        """Measure. An arm that fails is a row of the report; Ctrl-C gives a report of what there is.

        Raises UsageError or EngineError: nothing could be measured.
        """
        began, started = datetime.now(UTC), time.perf_counter()
        self.machine = self._worker("probe", "")
        self.plan = self._plan()
        self.console.print(
            f"bench: {self.plan.name} on {self.machine['machine'].get('gpu', 'the CPU')}; "
            f"arms {', '.join(arm.name for arm in self.plan.arms)}",
            markup=False,
        )
        with tempfile.TemporaryDirectory(prefix="fastlora-bench-") as scratch:
            try:
                self._measure(Path(scratch))
            except KeyboardInterrupt:
                self.interrupted = True
                self.console.print("interrupted: the report has what was measured so far")
            arms = self._judged(Path(scratch))
        return self._report(arms, began, time.perf_counter() - started)

    def _plan(self) -> Plan:
        request = self.request
        vram = self.machine["machine"].get("gpu_gib", 0.0)
        plan = plan_for(request.target, min(vram, request.vram_cap_gib or vram))
        if request.vram_cap_gib is not None and not vram:
            raise UsageError("--vram-cap: there is no CUDA GPU here to cap")
        if request.frontier and not vram:
            raise UsageError("--frontier: there is no CUDA GPU here to fill")
        changes: dict[str, Any] = {}
        if request.steps is not None:
            changes["steps"] = request.steps
        if request.lengths is not None:
            changes["lengths"] = request.lengths
        settings = plan.work.model_copy(update=changes)
        if settings.steps < 2 * settings.warmup_steps:
            raise UsageError(
                f"--steps {settings.steps}: too few beside {settings.warmup_steps} steps of warm-up; "
                f"give {2 * settings.warmup_steps} or more"
            )
        arms = list(request.arms or plan.arms)
        if settings.lengths == "real" and not request.arms:
            arms += [Arm.parse(f"{arm.name}+packing") for arm in plan.arms]
        if request.ledger:
            arms += [arm for arm in ingredients(arms[-1]) if arm not in arms]
        recipe, shape = plan.recipe, plan.shape
        if request.model is not None:
            recipe, shape = renamed(recipe, request.model), None
        return Plan(plan.name, recipe, arms, settings, plan.parity_layers, shape, plan.own_data)

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
            self.console.print(
                f"bench: random weights in {made['folder']} ({made['seconds']:.0f} s)",
                markup=False,
                soft_wrap=True,
            )
            recipe = renamed(plan.recipe, made["folder"])
            self.plan = plan = Plan(
                plan.name,
                recipe,
                plan.arms,
                plan.work,
                plan.parity_layers,
                plan.shape,
                plan.own_data,
            )
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
                "recipe": arm.recipe(plan.recipe).model_dump(mode="json"),
            }
            self._arm(arm, {**own, "gradients": str(scratch / f"{arm.name}.safetensors")})
        if self.request.frontier:
            for arm in plan.arms:
                for axis in ("seq_len_tokens", "micro_batch"):
                    self._frontier(arm, axis, {**common, "gradients": ""})

    def _save_rows(self, path: Path) -> None:
        """The rows that every arm is fed, drawn or from the recipe's data."""
        plan = self.plan
        per_step = plan.recipe.train.micro_batch * plan.recipe.train.accumulation_steps
        if plan.own_data:
            rows = self._own_rows(per_step)
        else:
            from transformers import AutoConfig

            rows = work.random_rows(
                plan.work,
                vocabulary=AutoConfig.from_pretrained(plan.recipe.model.name).vocab_size,
                seq_len_tokens=plan.recipe.model.seq_len_tokens,
                rows_per_step=per_step,
            )
        work.save(rows, path)

    def _own_rows(self, per_step: int) -> list[work.Row]:
        from fastlora.data.prepare import prepare_data
        from fastlora.engines.base import load_tokenizer

        recipe = self.plan.recipe
        unpacked = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"packing": False})}
        )
        data = prepare_data(unpacked, load_tokenizer(recipe.model), self.console.print)
        packing = any(arm.packed for arm in self.plan.arms)
        return work.dataset_rows(
            data.train,
            self.plan.work,
            rows_per_step=per_step,
            pack_tokens=recipe.model.seq_len_tokens if packing else None,
        )

    def _arm(self, arm: Arm, task: dict[str, Any]) -> None:
        self.console.print(f"bench: {arm.name} ...", markup=False)
        try:
            answer = self._worker("arm", _json(**task), name=arm.name, environment=arm.environment)
        except Failed as failed:
            self.failures[arm.name] = failed
            self.console.print(f"bench: {arm.name}: {failed.status}: {failed.detail}", markup=False)
            return
        self.results[arm.name] = answer

    def _frontier(self, arm: Arm, axis: Any, task: dict[str, Any]) -> None:
        self.console.print(f"bench: {arm.name}: how much fits, {axis} ...", markup=False)
        along = axis == "seq_len_tokens"
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.plan.recipe.model.name)
        own = {
            **task,
            "arm": arm.model_dump(mode="json"),
            "recipe": arm.recipe(self.plan.recipe).model_dump(mode="json"),
            "axis": axis,
            "limit": config.max_position_embeddings if along else FRONTIER_BATCHES,
            "unit": 256 if along else 1,
        }
        try:
            found = self._worker(
                "frontier", _json(**own), name=arm.name, environment=arm.environment
            )
            found.pop("status")
            self.frontiers.append(Frontier(arm=arm.name, axis=axis, **found))
        except Failed as failed:
            self.frontiers.append(
                Frontier(
                    arm=arm.name, axis=axis, fits=0, fails=None, tokens_per_s=None,
                    peak_reserved_gib=None, detail=f"{failed.status}: {failed.detail}",
                )
            )  # fmt: skip

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

    def _judged(self, scratch: Path) -> list[ArmResult]:
        if not hasattr(self, "plan"):
            return []
        judged = []
        firsts: dict[
            bool, Arm
        ] = {}  # padded and packed arms take other steps through the same rows
        for arm in self.plan.arms:
            if arm.name in self.results:
                firsts.setdefault(arm.packed, arm)
                judged.append(self._judge(arm, firsts, scratch))
            elif arm.name in self.failures:
                failed = self.failures[arm.name]
                peaks = {
                    key: failed.told.get(key)
                    for key in ("peak_allocated_gib", "peak_reserved_gib", "driver_gib")
                }
                judged.append(
                    ArmResult(arm=arm.name, status=failed.status, detail=failed.detail, **peaks)  # type: ignore[arg-type]
                )
            else:
                judged.append(ArmResult(arm=arm.name, status="interrupted", detail="not measured"))
        return judged

    def _judge(self, arm: Arm, firsts: dict[bool, Arm], scratch: Path) -> ArmResult:
        from safetensors.torch import load_file

        result = self.results[arm.name]
        first = self.results[next(iter(firsts.values())).name]
        beside = self.results[firsts[arm.packed].name]
        found: list[Gate] = [
            gates.gate_work(result, beside, same_order=True)
            if beside is not result
            else gates.gate_work(result, first, same_order=False),
            gates.gate_loss(result["losses"]),
            gates.gate_gradients(result),
            gates.gate_weights(result),
            gates.gate_parity(
                *(
                    load_file(scratch / f"{name}.safetensors")
                    for name in (arm.name, "plain", "exact")
                )
            ),
        ]
        if beside is not result:
            found.append(gates.gate_trajectory(result["losses"], beside["losses"]))
        passed = all(gate.passed for gate in found)
        shown = figures(result, self.plan.work.warmup_steps, self.machine["ceilings"])
        return ArmResult(
            arm=arm.name,
            status="ok" if passed else "red",
            detail=""
            if passed
            else "; ".join(f"{g.name}: {g.detail}" for g in found if not g.passed),
            gates=found,
            losses=result["losses"],
            load_s=result["load_s"],
            notes=result["notes"],
            **(shown if passed else {}),  # no speed on a red gate
        )

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
            status="partial" if self.interrupted else status,
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


def figures(result: dict[str, Any], warmup: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """The report's figures of an arm, from its steps after warm-up."""
    seconds = result["step_s"][warmup:]
    tokens, supervised = result["step_tokens"][warmup:], result["step_supervised"][warmup:]
    flops, total = result["flops"], sum(result["step_tokens"])
    # Squared lengths are known for the whole run; their share is that of the tokens.
    squared = result["squared_lengths"] * sum(tokens) / total
    model = flops["matmul"] * sum(tokens) + flops["attention"] * squared
    again = flops["recompute_matmul"] * sum(tokens) + flops["recompute_attention"] * squared
    peak = ceilings.get("gemm_tflops", 0) * 1e12 * sum(seconds)
    return {
        "tokens_per_s": spread([t / s for t, s in zip(tokens, seconds, strict=True)]),
        "supervised_tokens_per_s": spread(
            [t / s for t, s in zip(supervised, seconds, strict=True)]
        ),
        "step_s": spread(seconds),
        "peak_allocated_gib": result["peak_allocated_gib"],
        "peak_reserved_gib": result["peak_reserved_gib"],
        "driver_gib": result["driver_gib"],
        "mfu": round(model / peak, 4) if peak else None,
        "hfu": round((model + again) / peak, 4) if peak else None,
        "counted": {
            "steps": len(result["step_s"]),
            "tokens": total,
            "supervised_tokens": sum(result["step_supervised"]),
            "padding_share": round(1 - total / result["fed_tokens"], 4),
            "digest": result["digest"],
        },
    }


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6)

    return Spread(p20=at(0.2), p50=at(0.5), p80=at(0.8))


def ingredients(arm: Arm) -> list[Arm]:
    """The arm without each of its ingredients, and with each that it could have and has not."""
    others = []
    for option, (engines, _) in OPTIONS.items():
        if (
            arm.engine not in engines
            or option in arm.options
            or option in ("+packing", "+fastlora")
        ):
            continue
        others.append(Arm.parse(arm.name + option))
    return others


def ledger(arms: Sequence[ArmResult]) -> list[LedgerEntry]:
    """An entry for each arm that is another one with one option more."""
    by_name = {arm.arm: arm for arm in arms}
    entries = []
    for arm in arms:
        for option, (_, what) in OPTIONS.items():
            base = by_name.get(arm.arm.removesuffix(option))
            if base is None or base is arm:
                continue
            entries.append(
                LedgerEntry(
                    ingredient=what,
                    arm=arm.arm,
                    base=base.arm,
                    tokens_per_s=arm.tokens_per_s.p50 if arm.tokens_per_s else None,
                    base_tokens_per_s=base.tokens_per_s.p50 if base.tokens_per_s else None,
                    peak_reserved_gib=arm.peak_reserved_gib,
                    base_peak_reserved_gib=base.peak_reserved_gib,
                )
            )
    return entries


def renamed(recipe: Any, name: str) -> Any:
    """The recipe with another model."""
    model = recipe.model.model_copy(update={"name": name})
    return recipe.model_copy(update={"model": model})


def cache_folder() -> Path:
    root = os.environ.get("FASTLORA_CACHE") or Path.home() / ".cache" / "fastlora"
    return Path(root).absolute()


def _json(**task: Any) -> str:
    import json

    return json.dumps(task)
