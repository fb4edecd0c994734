"""The GPU's memory as one process sees it."""

from __future__ import annotations

import gc


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


def cap_memory(cap_gib: float | None) -> None:
    """Let this process have no more of the GPU than a smaller card would: the CUDA context counts in,
    which the allocator's own limit leaves out."""
    import torch

    if cap_gib is None or not torch.cuda.is_available():
        return
    torch.zeros(1, device="cuda")  # makes the context
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    fraction = max(0.01, (cap_gib * 2**30 - context) / total)
    torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))


def release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
