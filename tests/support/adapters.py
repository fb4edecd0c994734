"""Small random models and adapters of every kind, for the tests of merging and exporting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path, family: str = "Llama", dtype: str = "float32", **config: Any) -> Path:
    """A random model of a family of transformers, in `folder`, in shards if `shard` says how large."""
    import transformers

    shard = config.pop("shard", "5GB")
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**(SIZES | config))
    model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05) if parameter.dim() > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_adapter(base: Path, folder: Path, scale: float = 0.2, **config: Any) -> Path:
    """A random adapter on the model in `base`: every trained tensor moved."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | config
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter) * scale
                parameter.add_(noise.abs() if "magnitude" in name else noise)
    adapted.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()
