"""Tensors that wait in host memory between forward and backward.

    stash = lanes.stash(device, first=...)
    stash.put(x)                       its copy begins, on a stream of its own; so may others
    stash.settle()                     from here on x's memory may be written to
    with stash.fetched() as (x,):      all are back; those of the stash before this one come meanwhile

Host buffers are pinned, taken when first needed and used again in every step; a larger one takes the place of one that
is too small. Back on the GPU the tensors of a stash lie in one of two staging buffers: one is filled while the other is
read. On a CPU the same happens by plain copies.

Everything is ordered by events between the two streams, and the host waits for nothing, so that a CUDA graph can record
it (forward and backward in one, after a step without: buffers cannot be taken while it records). The copy stream runs
one copy after the other, and before each it waits for the compute stream: until x is made, or until all that was
enqueued before has read the staging buffer. The compute stream waits for the copies in `settle`, and in `fetched`
before the next one is enqueued. A graph goes to the same addresses whenever it is replayed: buffers that one has
recorded are never given back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch

ALIGNED = 256
"""Bytes: where PyTorch's own allocations begin."""


class Part(NamedTuple):
    """One tensor in host memory."""

    host: torch.Tensor
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, buffer: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Of `buffer`, from its byte `at` on. To autograd no view, which an op could not return as its own."""
        storage, place = buffer.untyped_storage(), at // self.dtype.itemsize
        return buffer.new_empty(0, dtype=self.dtype).set_(storage, place, self.shape, self.stride)


class Stash:
    """Tensors in host memory. Their memory is free again when they were fetched, or forgotten."""

    def __init__(self, lane: Lane, before: Stash | None) -> None:
        self.lane, self.parts = lane, list[Part]()
        self.gone = False
        self._before = None if before is None else weakref.ref(before)
        self._copied: list[torch.Tensor] = []
        """Until the copies are done."""

    @property
    def before(self) -> Stash | None:
        """The one that was made before it in the same forward pass, if it is still to be fetched: it is next."""
        found = None if self._before is None else self._before()
        return None if found is None or found.gone else found

    def put(self, x: torch.Tensor) -> None:
        """Begin to copy x. It comes back with its strides, if they leave no holes."""
        if not _dense(x):
            x = x.contiguous()
        self._copied.append(x)
        self.parts.append(self.lane.send(x))

    def settle(self) -> None:
        self.lane.compute_waits()
        self._copied.clear()

    def fetched(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Raises RuntimeError: it was fetched before."""
        return self.lane.fetched(self)

    @property
    def places(self) -> list[int]:
        """Of each part in a staging buffer, in bytes; and the end."""
        found = [0]
        for part in self.parts:
            found.append(found[-1] + -(-part.nbytes // ALIGNED) * ALIGNED)
        return found

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [part.view(buffer, at) for part, at in zip(self.parts, self.places, strict=False)]

    def release(self) -> None:
        if not self.gone:
            self.gone = True
            self.lane.free += [part.host for part in self.parts]
            self.parts.clear()

    def __del__(self) -> None:
        self.release()


class Staging:
    """Memory on the GPU that tensors come back into."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.holds: weakref.ref[Stash] | None = None
        """What was sent for and not fetched yet."""
        self.read = False
        """Between a fetch and the end of the backward that it is for."""

    def has(self, stash: Stash) -> bool:
        return self.holds is not None and self.holds() is stash


class Lane:
    """The copies from and to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: list[torch.Tensor] = []
        """Host buffers with nothing in them."""
        self.staging = (Staging(), Staging())
        self._recorded: dict[int, torch.Tensor] = {}
        """By address: buffers that a CUDA graph goes to."""
        self._newest: weakref.ref[Stash] | None = None

    def stash(self, *, first: bool) -> Stash:
        """`first` of a forward pass."""
        before = None if first or self._newest is None else self._newest()
        stash = Stash(self, before)
        self._newest = weakref.ref(stash)
        return stash

    def send(self, x: torch.Tensor) -> Part:
        host = self._host_buffer(x.nbytes)
        part = Part(host, x.nbytes, x.dtype, x.shape, x.stride())
        self._copy(part.view(host), x, host)
        return part

    @contextmanager
    def fetched(self, stash: Stash) -> Iterator[list[torch.Tensor]]:
        if stash.gone:
            raise RuntimeError(
                "backward goes a second time through a layer whose input was offloaded, and has been given back; "
                "recompute without offload for that"
            )
        staging = next((one for one in self.staging if one.has(stash)), None)
        if staging is None:
            staging = self._send_for(stash)
        self.compute_waits()
        found = stash.views(staging.buffer)
        stash.release()  # what is copied there next waits for this copy
        staging.read, staging.holds = True, None
        try:
            if (before := stash.before) is not None:
                self._send_for(before)
            yield found
        finally:
            staging.read = False

    def compute_waits(self) -> None:
        """The compute stream, for all copies so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _send_for(self, stash: Stash) -> Staging:
        """Begin to copy it back, into memory that nobody reads: with both buffers in use, as by a region within a
        region, into memory of its own."""
        free = sorted((one for one in self.staging if not one.read), key=_awaited)
        staging = free[0] if free else Staging()
        size = stash.places[-1]
        if staging.buffer.numel() < size:
            self._copies_wait()
            self.compute_waits()  # a copy into the old one may be under way that nobody fetched
            staging.buffer = staging.buffer.new_empty(0)  # it is free before there is a larger one
            staging.buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        staging.holds = weakref.ref(stash)
        for part, back in zip(stash.parts, stash.views(staging.buffer), strict=True):
            self._copy(back, part.view(part.host), part.host, staging.buffer)
        return staging

    def _copy(self, to: torch.Tensor, source: torch.Tensor, *buffers: torch.Tensor) -> None:
        if self.stream is None:
            to.copy_(source)
            return
        self._copies_wait()
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        if torch.cuda.is_current_stream_capturing():
            self._recorded |= {buffer.data_ptr(): buffer for buffer in buffers}

    def _copies_wait(self) -> None:
        """The next copy, for all that is on the compute stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def _host_buffer(self, nbytes: int) -> torch.Tensor:
        """The smallest that is large enough; else a new one in the place of the largest."""
        if self.free:
            large = [buffer for buffer in self.free if buffer.numel() >= nbytes]
            found = min(large, key=torch.numel) if large else max(self.free, key=torch.numel)
            self.free = [buffer for buffer in self.free if buffer is not found]
            if large:
                return found
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.stream is not None)


def _awaited(staging: Staging) -> bool:
    return staging.holds is not None


def _dense(x: torch.Tensor) -> bool:
    """Whether its numbers, in some order of its dimensions, lie one behind the other."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


class Lanes:
    """A lane for every device that a model's layers are on."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, Lane] = {}

    def stash(self, device: torch.device, *, first: bool) -> Stash:
        """See Lane."""
        lane = self.by_device.get(device)
        if lane is None:
            lane = self.by_device[device] = Lane(device)
        return lane.stash(first=first)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Lanes, ()  # a copied model's are its own
