"""Floating-point operations, counted from a loaded model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel


def flops_per_token(model: PeftModel, recomputed: float) -> dict[str, float]:
    """Multiply-adds counted twice. matmul: forward and dX of every frozen linear layer, 4 N, head
    included; attention: forward and backward of a causal row, per squared token; recompute_*: what
    checkpointing does again, which is not the head: what fastlora's recomputation does not leave out, or where it is
    another's, `recomputed` of all layers."""
    sizes = _weights(model)
    head = sum(size for name, size in sizes.items() if "lm_head" in name)
    body = sum(sizes.values()) - head
    again, attention_again = _done_again(model)
    if again is None:
        again, attention_again = body * recomputed, recomputed
    config = model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # Q K^T and P V, 2 FLOPs each, half of the square: 2 L^2 width forward, twice that backward.
    forward_attention = 2.0 * width * config.num_hidden_layers
    return {
        "matmul": 4.0 * (body + head),
        "attention": 3 * forward_attention,
        "recompute_matmul": 2.0 * again,
        "recompute_attention": forward_attention * attention_again,
    }


def _weights(module: Any) -> dict[str, int]:
    """Of every frozen linear layer in `module`, or of itself, by name."""
    import torch

    return {
        name: part.in_features * part.out_features
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear) and "lora_" not in name
    }


def _done_again(model: PeftModel) -> tuple[float | None, float]:
    """(weights of the linear layers that fastlora computes again, share of layers whose attention it does); None if it
    computes none again."""
    from fastlora_kernels.recompute import decoder_layers, spared

    layers = decoder_layers(model)
    found = [(layer, left_out) for layer in layers if (left_out := spared(layer)) is not None]
    if not found:
        return None, 0.0

    def size(module: Any) -> int:
        return sum(_weights(module).values())

    weights = sum(size(layer) - sum(map(size, left_out.linear)) for layer, left_out in found)
    attention = sum(not left_out.attention for _, left_out in found)
    return float(weights), attention / len(layers)
