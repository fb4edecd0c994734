"""The GPU's memory as one process sees it."""

from __future__ import annotations


def memory() -> dict[str, float | None]:
    """Peaks in GiB since they were last reset, and what the driver counts now; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return {"peak_allocated_gib": None, "peak_reserved_gib": None, "driver_gib": None}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "driver_gib": round((total - free) / 2**30, 3),
    }
