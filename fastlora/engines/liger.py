"""The liger engine: peft with Liger's kernels (norms, rotary, SwiGLU, loss). A peer for `fastlora bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlora.engines.base import Announce
from fastlora.engines.peft import PeftEngine
from fastlora.errors import EngineError
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    from peft import PeftModel


class LigerEngine(PeftEngine):
    name = "liger"

    def load(self, recipe: Recipe, announce: Announce) -> PeftModel:
        """Raises EngineError: liger-kernel is not installed, or would leave this architecture as it is,
        which it says nowhere but in its log."""
        from transformers import AutoConfig

        self.auto_model()
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        model = recipe.model
        config = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise EngineError(
                f"liger has no kernels for {config.model_type}: this arm would be peft alone"
            )
        return super().load(recipe, announce)

    def auto_model(self) -> Any:
        try:
            from liger_kernel.transformers import AutoLigerKernelForCausalLM
        except ImportError as error:
            raise EngineError(
                f"liger cannot be imported ({error}); pip install 'fastlora[bench]'"
            ) from error
        return AutoLigerKernelForCausalLM
