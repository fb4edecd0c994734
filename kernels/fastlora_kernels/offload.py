"""Tensors that wait in host memory between forward and backward.

    stash = lanes.put(x, first=...)    the copy begins, on a stream of its own
    stash.settle()                     from here on x's memory may be written to
    with stash.fetched() as x:         it is back; the one that was put before it comes meanwhile

Host buffers are pinned, taken when first needed and used again in every step; a larger one takes the place of one that
is too small. Back on the GPU a tensor lies in one of two staging buffers: one is filled while the other is read. On a
CPU the same happens by plain copies.

Everything is ordered by events between the two streams, and the host waits for nothing, so that a CUDA graph can record
it (forward and backward in one, after a step without: buffers cannot be taken while it records). The copy stream runs
one copy after the other, and before each it waits for the compute stream: until x is made, or until all that was
enqueued before has read the staging buffer. The compute stream waits for the copies in `settle`, and in `fetched`
before the next one is enqueued. A graph goes to the same addresses whenever it is replayed: buffers that one has
recorded are never given back.

Of all this only the logic has been run, on a CPU; tests/gpu/test_recompute.py is for the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


class Stash:
    """One tensor in host memory. Its memory is free again when it was fetched, or forgotten."""

    def __init__(
        self, lane: Lane, x: torch.Tensor, host: torch.Tensor, before: Stash | None
    ) -> None:
        self.lane, self.shape, self.dtype, self.nbytes = lane, x.shape, x.dtype, x.nbytes
        self.host: torch.Tensor | None = host
        self._before = None if before is None else weakref.ref(before)

    @property
    def before(self) -> Stash | None:
        """The one that was put before it in the same forward pass, if it is still to be fetched: it is next."""
        found = None if self._before is None else self._before()
        return None if found is None or found.host is None else found

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[: self.nbytes].view(self.dtype).view(self.shape)

    def settle(self) -> None:
        self.lane.compute_waits()

    def fetched(self) -> AbstractContextManager[torch.Tensor]:
        return self.lane.fetched(self)

    def release(self) -> None:
        if self.host is not None:
            self.lane.free.append(self.host)
            self.host = None

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

    def put(self, x: torch.Tensor, *, first: bool) -> Stash:
        """Begin to copy x, which is contiguous; `first` of a forward pass."""
        before = None if first or self._newest is None else self._newest()
        host = self._host_buffer(x.nbytes)
        stash = Stash(self, x, host, before)
        self._newest = weakref.ref(stash)
        self._copy(stash.view(host), x, host)
        return stash

    @contextmanager
    def fetched(self, stash: Stash) -> Iterator[torch.Tensor]:
        """Raises RuntimeError: it was fetched before."""
        if stash.host is None:
            raise RuntimeError(
                "backward goes a second time through a layer whose input was offloaded, and has been given back; "
                "recompute without offload for that"
            )
        staging = next((one for one in self.staging if one.has(stash)), None)
        if staging is None:
            staging = self._send_for(stash, stash.host)
        self.compute_waits()
        stash.release()  # what is copied there next waits for this copy
        staging.read, staging.holds = True, None
        try:
            before = stash.before
            if before is not None and before.host is not None:
                self._send_for(before, before.host)
            yield stash.view(staging.buffer)
        finally:
            staging.read = False

    def compute_waits(self) -> None:
        """The compute stream, for all copies so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _send_for(self, stash: Stash, host: torch.Tensor) -> Staging:
        """Begin to copy it back, into memory that nobody reads: with both buffers in use, as by a region within a
        region, into memory of its own."""
        free = sorted((one for one in self.staging if not one.read), key=_awaited)
        staging = free[0] if free else Staging()
        if staging.buffer.numel() < stash.nbytes:
            self._copies_wait()
            self.compute_waits()  # a copy into the old one may be under way that nobody fetched
            staging.buffer = staging.buffer.new_empty(0)  # it is free before there is a larger one
            staging.buffer = torch.empty(stash.nbytes, dtype=torch.uint8, device=self.device)
        staging.holds = weakref.ref(stash)
        self._copy(stash.view(staging.buffer), stash.view(host), host, staging.buffer)
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
        for place, buffer in enumerate(self.free):
            if buffer.numel() >= nbytes:
                return self.free.pop(place)
        if self.free:
            self.free.pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.stream is not None)


def _awaited(staging: Staging) -> bool:
    return staging.holds is not None


class Lanes:
    """A lane for every device that a model's layers are on."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, Lane] = {}

    def put(self, x: torch.Tensor, *, first: bool) -> Stash:
        """See Lane."""
        lane = self.by_device.get(x.device)
        if lane is None:
            lane = self.by_device[x.device] = Lane(x.device)
        return lane.put(x, first=first)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Lanes, ()  # a copied model's are its own
