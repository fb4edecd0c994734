"""The liger engine: peft with Liger's kernels (norms, rotary, SwiGLU, loss). A peer for `fastlora bench`."""

from __future__ import annotations

from typing import Any

from fastlora.engines.peft import PeftEngine
from fastlora.errors import EngineError


class LigerEngine(PeftEngine):
    name = "liger"

    def auto_model(self) -> Any:
        """Raises EngineError: liger-kernel is not installed."""
        try:
            from liger_kernel.transformers import AutoLigerKernelForCausalLM
        except ImportError as error:
            raise EngineError(
                f"liger cannot be imported ({error}); pip install 'fastlora[bench]'"
            ) from error
        return AutoLigerKernelForCausalLM
