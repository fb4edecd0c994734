"""memory.embedding = "host": a frozen input embedding in pinned host memory, of which the GPU reads rows over the bus.

The module's weight stays a tensor of the GPU, whose memory is the host's. Its lookup is therefore the same kernel as
before, on whichever engine, waits for nothing, and can be recorded. A micro-batch reads tokens x hidden numbers of it.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastlora.engines.memory import GIB, host_free_bytes

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

_SPARE_BYTES = 2**29
"""Of the host's memory, what is left for others."""


def embedding_to_host(
    model: PeftModel, mapped: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> str:
    """Put the input embedding of `model` into host memory; why not, where it stays on the GPU. `mapped`: in place of
    `in_host_memory`."""
    import torch

    layer, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Embedding):
        return "it has an adapter, or is no plain table"
    weight = layer.weight
    if weight.requires_grad:
        return "it is trained"
    if layer.max_norm is not None:
        return "each lookup writes to it (max_norm)"
    if head is not None and head.weight.data_ptr() == weight.data_ptr():
        return "it is the output layer's weight too"
    try:
        weight.data = (mapped or in_host_memory)(weight.data)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        # A PyTorch that takes no such tensor, a driver or a container that pins no such memory.
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # its memory is others' now
    return ""


def embedding_line(model: PeftModel, why_not: str) -> str:
    """For the user: where it is, by what `embedding_to_host` said of it."""
    if why_not:
        return f"memory.embedding: it stays where it is ({why_not})"
    weight = model.get_input_embeddings().weight
    return f"memory.embedding: {weight.nbytes / GIB:.2f} GiB in host memory; the GPU reads its rows over the bus"


def in_host_memory(weight: torch.Tensor) -> torch.Tensor:
    """A copy of `weight`, a contiguous tensor on a GPU, as a tensor of that GPU whose memory is pinned host memory. It
    is given back with the last tensor that uses it.

    Raises RuntimeError, OSError, TypeError or ValueError: it is not on a GPU, the host has too little memory free, its
    pages cannot be pinned, or PyTorch does not take them as they are.
    """
    import torch

    if weight.device.type != "cuda":
        raise RuntimeError("it is not on a GPU")
    free = host_free_bytes() - _SPARE_BYTES
    if weight.nbytes > free:
        raise RuntimeError(
            f"it takes {weight.nbytes / GIB:.2f} GiB of host memory, of which {max(0, free) / GIB:.2f} are free"
        )
    pinned = _Pinned(weight)
    found = torch.as_tensor(pinned, device=weight.device).view(weight.dtype)
    if found.data_ptr() != pinned.address:
        raise RuntimeError("PyTorch would copy it to the GPU")
    if not torch.equal(found[[0, -1]], weight[[0, -1]]):
        raise RuntimeError("the GPU reads other values than the host has written")
    return found


class _Pinned:
    """A tensor's copy in host memory that the GPU can read, for `torch.as_tensor`, whose tensors hold on to it."""

    def __init__(self, weight: torch.Tensor) -> None:
        import torch

        # Not pin_memory, whose allocator takes the next power of two: 2 GiB for Qwen2.5 7B's 1.02. Whole pages, and
        # shared ones, of which a forked process gets no copy.
        pages = mmap.mmap(-1, weight.nbytes)
        self.host = torch.frombuffer(pages, dtype=weight.dtype).view(weight.shape)
        self.address = _registered(self.host)
        weakref.finalize(self, _release, self.host).atexit = False  # the process's end does it too
        self.host.copy_(weight)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": tuple(self.host.shape),
            "typestr": f"<i{self.host.element_size()}",  # it has no name for bfloat16
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


_PORTABLE, _MAPPED = 1, 2


def _registered(host: torch.Tensor) -> int:
    """Pin the pages of `host`; their address on the GPU, which is not on every machine the host's.

    Through the driver: the runtime would keep an error for the next kernel to stumble over.
    """
    while _later:
        _release(_later.pop())
    start, address = ctypes.c_void_p(host.data_ptr()), ctypes.c_uint64()
    _call("cuMemHostRegister_v2", start, ctypes.c_size_t(host.nbytes), _PORTABLE | _MAPPED)
    try:
        _call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), start, 0)
    except RuntimeError:
        _release(host)
        raise
    return address.value


_later: list[torch.Tensor] = []
"""Given back while a CUDA graph was recorded, which a driver's call would have broken."""


def _release(host: torch.Tensor) -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _later.append(host)
        return
    with suppress(RuntimeError, OSError):  # of a GPU that is lost
        torch.cuda.synchronize()  # it may still be read
        _call("cuMemHostUnregister", ctypes.c_void_p(host.data_ptr()))


def _call(function: str, *given: Any) -> None:
    code = getattr(ctypes.CDLL("libcuda.so.1"), function)(*given)
    if code:
        raise RuntimeError(f"{function}: the CUDA driver's error {code}")
