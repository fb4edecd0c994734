"""CUDA graphs: what a function does on the GPU, recorded once for each shape of its inputs and replayed.

    graphs = Graphs(CudaRecorder(), parameters)
    loss = graphs(forward_and_backward, inputs)

A replay is one launch, where a layer's forward and backward otherwise take 10 to 20 ms of Python and of launches. It
does on the same memory what was done when it was recorded, whatever Python would do by now. So the function

- takes all that changes as tensors, and reads no other tensor that may be another one next time;
- never waits for the GPU (a tensor's value in an `if`, a number of labels), and takes no random number of the host;
- adds to gradients that stay where they are: they are set to zero in place, never to None.

As PyTorch demands ("CUDA semantics", CUDA Graphs; torch.cuda.make_graphed_callables does likewise): a shape's first
calls run as usual, on the stream that it is recorded on, so that kernels are compiled, libraries have their workspace
and gradients their memory; recording does not compute, so it is replayed at once. All graphs share their memory, since
no two of them ever run at the same time: it holds what the largest needs, and nothing else can use it meanwhile.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.utils import import_utils

from fastlora.engines.memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastlora_kernels import DenseWeights

    Inputs = Mapping[str, torch.Tensor]
    Function = Callable[[Inputs], torch.Tensor]

MOST = 8
"""Shapes that are recorded. Others run as usual."""
WARM_UPS = 2
"""Calls of a shape before it is recorded; one that comes no more often never is."""


def can_record() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None


class Recorder(Protocol):
    """The part that needs a GPU."""

    def warm_up(
        self, function: Function, inputs: Inputs, *, last: bool
    ) -> tuple[torch.Tensor, str]:
        """function(inputs), computed now, and why to record it would not work: "" if nothing speaks against it. `last`:
        it is recorded next, so that by now it does nothing that it does once only."""

    def record(self, function: Function, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """What does function(inputs) again on what `inputs` hold by then, and gives the same tensor each time.
        Nothing is computed now. Raises what the function raises."""

    def forget(self) -> None:
        """Give back what all records share. None of them is used any more once they have come to their end."""


class Graphs:
    """Calls a function on tensors; as a replay, where it was recorded for their shapes.

    `parameters`: whose gradients the function adds to. `weights`: what is dequantized once for all calls between two
    of `stepped`, which then has to be called; it holds for what is recorded, and its warm-ups.
    """

    def __init__(
        self,
        recorder: Recorder,
        parameters: Iterable[torch.nn.Parameter],
        *,
        weights: DenseWeights | None = None,
        most: int = MOST,
        warm_ups: int = WARM_UPS,
    ) -> None:
        self.recorder, self.most, self.warm_ups = recorder, most, warm_ups
        self.weights = weights
        self.parameters = list(parameters)
        self.why_not = ""
        """Why nothing is recorded any more, for the user."""
        self.calls = self.replays = 0
        self._seen: Counter[Hashable] = Counter()
        self._records: dict[Hashable, _Record] = {}
        self._begun = 0
        """Records since the last `drop`, the one that ran out of memory among them."""
        self._gradients: list[torch.Tensor | None] = []
        self._stepped = False

    def stepped(self) -> None:
        """The optimizer has changed the parameters."""
        self._stepped = True

    @property
    def recorded(self) -> int:
        return len(self._records)

    def __call__(self, function: Function, inputs: Inputs, baked: Hashable = None) -> torch.Tensor:
        """function(inputs), which is a number. `baked`: what of the function is not in the inputs and can be another
        in another call; it is recorded for each.

        Raises what the function raises; where that is for want of memory, the caller makes room with `drop`.
        """
        self.calls += 1
        if self.why_not:
            return function(inputs)
        shapes = ((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items()))
        key = (baked, *shapes)
        if self._records and not self._gradients_stayed():
            self.drop()
        if self._stepped and self.weights is not None:
            self.weights.refresh()
        self._stepped = False
        if key not in self._records:
            if self.recorded >= self.most:
                return function(inputs)
            if self._seen[key] < self.warm_ups:
                return self._warm_up(key, function, inputs)
            self._record(key, function, inputs)
            if self.why_not:
                return function(inputs)
        self.replays += 1
        return self._records[key](inputs)

    def drop(self) -> int:
        """Forget every graph; shapes are recorded again once they have come often enough. How many there were, with one
        that ran out of memory while it was recorded."""
        dropped, self._begun = self._begun, 0
        if dropped or self.weights:
            self.recorder.forget()
        if self.weights is not None:
            self.weights.forget()
        self._records.clear()
        self._seen.clear()
        self._gradients = []
        return dropped

    def stop(self, why: str) -> None:
        """Record nothing any more."""
        self.drop()
        self.why_not = why

    def _warm_up(self, key: Hashable, function: Function, inputs: Inputs) -> torch.Tensor:
        self._seen[key] += 1
        last = self._seen[key] == self.warm_ups
        loss, why_not = self.recorder.warm_up(self._dense(function), inputs, last=last)
        if why_not:
            self.stop(why_not)
        return loss

    def _record(self, key: Hashable, function: Function, inputs: Inputs) -> None:
        self._begun += 1
        before = [parameter.grad for parameter in self.parameters]
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        try:
            replay = self.recorder.record(self._dense(function), static)
        except Exception as error:
            self._restore(before)
            if is_out_of_memory(error):
                raise
            self.stop(_said(error))
            return
        if not all(p.grad is g for p, g in zip(self.parameters, before, strict=True)):
            # It would lie in the graphs' memory, and none of the warm-ups has seen this parameter.
            self._restore(before)
            self.stop("a parameter has its first gradient only while the step is recorded")
            return
        self._gradients = before
        self._records[key] = _Record(static, replay)

    def _dense(self, function: Function) -> Function:
        if (weights := self.weights) is None:
            return function

        def with_them(inputs: Inputs) -> torch.Tensor:
            with weights.used():
                return function(inputs)

        return with_them

    def _restore(self, gradients: list[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def _gradients_stayed(self) -> bool:
        """Whether they are the tensors that graphs add to. Who sets one to None does so to all: one is looked at."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if gradient is not None:
                return parameter.grad is gradient
        return True


class _Record:
    def __init__(self, static: dict[str, torch.Tensor], replay: Callable[[], torch.Tensor]) -> None:
        self.static, self.replay = static, replay

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        for name, tensor in inputs.items():
            self.static[name].copy_(tensor, non_blocking=True)
        return self.replay().clone()


class CudaRecorder:
    """On this process's current GPU."""

    def __init__(self) -> None:
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def warm_up(
        self, function: Function, inputs: Inputs, *, last: bool
    ) -> tuple[torch.Tensor, str]:
        here = torch.cuda.current_stream()
        if self._pool is None:
            # cuBLAS has 32 MiB for each stream and thread that it has worked on, and does no more on this one but for
            # evaluations. Graphs keep those of theirs.
            torch._C._cuda_clearCublasWorkspaces()
        self._stream.wait_stream(here)
        # Found here and not by a capture that fails: that leaves PyTorch's allocator and random generator in it.
        watched: AbstractContextManager[list[str]] = waits() if last else nullcontext([])
        with torch.cuda.stream(self._stream), watched as found:
            loss = function(inputs)
        here.wait_stream(self._stream)
        return loss, f"it waits for the GPU ({', '.join(dict.fromkeys(found))})" if found else ""

    def record(self, function: Function, inputs: Inputs) -> Callable[[], torch.Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        loss: torch.Tensor | None = None
        failed: Exception | None = None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    loss = function(inputs)
                except Exception as error:
                    failed = error  # the end of the capture would only say that it is broken
        except Exception as error:
            failed = failed or error
        finally:
            # A capture that does not end well leaves its own the current one.
            torch.cuda.set_stream(here)
        if failed is not None:
            raise failed
        assert loss is not None
        kept = loss

        def replay() -> torch.Tensor:
            graph.replay()
            return kept

        return replay

    def forget(self) -> None:
        # The last replay may still run.
        torch.cuda.synchronize()
        self._pool = None


@contextmanager
def waits() -> Iterator[list[str]]:
    """Where in Python the host waits for the GPU within it, as PyTorch sees it: "file:line", filled at its end.

    Within it transformers makes masks as while a graph is recorded, into some of which it does not look then.
    """
    before = torch.cuda.get_sync_debug_mode()
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught, as_recorded():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        place, said = Path(warning.filename), str(warning.message)
        if "called a synchronizing CUDA operation" in said:
            found.append(_place(place, warning.lineno))
        elif "Synchronization debug mode" not in said:  # that it is a prototype
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


@contextmanager
def as_recorded() -> Iterator[None]:
    """Within it transformers takes every stream for one that is recorded."""
    asked = import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = lambda: True
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = asked


def _said(error: Exception) -> str:
    """Its first line, and the line of Python that raised it."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    said = f"{type(error).__name__}: {line}" if line else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{said}, {_place(Path(frames[-1].filename), frames[-1].lineno)}" if frames else said


def _place(file: Path, line: int | None) -> str:
    return f"{file.parent.name}/{file.name}:{line}"
