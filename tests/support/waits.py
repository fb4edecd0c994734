"""What cannot be recorded on a GPU, found on a CPU: operations whose result's size or value the host must know."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAIT = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.equal, aten.is_nonzero, aten.repeat_interleave,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Collects "operation at file:line" of each; `error` raises RuntimeError there, as a capture does, and where casts
    are kept."""

    def __init__(self, *, error: bool = False) -> None:
        super().__init__()
        self.error = error
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func.overloadpacket in WAIT or by_mask:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            at = frames[-1]
            if at.filename.endswith("fastlora_kernels/replay.py"):
                return func(*args, **(kwargs or {}))  # it compares states of the host's generator
            self.found.append(f"{func} at {at.filename}:{at.lineno}")
            if self.error:
                raise RuntimeError(f"operation not permitted while it is captured: {func}")
        # What is recomputed in backward has an autocast of its own, which keeps nothing behind its end.
        forward = torch._C._current_graph_task_id() == -1
        cast = torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
        if self.error and forward and cast:
            raise RuntimeError("a cast that autocast keeps may not be recorded")
        return func(*args, **(kwargs or {}))
