"""Rewrites the tables in docs/plan.md: what `fastlora plan` predicts beside what was measured.

python benchmarks/plan.py          # what lies between the two markers is made anew
python benchmarks/plan.py --check  # exit 1 if docs/plan.md is not what it would be

Measured are benchmarks/results (reports, and the engines' JSON lines) and benchmarks/measured.json, which holds figures
that docs/log.md and docs/benchmarking.md report without a file of their own. No correction by this machine's runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.bench.schema import Arm, Suite, SuiteModel
from fastlora.bench.suites import bundled, load_suite
from fastlora.plan.advise import with_settings
from fastlora.plan.gpus import gpu_named
from fastlora.plan.memory import Memory, memory
from fastlora.plan.setup import setup_of
from fastlora.plan.shape import shape_of
from fastlora.plan.speed import speed
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import write_atomic

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- plan:begin -->", "<!-- plan:end -->"
WITHIN = 0.05
_CHOSEN = re.compile(r'^  (?P<key>(train|memory)\.\w+) = (?P<value>"\w+"|\w+): ')
CHECKPOINTS = {"1b": "llama32-1b", "8b": "llama31-8b", "8b-nf4": "llama31-8b"}


@dataclass(frozen=True, slots=True)
class Row:
    suite: str
    arm: str
    batch: str
    gpu: str
    source: str
    predicted: Memory
    predicted_tokens_per_s: float | None = None
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    tokens_per_s: float | None = None
    cap_gib: float | None = None
    fits: bool | None = None

    @property
    def errors(self) -> dict[str, float]:
        pairs = {
            "allocated": (self.predicted.allocated_gib, self.allocated_gib),
            "reserved": (self.predicted.reserved_gib, self.reserved_gib),
            "speed": (self.predicted_tokens_per_s, self.tokens_per_s),
        }
        return {key: told / found - 1 for key, (told, found) in pairs.items() if told and found}


def row(
    suite: str, arm: str, gpu: str, source: str, *, spec: Suite | None = None, micro_batch: int | None = None,
    seq_len_tokens: int | None = None, ceilings: dict[str, float] | None = None,
    chosen: Mapping[str, Any] | None = None, **measured: Any,
) -> Row:  # fmt: skip
    """What is predicted for that arm, and what was measured of it. `spec`: of a suite that is not bundled. `chosen`:
    what it was left to choose (+budget)."""
    spec = spec or load_suite(bundled()[suite])
    one = Arm.parse(arm)
    assert spec.shape is not None
    recipe: Recipe = one.recipe(spec.recipe("made by the benchmark"))
    recipe = with_settings(recipe, dict(chosen or {}))
    train = recipe.train.model_copy(update={"micro_batch": micro_batch or recipe.train.micro_batch})
    length = seq_len_tokens or recipe.model.seq_len_tokens
    model = recipe.model.model_copy(update={"seq_len_tokens": length})
    recipe = recipe.model_copy(update={"train": train, "model": model})
    card = gpu_named(gpu, ceilings)
    assert card is not None
    assert card.vram_gib is not None
    shape = shape_of(spec.shape, suite)
    setup = setup_of(recipe, shape, engine=one.engine)
    told = memory(shape, setup, vram_gib=card.vram_gib, hopper=card.hopper)
    return Row(
        suite, arm, f"{train.micro_batch} x {length:,}", gpu, source, told,
        speed(shape, setup, card).tokens_per_s, **measured,
    )  # fmt: skip


def own_suite(report: Mapping[str, Any]) -> Suite | None:
    """That of benchmarks/suites/plan, as the report has it; None if it is a bundled one."""
    if report["name"] in bundled():
        return None
    settings = report["settings"]
    parts = {key: settings["recipe"][key] for key in ("model", "lora", "train")}
    parts["model"] = {key: parts["model"][key] for key in SuiteModel.model_fields}
    return Suite(vram_gib=0, arms=["peft"], shape=settings["shape"], **parts)


def chosen(notes: Sequence[str]) -> dict[str, Any]:
    """The settings that a run within memory.vram says it took: "  memory.keep_layers = 12: ..."."""
    found = (_CHOSEN.match(note) for note in notes)
    return {one["key"]: tomllib.loads(f"value = {one['value']}")["value"] for one in found if one}


def rows(root: Path = ROOT) -> Iterator[Row]:
    results = root / "benchmarks" / "results"
    for path in sorted(results.glob("*/report.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        settings, environment = report["settings"], report["environment"]
        if not settings["shape"] or settings["work"]["lengths"] != "full":
            continue  # of a checkpoint whose shape is not there (--model, a recipe), or rows that are not full
        spec = own_suite(report)
        for arm in report["arms"]:
            if arm["status"] == "ok":
                yield row(
                    report["name"], arm["arm"], environment["machine"]["gpu"], path.parent.name,
                    spec=spec, ceilings=environment["ceilings"], chosen=chosen(arm["notes"]),
                    allocated_gib=arm["peak_allocated_gib"], reserved_gib=arm["peak_reserved_gib"],
                    tokens_per_s=arm["tokens_per_s"]["p50"],
                )  # fmt: skip
    for path in sorted(results.glob("*engines*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if any("TRL's chunked loss" in note for note in found["notes"]):
                continue  # a loss that runs no longer take
            result = found["result"]
            yield row(
                CHECKPOINTS[found["checkpoint"]], found["engine"], found["machine"]["gpu"],
                f"fastlora run, {path.stem}", allocated_gib=result["peak_allocated_gib"],
                reserved_gib=result["peak_reserved_gib"], tokens_per_s=result["tokens_per_s_median"],
            )  # fmt: skip
    for found in json.loads((root / "benchmarks" / "measured.json").read_text(encoding="utf-8")):
        yield row(**{("source" if key == "from" else key): value for key, value in found.items()})


def _gib(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    told = f"{value:.2f}" if error is None else f"{value:.2f} ({error:+.1%})"
    return f"**{told}**" if error is not None and abs(error) > WITHIN else told


def tables(found: Sequence[Row]) -> str:
    head = ["suite", "arm", "tokens", "GPU", "measured by"]
    memory_head = [*head, "allocated", "predicted (error)", "reserved", "predicted (error)"]
    lines = [_line(memory_head), _rule(len(head), 4)]
    for one in found:
        if one.fits is None:
            error, mem = one.errors, one.predicted
            allocated = _gib(mem.allocated_gib, error["allocated"]) if "allocated" in error else ""
            lines.append(
                _line([
                    *_what(one), _gib(one.allocated_gib, None), allocated, _gib(one.reserved_gib, None),
                    _gib(mem.reserved_gib, error.get("reserved")),
                ])
            )  # fmt: skip
    lines += ["", _line([*head, "cap GiB", "it", "predicted to need"]), _rule(len(head), 3)]
    for one in found:
        if one.fits is not None:
            needed, cap = one.predicted.needed_gib, one.cap_gib or 0
            told = f"{needed:.2f}"
            right = (needed <= cap) == one.fits
            lines.append(
                _line([
                    *_what(one), f"{cap:g}", "fits" if one.fits else "fails", told if right else f"**{told}**",
                ])
            )  # fmt: skip
    lines += ["", _line([*head, "tokens/s", "predicted (error)"]), _rule(len(head), 2)]
    for one in found:
        if one.tokens_per_s and one.predicted_tokens_per_s:
            told = f"{one.predicted_tokens_per_s:,.0f} ({one.errors['speed']:+.0%})"
            lines.append(_line([*_what(one), f"{one.tokens_per_s:,.0f}", told]))
    return "\n".join(lines)


def _what(one: Row) -> list[str]:
    return [one.suite, one.arm, one.batch, one.gpu.removeprefix("NVIDIA "), one.source]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(left: int, right: int) -> str:
    return _line(["---"] * left + ["---:"] * right)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if it would")
    check = parser.parse_args(arguments).check
    path = root / "docs" / "plan.md"
    before = path.read_text(encoding="utf-8")
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        print(f"{path}: has no {BEGIN} ... {END}", file=sys.stderr)
        return 1
    after = f"{head}{BEGIN}\n{tables(list(rows(root)))}\n{END}{tail}"
    if check:
        if after != before:
            print("docs/plan.md is not in step; run python benchmarks/plan.py", file=sys.stderr)
        return int(after != before)
    if after != before:
        write_atomic(path, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
