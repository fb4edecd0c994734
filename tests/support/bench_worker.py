"""`fastlora.bench.worker` with a fault planted in some arms: FAULTS='{"arm": "fault"}'.

gradient: one adapter tensor's gradient comes out 5 % too large. deep: one is wrong in a
layer that the cut-down model has not. frozen: the optimizer does not step.
tokens: the arm is fed other rows. oom: the third step runs out of memory. kill: the process dies.
interrupt: the benchmark, whose process id is in BENCH, gets Ctrl-C while the arm runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from fastlora.bench import arm, worker


def plant(fault: str | None) -> None:
    import torch

    if fault == "gradient":
        step = arm.parity_step

        def wrong(loaded: arm.Loaded, rows: Any) -> dict[str, Any]:
            _, parameter = next(loaded.adapter())
            parameter.register_hook(lambda gradient: gradient * 1.05)
            return step(loaded, rows)

        arm.parity_step = wrong
    elif fault == "deep":
        step, seen = arm.parity_step, []

        def wrong_below(loaded: arm.Loaded, rows: Any) -> dict[str, Any]:
            found = step(loaded, rows)
            if not seen:  # the whole model comes first
                seen.append(1)
                (*_, last) = (name for name in found if "layers.1." in name)
                found[last] = -found[last]
            return found

        arm.parity_step = wrong_below
    elif fault == "frozen":
        torch.optim.AdamW.step = lambda self, closure=None: None
    elif fault == "tokens":
        load = arm.works.load
        arm.works.load = lambda path: [
            {name: [ids[-1], *ids[:-1]] for name, ids in row.items()} for row in load(path)
        ]
    elif fault == "oom":
        loss, calls = arm.Loaded.loss, []

        def full(self: arm.Loaded, *rest: Any) -> Any:
            calls.append(1)
            if len(calls) == 5:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. More words."
                )
            return loss(self, *rest)

        arm.Loaded.loss = full
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "interrupt":
        os.kill(int(os.environ["BENCH"]), signal.SIGINT)
        time.sleep(600)


def main() -> int:
    original = worker.arm

    def faulty(task: str) -> dict[str, Any]:
        plant(json.loads(os.environ["FAULTS"]).get(json.loads(task)["arm"]["name"]))
        return original(task)

    worker.KINDS["arm"] = faulty
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
