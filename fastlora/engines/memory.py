"""Memory that runs out: how the libraries say so, what there was, and how what nobody holds is given back."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import inf
from pathlib import Path

from fastlora.errors import EngineError, FastloraError

GIB = 2**30

_SAID = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|DefaultCPUAllocator: can't allocate memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether less work at a time may help against `error`, or against what it was raised from.

    PyTorch's allocator has a type for it; the driver ("CUDA error: out of memory"), Triton ("Triton Error [CUDA]: out
    of memory"), cuBLAS and cuDNN (..._STATUS_ALLOC_FAILED) and the host's allocator only say it. Triton's
    OutOfResources is another thing: a kernel that wants more shared memory than a processor has.
    """
    import torch

    while error is not None and not isinstance(error, FastloraError):  # one is explained already
        if isinstance(error, torch.OutOfMemoryError):
            return True
        # Not any Exception: a message for the user may speak of memory as well.
        if isinstance(error, RuntimeError):
            said = str(error)
            if _SAID.search(said) and "out of resource" not in said.lower():
                return True
        error = error.__cause__
    return False


def free_memory() -> None:
    """Give back what nobody holds any more; what an exception held is among it once its handler is left."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_peak() -> None:
    """What `peak_gib` and `peak_allocated_gib` give is counted from now on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """The most that PyTorch has reserved of this GPU; 0 without one."""
    import torch

    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0


def peak_allocated_gib() -> float:
    """The most of it that tensors had, without what the allocator keeps beside them; 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def pinned_bytes() -> int:
    """In PyTorch's blocks of pinned host memory, in use or not; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


_GROWTH = 2**24
"""Bytes that a context may come to take until the limit is set anew."""


def cap_memory(cap_gib: float | None, most_context_gib: float = inf) -> None:
    """Let this process have no more of the GPU than a smaller card would: the CUDA context counts in,
    which the allocator's own limit leaves out. What other processes hold cannot be told from it: it counts in as well,
    but for what is above most_context_gib.

    The context grows with kernels that are loaded and host memory that is pinned, so to be called again after work."""
    import torch

    if cap_gib is None or not torch.cuda.is_available():
        return
    torch.zeros(1, device="cuda")  # makes the context
    free, total = torch.cuda.mem_get_info()
    context = min(total - free - torch.cuda.memory_reserved(), most_context_gib * GIB)
    fraction = max(0.01, (cap_gib * GIB - context - _GROWTH) / total)
    torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))


_CGROUPS = (
    ("0::", "", "memory.max", "memory.current", "inactive_file"),
    (":memory:", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and 1: this process's line of /proc/self/cgroup, where the tree stands, its files, and what of the use
is files that were read and give way."""


def host_free_bytes(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """Of the host's memory, what this process may still take: what is available, or what a container leaves of its
    limit, which the machine's own figures do not show."""
    from psutil import virtual_memory

    left = [int(virtual_memory().available)]
    lines = own.read_text().splitlines() if own.exists() else []
    for marker, tree, limit, used, files in _CGROUPS:
        paths = [line.partition(marker)[2] for line in lines if marker in line]
        for path in paths:
            # Within a container the tree may begin with its own group, whatever the line says. Limits above hold too.
            group = root / tree / path.strip("/")
            for one in (group, *group.parents):
                if one.is_relative_to(root / tree) and (one / limit).exists():
                    left += _left(one, limit, used, files)
    return max(0, min(left))


def _left(group: Path, limit: str, used: str, files: str) -> Iterator[int]:
    most = (group / limit).read_text().strip()
    if most.isdigit():  # not "max"
        stat = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
        yield int(most) - int((group / used).read_text()) + int(stat.get(files, 0))


def memory_now(error: BaseException | None = None) -> dict[str, float]:
    """GiB of this GPU, empty without one: allocated, reserved, what other processes hold, the whole card, what of it
    PyTorch may take where that is limited, and what `error` says was asked for."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, card = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    figures = {
        "allocated_gib": torch.cuda.memory_allocated() / GIB,
        "reserved_gib": reserved / GIB,
        "others_gib": max(0, card - free - reserved) / GIB,
        "card_gib": card / GIB,
    }
    share = torch.cuda.get_per_process_memory_fraction()
    if share < 1:
        figures["allowed_gib"] = share * card / GIB
    if asked := re.search(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB)", str(error)):
        figures["asked_gib"] = float(asked[1]) / {"KiB": 2**20, "MiB": 2**10, "GiB": 1}[asked[2]]
    return {name: round(value, 3) for name, value in figures.items()}


def in_words(figures: dict[str, float]) -> str:
    """`memory_now`, in a sentence's brackets; empty without a GPU."""
    if not figures:
        return ""
    asked = f", {figures['asked_gib']:.2f} more asked for" if "asked_gib" in figures else ""
    limit = f", {figures['allowed_gib']:.2f} allowed" if "allowed_gib" in figures else ""
    return (
        f" ({figures['allocated_gib']:.2f} GiB in use and {figures['reserved_gib']:.2f} reserved of "
        f"{figures['card_gib']:.1f}{limit}, {figures['others_gib']:.2f} not by PyTorch{asked})"
    )


@contextmanager
def explained(doing: str, way_out: Callable[[], str]) -> Iterator[None]:
    """Out of memory within it, where doing less at a time is not possible, becomes an error for the user.

    Raises EngineError.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = f"out of memory while {doing}{in_words(memory_now(error))}. {way_out()}"
        raise EngineError(said) from error


def explained_loading() -> AbstractContextManager[None]:
    return explained(
        "loading the model",
        lambda: (
            'Set model.quantization = "nf4" if it is not, take a smaller model, or end other processes on this GPU'
        ),
    )
