"""The GPU's memory as one process sees it, and the host's."""

from __future__ import annotations

import threading
from pathlib import Path

from fastlora.engines.memory import pinned_bytes

_STATUS = Path("/proc/self/status")


def memory() -> dict[str, float | None]:
    """Peaks in GiB since they were last reset, the driver's with what it counts beside PyTorch now; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return {"peak_allocated_gib": None, "peak_reserved_gib": None, "driver_gib": None}
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "driver_gib": round((beside + torch.cuda.max_memory_reserved()) / 2**30, 3),
    }


class HostPeak:
    """The most host memory that this process had at once while within it: what it wrote, and what is pinned. Pages of
    files that it reads are left out: they give way."""

    def __init__(self, every_s: float = 0.1) -> None:
        self._every_s = every_s
        self._written = self._with_pinned = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HostPeak:
        import torch  # noqa: F401  # here, and not in the thread beside an engine's imports

        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def gib(self, shared_bytes: int = 0) -> float | None:
        """Up to now; None where the kernel does not say (no Linux). `shared_bytes`: what else the process holds, in
        pages that it shares (an embedding's)."""
        self._look()
        # Asked now, since it pins memory, which would break the recording of a CUDA graph.
        peak = self._with_pinned if _pinned_is_beside() else self._written
        return round((peak + shared_bytes) / 2**30, 3) if peak else None

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        written = written_bytes()
        self._written = max(self._written, written)
        self._with_pinned = max(self._with_pinned, written + pinned_bytes())


def written_bytes() -> int:
    """Of this process's memory, what it wrote and no file holds; 0 where the kernel does not say."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(one.split()[1]) for one in lines if one.startswith("RssAnon:")), 0)


def _pinned_is_beside() -> bool:
    """Whether pinned memory is missing from `written_bytes`, where the driver makes its pages."""
    import torch

    if not (pinned := pinned_bytes()):
        return False
    size, held = 2**24, []
    before = written_bytes()
    while pinned_bytes() == pinned and size < 2**30:  # one that was free is none to judge by
        held.append(torch.empty(size, dtype=torch.uint8, pin_memory=True).fill_(1))
        size *= 2
    return written_bytes() - before < (pinned_bytes() - pinned) / 2
