"""Gradients that are numbers, and no functions of what they were made of: there is no second derivative of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of an autograd.Function that raises RuntimeError with create_graph=True.

    torch.autograd.function.once_differentiable raises when what it gave is differentiated, if the way there comes by:
    `torch.autograd.grad(loss + penalty, weights)` goes past it, and the share of the penalty would be left out.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a layer that fastlora's kernels serve has no second derivative; "
                "detach(model), and detach_head(model), give PEFT's own forward back"
            )
        return backward(ctx, *gradients)

    return checked
