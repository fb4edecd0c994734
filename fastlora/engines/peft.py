"""The peft engine: transformers, PEFT and bitsandbytes; on a CPU as well."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastlora.engines.base import (
    Announce,
    Capabilities,
    new_position_ids,
    not_loadable,
    prefer_expandable_segments,
    resolve_dtype,
    where_they_end,
)
from fastlora.errors import EngineError
from fastlora.recipe.schema import ModelSection, Recipe

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class PeftEngine:
    name = "peft"
    capabilities = Capabilities(needs_cuda=False, checkpointing=("full", "offload", "none"))
    longest_packed = 0

    def prepare(self) -> None:
        # Imported on a CPU with AVX512, bitsandbytes warns of an optional kernel that nobody has installed.
        logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
            lambda record: "gemm_4bit_forward" not in str(record.msg)
        )
        # And of every int8 product in another type than float16: a line for each layer and token.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(
            lambda record: "inputs will be cast" not in str(record.msg)
        )
        # And PEFT of its own merge, which gives an adapter on one of two tied layers to both; fastlora's parts them.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        prefer_expandable_segments()
        import peft  # noqa: F401  (nothing is patched: this only moves the cost of the import here)
        from transformers.utils import logging as transformers_logging

        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()  # in a log file each of its states is a line

    def auto_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def load_base(self, model: ModelSection) -> PreTrainedModel:
        """The base alone, quantized as the recipe says. Raises EngineError: it cannot be found, or is not whole."""
        import torch
        from safetensors import SafetensorError
        from transformers import BitsAndBytesConfig

        dtype = resolve_dtype(model)
        quantization = {
            "none": None,
            "int8": BitsAndBytesConfig(load_in_8bit=True),
            "nf4": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
        }[model.quantization]
        try:
            base, told = self.auto_model().from_pretrained(
                model.name,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                dtype=dtype,
                quantization_config=quantization,
                device_map={"": 0} if torch.cuda.is_available() else {"": "cpu"},
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise EngineError(not_loadable(model.name, error)) from error
        if missing := sorted(told["missing_keys"]):
            # transformers draws them at random and goes on.
            raise EngineError(
                f"model.name: {model.name} lacks {len(missing)} weights, such as {missing[0]}; copy or download "
                "it again"
            )
        if model.quantization == "nf4" and not torch.cuda.is_available():
            from bitsandbytes.nn import Linear4bit

            # At a first answer bitsandbytes 0.50 packs them for a kernel of the CPU's, where it has AVX-512 for
            # bfloat16, through which later steps of training get no gradient.
            for module in base.modules():
                if isinstance(module, Linear4bit):
                    module.support_avx512bf16_for_cpu = False
        return base

    def load(self, recipe: Recipe, announce: Announce) -> PeftModel:
        from peft import LoraConfig, get_peft_model
        from transformers import set_seed

        base = self.load_base(recipe.model)
        base.config.use_cache = False  # with one, transformers does not keep packed rows apart
        set_seed(recipe.train.seed)
        lora = recipe.lora
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            bias=lora.bias,
        )
        try:
            model = get_peft_model(base, config, autocast_adapter_dtype=True)
        except ValueError as error:  # PEFT: target modules not found
            raise EngineError(f"lora.target_modules: {error}") from error
        # With an adapter on one of the two, PEFT saves the frozen embedding and output layer beside it: 2 GB at 8B.
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
        return model

    def packed_inputs(self, seq_lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        # transformers reads the row boundaries off the positions when no attention mask is given.
        return {
            "position_ids": new_position_ids(seq_lengths),
            **where_they_end(seq_lengths, self.longest_packed),
        }

    @contextmanager
    def generating(self, model: PeftModel) -> Iterator[None]:
        was_training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)

    def layers_are_recomputed(self, model: PeftModel) -> None:
        """Nothing: nobody else sets it."""

    def drop_broken_step(self) -> None:
        """Nothing: the graph holds it all."""
