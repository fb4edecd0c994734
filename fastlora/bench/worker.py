"""The processes' side: `python -m fastlora.bench.worker KIND`, a task on stdin, an answer on stdout.

The answer is one line of JSON: {"status": "ok", ...}, or status oom or failed with a detail. Lines of status partial
may come before it, with what was found by then. All else that is printed goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from fastlora.engines.base import prefer_expandable_segments
from fastlora.engines.memory import is_out_of_memory
from fastlora.errors import FastloraError
from fastlora.recipe.schema import ModelSection

if TYPE_CHECKING:
    import torch


class WeightsTask(BaseModel):
    shape: dict[str, Any]
    model: ModelSection
    cache: str


def probe(_: str) -> dict[str, Any]:
    """The machine, and what it can do at best: the 16-bit matrix product and the copy that ceilings
    are taken from."""
    import torch

    from fastlora.engines.base import resolve_dtype
    from fastlora.rundir import provenance

    found: dict[str, Any] = {
        "machine": provenance.machine(),
        "driver": provenance.driver(),
        "ceilings": {},
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()  # before anything of ours but the context is there
        found["in_use_gib"] = round((total - free) / 2**30, 2)
        found["ceilings"] = _ceilings(resolve_dtype(ModelSection(name="any")))
    return found


def _ceilings(dtype: torch.dtype) -> dict[str, float]:
    import torch

    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)

    def from_host() -> None:
        target[: pinned.nbytes].copy_(pinned, non_blocking=True)

    return {
        "gemm_tflops": round(2 * size**3 / _median_s(lambda: left @ right) / 1e12, 1),
        "copy_gb_s": round(2 * source.nbytes / _median_s(lambda: target.copy_(source)) / 1e9, 1),
        "host_gb_s": round(pinned.nbytes / _median_s(from_host) / 1e9, 1),
    }


def _median_s(work: Callable[[], object], repeats: int = 20) -> float:
    import torch

    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def weights(task: str) -> dict[str, Any]:
    from fastlora.bench.weights import cached_folder, is_complete, random_checkpoint

    asked = WeightsTask.model_validate_json(task)
    started = time.perf_counter()
    cached = is_complete(cached_folder(asked.shape, asked.model, Path(asked.cache)))
    folder = random_checkpoint(asked.shape, asked.model, Path(asked.cache))
    return {
        "folder": str(folder),
        "made": not cached,
        "seconds": round(time.perf_counter() - started, 1),
    }


def arm(task: str) -> dict[str, Any]:
    from fastlora.bench.arm import run_arm
    from fastlora.bench.loaded import ArmTask

    return run_arm(ArmTask.model_validate_json(task))


def reference(task: str) -> dict[str, Any]:
    from fastlora.bench.reference import ReferenceTask, run_reference

    return run_reference(ReferenceTask.model_validate_json(task))


def frontier(task: str, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    from fastlora.bench.frontier import FrontierTask, run_frontier

    return run_frontier(FrontierTask.model_validate_json(task), tell)


KINDS = {"probe": probe, "weights": weights, "arm": arm, "reference": reference}


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone, by SIGKILL even: it would
    go on measuring for nobody. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> int:
    die_with_parent()
    results, sys.stdout = sys.stdout, sys.stderr
    prefer_expandable_segments()

    def tell(found: dict[str, Any]) -> None:
        """What the parent is to have should this process come to no answer."""
        print(json.dumps({"status": "partial", **found}), file=results, flush=True)

    try:
        kind, task = sys.argv[1], sys.stdin.read()
        found = frontier(task, tell) if kind == "frontier" else KINDS[kind](task)
        answer = {"status": "ok", **found}
    except FastloraError as error:
        answer = {"status": "failed", "detail": str(error)}
    except Exception as error:
        traceback.print_exc()
        answer = _explained(error)
    print(json.dumps(answer), file=results, flush=True)
    return 0


def _explained(error: Exception) -> dict[str, Any]:
    if is_out_of_memory(error):
        from fastlora.bench.memory import memory

        reason = str(error).split(". ")
        return {"status": "oom", "detail": ". ".join(reason[:2]), **memory()}
    return {"status": "failed", "detail": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
