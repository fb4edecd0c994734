"""What every kind of layer asks before our op may stand in for a forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: what offloading and sharding leave behind."""
    state = vars(module)  # a module looks its attributes up slowly
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def own(module: Any, name: str) -> Any:
    """A parameter of its own, or None where it is left out (a bias), in a fifth of the time of module.name."""
    return module._parameters[name]


def never(layer: Any, detached: Mapping[type, type], bases: Mapping[type, type]) -> str | None:
    """Why a LoRA layer cannot be served whatever its state; None if it can. `detached`: our class -> PEFT's;
    `bases`: PEFT's class -> the one base layer that is served under it."""
    base = bases.get(detached.get(type(layer), type(layer)))
    if base is None:
        return f"layer is a {type(layer).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if type(layer.base_layer) is not base:
        return f"base layer is a {type(layer.base_layer).__name__}"
    return None


def active_adapters(layer: Any, of: Mapping[str, Any]) -> list[str] | str:
    """The one adapter that is active and has a matrix in `of`, in a list; else why PEFT must serve the layer."""
    if layer.disable_adapters:
        return "adapter disabled"
    if layer.merged:
        return "adapter merged"
    adapters = [name for name in layer.active_adapters if name in of]
    return adapters if len(adapters) == 1 else f"{len(adapters)} active adapters"
