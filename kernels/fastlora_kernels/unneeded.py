"""The product that a recomputation need not make: down_proj's, where nothing but the region's end reads it.

What is recomputed is read by backward alone, which takes from a linear layer its input and never its output. So the
last product of a decoder layer, W_down h, is made for nobody, if what comes after it saves nothing made of it: an
addition of the residual does not, a norm does. Which of the two it is, is read from the autograd graph.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

Node = Any
"""Of an autograd graph."""

# Their gradients depend on shapes, types and places, never on what was added, viewed or copied.
VALUE_FREE = frozenset(
    {
        "AddBackward0", "AliasBackward0", "CloneBackward0", "ExpandBackward0", "PermuteBackward0",
        "ReshapeAliasBackward0", "SliceBackward0", "SqueezeBackward1", "ToCopyBackward0", "TransposeBackward0",
        "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
    }
)  # fmt: skip


class Recomputing(threading.local):
    """What the recomputation that runs in this thread says to the MLPs in it, and they to it."""

    inside: bool = False
    """There is one: what is made is for one backward alone, which may write over it."""
    ends_with: Any = None
    """The MLP whose output nobody will read."""
    keeps_dequantized: bool = False
    """Backward, moments later, gets the matrices made of 4-bit weights, instead of making them once more."""
    noted: list[tuple[Any, Node]] | None = None
    """Where a list is asked for: each MLP that ran our op, and the op's node."""

    def note(self, mlp: Any, output: torch.Tensor) -> None:
        if self.noted is not None and output.grad_fn is not None:
            self.noted.append((mlp, output.grad_fn))


recomputing = Recomputing()


def mlp_at_the_end(
    outputs: Sequence[torch.Tensor], noted: Sequence[tuple[Any, Node]]
) -> Any | None:
    """The MLP of `noted` whose output's values no backward from `outputs` reads; None if there is none.

    `outputs`: those of the region that carry a gradient. It must be one, made of the MLP's by value-free nodes alone;
    whatever else is made of the MLP's output, through nodes of another kind, rules it out.
    """
    if len(outputs) != 1 or len({id(mlp) for mlp, _ in noted}) != len(noted):
        return None
    users = _users(outputs[0].grad_fn)
    ends = [mlp for mlp, node in noted if node in users and _read_by_none(node, users)]
    return ends[0] if len(ends) == 1 else None


def _users(root: Node) -> dict[Node, list[Node]]:
    """Every node of the graph under `root`, with those that take its output."""
    users: dict[Node, list[Node]] = defaultdict(list)
    users[root] = []
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        for below, _ in node.next_functions:
            if below is not None:
                users[below].append(node)
                if below not in seen:
                    seen.add(below)
                    waiting.append(below)
    return users


def _read_by_none(node: Node, users: dict[Node, list[Node]]) -> bool:
    waiting = list(users[node])
    while waiting:
        above = waiting.pop()
        if not _value_free(above):
            return False
        waiting += users[above]
    return True


def _value_free(node: Node) -> bool:
    name = node.name()
    if name == "MulBackward0":  # by a number, as Granite's residual_multiplier
        kept = [one for one in (node._saved_self, node._saved_other) if one is not None]
        return all(one.dim() == 0 for one in kept)
    return name in VALUE_FREE
