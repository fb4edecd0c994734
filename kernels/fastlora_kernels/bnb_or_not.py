"""bitsandbytes' 4-bit layer and PEFT's layer on it, where bitsandbytes is installed; else classes that no
layer has."""

from __future__ import annotations

from typing import Any

try:
    from bitsandbytes.nn import Linear4bit as _BaseLinear4bit
    from bitsandbytes.nn import Params4bit as _Params4bit
    from peft.tuners.lora.bnb import Linear4bit as _Linear4bit
except ImportError:

    class _BaseLinear4bit: ...  # type: ignore[no-redef]

    class _Params4bit: ...  # type: ignore[no-redef]

    class _Linear4bit: ...  # type: ignore[no-redef]


BaseLinear4bit: Any = _BaseLinear4bit
Params4bit: Any = _Params4bit
Linear4bit: Any = _Linear4bit
