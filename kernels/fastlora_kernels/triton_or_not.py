"""Triton where it is installed. Without it every module still imports, and dispatch takes the reference."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ModuleNotFoundError:
    triton = tl = None

    def jit(kernel: Any) -> Any:
        return kernel


__all__ = ["jit", "tl", "triton"]
