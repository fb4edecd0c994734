"""Predictions for a Llama 8B on an H100, for tests."""

from __future__ import annotations

from typing import Any

from fastlora.plan import gpus
from fastlora.plan.predict import Card, Prediction, predict
from fastlora.plan.shape import shape_of
from fastlora.recipe.schema import Recipe

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
H100 = "NVIDIA H100 80GB HBM3"


def predicted(vram_gib: float | None = 79.2, config: Any = LLAMA_8B, **sections: Any) -> Prediction:
    return predict(recipe(**sections), shape_of(config), card(vram_gib))


def card(vram_gib: float | None, host_gib: float | None = None) -> Card:
    return Card(gpu=gpus.gpu_named(H100), vram_gib=vram_gib, host_gib=host_gib)


def recipe(**sections: Any) -> Recipe:
    given = {"data": {"sources": ["x.jsonl"]}, "output": {"dir": "out"}, **sections}
    return Recipe.model_validate(given | {"model": {"name": "m", **sections.get("model", {})}})
