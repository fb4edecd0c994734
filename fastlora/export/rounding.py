"""Is every weight that was written base + adapter, rounded once? Read back and held to what the type may cost.

Logits cannot tell: a layer with its rows in the wrong order moved those of the tiny model by less than half of what
its adapter does. Weights can, to the single one in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from fastlora.export.plan import Part, Plan

if TYPE_CHECKING:
    import torch

# RMS of a row's error over RMS of the row. Gaussian rows: Q8_0 0.005, Q6_K 0.018, Q4_K 0.073; heavy tails (Student's t
# with 3 degrees) 0.009, 0.026 and 0.095. A row in the wrong place errs by 1.4, a doubled adapter by its own size.
_OF_A_ROW = {"Q8_0": 0.03, "Q6_K": 0.1, "Q4_K": 0.3}
_OF_A_WEIGHT = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-22}
_SMALLEST = {"BF16": 1e-38, "F16": 2.0**-25, "F32": 1e-30}


def wrong_weights(
    plan: Plan, written: Iterable[tuple[Part, str, Callable[[], Iterator[torch.Tensor]]]]
) -> list[str]:
    """One line if any tensor is off by more than rounding. `written`: of each the part of the plan, the type in the
    file, and its rows in the blocks that `plan.blocks` gives."""
    found = []
    for part, kind, blocks in written:
        excess = max(
            (
                _excess(got, want, kind)
                for got, want in zip(blocks(), plan.blocks(part), strict=True)
            ),
            default=0.0,
        )
        if not excess <= 1:
            found.append((excess, part.name))
    if not found:
        return []
    worst, name = max(found)
    return [
        f"{len(found)} tensors are not base + adapter, the worst {name}, off by {worst:.3g} times what rounding "
        "may cost"
    ]


def _excess(got: torch.Tensor, want: torch.Tensor, kind: str) -> float:
    """The largest error over the allowed one."""
    got, want = got.float().cpu(), want.float()
    if kind in _OF_A_WEIGHT:
        # Half a step of the type; and of float32, in which the product was summed, a few.
        allowed = want.abs() * (_OF_A_WEIGHT[kind] * 1.01) + _SMALLEST[kind]
        allowed = allowed + want.abs().max() * 2.0**-20
        return float(((got - want).abs() / allowed).max())
    size = want.square().mean(-1).sqrt()
    # A row far below its tensor is below what the float16 scales of the type can hold.
    allowed = size * _OF_A_ROW[kind] + size.max() * 1e-3 + 1e-7
    return float(((got - want).square().mean(-1).sqrt() / allowed).max())
