"""A GGUF file as weights and configuration of the transformers model, to be compared with the adapter.

Kept apart from the writer: the names are a table of its own, rows are put back by index, and the configuration
(heads, epsilon, rotation) comes from the file's own description, so that a mistake there shows as well.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import EngineError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class GgufModel:
    """What a GGUF file of a Llama-like model says. Raises EngineError: a tensor without a place in the model."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(path)
        self.architecture = str(self.field("general.architecture"))
        self.tensors: dict[str, Any] = {}
        self.rope_factors: torch.Tensor | None = None
        unknown = []
        for tensor in self._reader.tensors:
            layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
            if tensor.name == "rope_freqs.weight":
                import torch

                self.rope_factors = torch.from_numpy(tensor.data.copy())
            elif tensor.name in _NAMES:
                self.tensors[_NAMES[tensor.name]] = tensor
            elif layer and layer[2] in _IN_LAYER:
                name = f"model.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.{layer[3]}"
                self.tensors[name] = tensor
            else:
                unknown.append(tensor.name)
        if unknown:
            raise EngineError(
                f"{path}: {unknown[0]} has no place in the model ({len(unknown)} such)"
            )

    def field(self, key: str, default: Any = None) -> Any:
        found = self._reader.get_field(key)
        return default if found is None else found.contents()

    def _of_arch(self, key: str, default: Any = None) -> Any:
        return self.field(f"{self.architecture}.{key}", default)

    def empty_model(self, like: PreTrainedModel) -> PreTrainedModel:
        """A model of `like`'s class, on the meta device, of the sizes and the rotation that the file gives."""
        from accelerate import init_empty_weights

        config = copy.deepcopy(like.config)
        config.hidden_size = self._of_arch("embedding_length")
        config.intermediate_size = self._of_arch("feed_forward_length")
        config.num_hidden_layers = self._of_arch("block_count")
        config.num_attention_heads = self._of_arch("attention.head_count")
        config.num_key_value_heads = self._of_arch("attention.head_count_kv")
        config.rms_norm_eps = self._of_arch("attention.layer_norm_rms_epsilon")
        config.max_position_embeddings = self._of_arch("context_length")
        config.head_dim = self._of_arch("attention.key_length") or self._of_arch(
            "rope.dimension_count"
        )
        config.vocab_size = len(self.field("tokenizer.ggml.tokens"))
        rope = {
            "rope_theta": self._of_arch("rope.freq_base"),
            "rope_type": self._of_arch("rope.scaling.type", "default"),
        }
        if rope["rope_type"] != "default":
            rope["factor"] = self._of_arch("rope.scaling.factor")
            original = self._of_arch("rope.scaling.original_context_length")
            if original is not None:
                rope["original_max_position_embeddings"] = original
        config.rope_parameters = rope
        config.tie_word_embeddings = "lm_head.weight" not in self.tensors
        with init_empty_weights():
            model = type(like)._from_config(config, attn_implementation="sdpa")
        if self.rope_factors is not None:
            for module in model.modules():
                if "inv_freq" in module._buffers:
                    module.inv_freq = module.inv_freq / self.rope_factors
        return model.eval()

    def weight(self, name: str) -> torch.Tensor:
        """A parameter by transformers' name, in float32."""
        import torch
        from gguf import quants

        if name == "lm_head.weight" and name not in self.tensors:
            name = "model.embed_tokens.weight"
        tensor = self.tensors.get(name)
        if tensor is None:
            raise EngineError(f"{self._reader.data.filename}: has no tensor for {name}")
        dense = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        found = re.search(r"self_attn\.([qk])_proj\.", name)
        if self.architecture != "llama" or found is None:
            return dense
        heads = self._of_arch(
            "attention.head_count" if found[1] == "q" else "attention.head_count_kv"
        )
        # In the file, rows 2i and 2i + 1 of a head rotate together; in transformers i and i + half.
        size = dense.shape[0] // heads
        within = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
        rows = (torch.arange(heads)[:, None] * size + within).flatten()
        return dense[rows]
