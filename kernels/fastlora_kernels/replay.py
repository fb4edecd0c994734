"""What a computation finds around it besides its inputs, put back for doing it again: autocast and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

Autocast = list[tuple[str, bool, torch.dtype]]
"""Kind of device, whether it is on there, and to what type."""
Random = list[tuple[torch.Generator, torch.Tensor]]
"""Generators with their states."""


def autocast_now(device: torch.device) -> Autocast:
    return [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in dict.fromkeys((device.type, "cpu"))
    ]


def unlike_now(then: Autocast) -> Iterator[torch.autocast]:
    """Contexts for what is not now as it was then."""
    for kind, on, dtype in then:
        now = torch.is_autocast_enabled(kind)
        if on is not now or (on and dtype != torch.get_autocast_dtype(kind)):
            yield torch.autocast(kind, dtype, enabled=on)


def random_now(device: torch.device, *, draws: bool) -> Random:
    """Of the generators that a layer on `device` may draw from: 1 us each, 7 to compare it later. `draws`: it is known
    to. None while a CUDA graph records, which knows the state at each replay alone.

    Raises RuntimeError: it draws, and a CUDA graph records.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            if draws:
                raise RuntimeError(
                    "a layer that draws random numbers, for dropout, cannot be recomputed in a CUDA graph"
                )
            return []
        generators.append(torch.cuda.default_generators[device.index])
    return [(generator, generator.get_state()) for generator in generators]


def drawn_since(then: Random) -> bool:
    return any(not torch.equal(state, generator.get_state()) for generator, state in then)


@contextmanager
def random_as(then: Random) -> Iterator[None]:
    """Within it the next random numbers are those of `then`; after it, those that would have been next before it."""
    now = [(generator, generator.get_state()) for generator, _ in then]
    try:
        for generator, state in then:
            generator.set_state(state)
        yield
    finally:
        for generator, state in now:
            generator.set_state(state)
