"""Whether calling a module does more than its class's forward: what offloading and sharding leave behind."""

from __future__ import annotations

from torch import nn


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
