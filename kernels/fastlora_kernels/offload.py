"""Tensors that wait in host memory between forward and backward.

    stash = lanes.stash(device, first=...)
    stash.put(x)             its copy begins, on a stream of its own; so may others
    stash.settle()           from here on x's memory may be written to
    stash.send_for()         the copies back begin, into memory that is taken now
    (x,) = stash.fetch()     all are back; each is given back with the last that refers to it

Host buffers are pinned, taken when first needed and used again in every step; a larger one takes the place of one that
is too small. On the GPU each tensor comes back into memory of its own, so that what backward reads early makes room for
what comes next. On a CPU the same happens by plain copies.

Everything is ordered by events between the two streams, and the host waits for nothing, so that a CUDA graph can record
it (forward and backward in one, after a step without: pinned memory cannot be taken while it records). The copy stream
runs one copy after the other, and before each it waits for the compute stream: until x is made, or until all that was
enqueued before has read what was where a tensor comes back to. The compute stream waits for the copies in `settle` and
in `fetch`; until it does, what they go to is not given back. A graph goes to the same addresses at every replay: host
buffers that one has recorded are never given back.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """One tensor in host memory."""

    host: torch.Tensor
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self) -> torch.Tensor:
        """Of the host buffer."""
        storage = self.host.untyped_storage()
        return self.host.new_empty(0, dtype=self.dtype).set_(storage, 0, self.shape, self.stride)

    def empty(self, device: torch.device) -> torch.Tensor:
        """One like it."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


class Stash:
    """Tensors in host memory. Their memory is free again when they were fetched, or forgotten."""

    def __init__(self, lane: Lane, before: Stash | None) -> None:
        self.lane, self.parts = lane, list[Part]()
        self.gone = False
        self._before = None if before is None else weakref.ref(before)
        self._copied: list[torch.Tensor] = []
        """Until the copies are done."""
        self._back: list[torch.Tensor] | None = None
        """On the device, once they were sent for."""

    @property
    def before(self) -> Stash | None:
        """The one that was made before it in the same forward pass, if it is still to be fetched: it is next."""
        return waiting(self._before)

    def put(self, x: torch.Tensor) -> None:
        """Begin to copy x. It comes back with its strides, if they leave no holes."""
        if not _dense(x):
            x = x.contiguous()
        self._copied.append(x)
        self.parts.append(self.lane.send(x))

    def settle(self) -> None:
        self.lane.compute_waits()
        self._copied.clear()

    def send_for(self) -> None:
        if self._back is None and not self.gone:
            self._back = self.lane.send_for(self.parts)

    def fetch(self) -> list[torch.Tensor]:
        """Raises RuntimeError: it was fetched before."""
        if self.gone:
            raise RuntimeError(
                "backward goes a second time through a layer whose input was offloaded, and has been given back; "
                "recompute without offload for that"
            )
        self.send_for()
        self.lane.compute_waits()
        back, self._back = self._back, None
        self.release()  # what is copied there next waits for this copy
        assert back is not None
        return back

    def release(self) -> None:
        if not self.gone:
            self.gone = True
            self.lane.free += [part.host for part in self.parts]
            self.parts.clear()

    def __del__(self) -> None:
        self.release()


def waiting(stash: weakref.ref[Stash] | None) -> Stash | None:
    """The stash, if it is still to be fetched."""
    found = None if stash is None else stash()
    return None if found is None or found.gone else found


class Lane:
    """The copies from and to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: list[torch.Tensor] = []
        """Host buffers with nothing in them."""
        self.coming: list[torch.Tensor] = []
        """What copies go to that the compute stream does not wait for yet: whoever forgets it, it must not be given to
        another meanwhile."""
        self.newest: weakref.ref[Stash] | None = None
        self._recorded: dict[int, torch.Tensor] = {}
        """By address: host buffers that a CUDA graph goes to."""

    def stash(self, *, first: bool) -> Stash:
        """`first` of a forward pass."""
        stash = Stash(self, None if first else waiting(self.newest))
        self.newest = weakref.ref(stash)
        return stash

    def send(self, x: torch.Tensor) -> Part:
        part = Part(self._host_buffer(x.nbytes), x.nbytes, x.dtype, x.shape, x.stride())
        self._copy(part.view(), x, part.host)
        return part

    def send_for(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """Begin to copy them back, into memory that was the compute stream's until now."""
        found = [part.empty(self.device) for part in parts]
        self.coming += found
        for part, back in zip(parts, found, strict=True):
            self._copy(back, part.view(), part.host)
        return found

    def compute_waits(self) -> None:
        """The compute stream, for all copies so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.coming.clear()

    def _copy(self, to: torch.Tensor, source: torch.Tensor, host: torch.Tensor) -> None:
        if self.stream is None:
            to.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        if torch.cuda.is_current_stream_capturing():
            self._recorded[host.data_ptr()] = host

    def _host_buffer(self, nbytes: int) -> torch.Tensor:
        """The smallest that is large enough; else a new one in the place of the largest."""
        if self.free:
            large = [buffer for buffer in self.free if buffer.numel() >= nbytes]
            found = min(large, key=torch.numel) if large else max(self.free, key=torch.numel)
            self.free = [buffer for buffer in self.free if buffer is not found]
            if large:
                return found
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.stream is not None)


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

    def newest(self, device: torch.device) -> Stash | None:
        """The last that was made of that device's, if it is still to be fetched."""
        lane = self.by_device.get(device)
        return None if lane is None else waiting(lane.newest)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Lanes, ()  # a copied model's are its own
