"""LoRA kernels for any PEFT model. Works without fastlora; imports nothing from it.

from fastlora_kernels import attach, detach
print(attach(model))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora_kernels.apply import Attached, attach, detach
    from fastlora_kernels.ops.lora_linear import lora_linear, lora_linears

__all__ = ["Attached", "attach", "detach", "lora_linear", "lora_linears"]


def __getattr__(name: str) -> Any:
    """Found on first use: importing the package alone loads neither torch nor peft."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "ops.lora_linear" if name.startswith("lora_linear") else "apply"
    return getattr(import_module(f"{__name__}.{home}"), name)
