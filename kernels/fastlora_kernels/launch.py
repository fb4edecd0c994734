"""A launch of a Triton kernel at half the host time.

Triton works out on each launch which compiled kernel fits: types and alignments of all arguments, options, their
text as a key. That takes longer than a small kernel. Here the compiled kernel that it found is kept under a shorter key
of the same facts, and launched itself the next time. Where Triton has no such way, its own is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

Grid = tuple[int, ...]
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_works = torch.version.hip is None
"""On AMD a kernel depends on more than is in the key."""


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up. Triton's own of that name takes longer to call than all else that a launch works out."""
    return -(-numerator // denominator)


def power_of_2(least: int) -> int:
    """The smallest that is not below."""
    return 1 << (least - 1).bit_length()


def launch(
    kernel: Any,
    grid: Grid,
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int | float],
    constants: dict[str, Any],
    **options: int,
) -> None:
    """kernel[grid](*tensors, *numbers, **constants, **options), on the device of the tensors.

    The kernel's arguments must come in this order: tensors, numbers, and what is compiled in.
    """
    global _works
    device = tensors[0].device.index
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, **options)
        return
    places = [tensor.data_ptr() for tensor in tensors]
    key = (
        id(kernel),
        # An address says nothing of where it is: one that a GPU cannot read must not be launched unasked.
        *[tensor.get_device() for tensor in tensors],
        *[tensor.dtype for tensor in tensors],
        *[place & 15 for place in places],
        # What Triton tells apart in an integer: 1, a multiple of 16, 64 bits. A float is a float.
        *[
            number & 15 and (1 if number == 1 else 2) if type(number) is int else None
            for number in numbers
        ],
        *(numbers if max(numbers) >= 2**31 or min(numbers) < -(2**31) else ()),
        *constants.values(),
        *options.values(),
    )
    found = _compiled.get(key) if _works else None
    if found is not None:
        compiled, values = found
        try:
            # Places, not tensors: of those Triton asks the same once more, and the driver whether they are a GPU's.
            compiled[(*grid, 1, 1)[:3]](*places, *numbers, *values)
            return
        except TypeError:  # another version of Triton, with other arguments here
            _works = False
    compiled = kernel[grid](*tensors, *numbers, **constants, **options)
    if _works and hasattr(compiled, "__getitem__"):  # not in Triton's interpreter
        names = [*inspect.signature(kernel.fn).parameters][len(tensors) + len(numbers) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)
