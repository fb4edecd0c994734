"""bitsandbytes' quantized layers and PEFT's layers on them, where bitsandbytes is installed; else classes that no
layer has."""

from __future__ import annotations

from typing import Any

try:
    from bitsandbytes.nn import Int8Params as _Int8Params
    from bitsandbytes.nn import Linear4bit as _BaseLinear4bit
    from bitsandbytes.nn import Linear8bitLt as _BaseLinear8bit
    from bitsandbytes.nn import Params4bit as _Params4bit
    from peft.tuners.lora.bnb import Linear4bit as _Linear4bit
    from peft.tuners.lora.bnb import Linear8bitLt as _Linear8bit
except ImportError:

    class _BaseLinear4bit: ...  # type: ignore[no-redef]

    class _BaseLinear8bit: ...  # type: ignore[no-redef]

    class _Params4bit: ...  # type: ignore[no-redef]

    class _Int8Params: ...  # type: ignore[no-redef]

    class _Linear4bit: ...  # type: ignore[no-redef]

    class _Linear8bit: ...  # type: ignore[no-redef]


BaseLinear4bit: Any = _BaseLinear4bit
BaseLinear8bit: Any = _BaseLinear8bit
Params4bit: Any = _Params4bit
Int8Params: Any = _Int8Params
Linear4bit: Any = _Linear4bit
Linear8bit: Any = _Linear8bit
