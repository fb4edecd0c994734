"""What benchmarks/kernels.py and benchmarks/ops_head.py measure, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Setting(NamedTuple):
    tokens: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    compiled: bool = False
    """Modules by torch.compile, as unsloth has the layers of architectures that it fuses nothing of."""

    def autocast(self) -> torch.autocast:
        """As around a recorded micro-batch; each weight is cast once anyway."""
        on = self.dtype != torch.float32
        kept = self.dtype if on else None
        return torch.autocast(self.device.type, kept, enabled=on, cache_enabled=False)

    def ready(self, module: Any) -> Any:
        if not self.compiled:
            return module
        # On a CPU without a compiler of C++, which is there for tests alone.
        backend = "inductor" if self.device.type == "cuda" else "aot_eager"
        return torch.compile(module, dynamic=False, backend=backend)


class Work(NamedTuple):
    """Of one forward and backward; a multiply-add is two FLOPs."""

    flops: int
    floor_flops: int
    least_bytes: int
    """Read and written, if every tensor goes over the bus once a direction."""


class Case(NamedTuple):
    """What is measured at once, in every setting."""

    group: str
    """A line of the summary."""
    op: str
    model: str
    """Whose shape it is; "" for a shape of the user's."""
    shape: str
    base: str
    """dense or nf4."""
    arms: Callable[[Setting], dict[str, Any]]
    """truth (wider arithmetic), floor, peft, and ours or `left`, the reason why PEFT keeps it. All but `left` are
    called; truth, peft and ours then give their output and gradients by name."""
    work: Callable[[Setting], Work]

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.group, self.op, self.model, self.shape, self.base)))
