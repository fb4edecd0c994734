"""Floating-point operations, counted from a loaded model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel


def flops_per_token(model: PeftModel, recomputed: float) -> dict[str, float]:
    """Multiply-adds counted twice. matmul: forward and dX of every frozen linear layer, 4 N, head
    included; attention: forward and backward of a causal row, per squared token; recompute_*: what
    checkpointing does again, which is not the head, in `recomputed` of all layers; of those kept in part, and where
    down_proj is left out, less is done again than is counted here."""
    import torch

    body = head = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            size = module.in_features * module.out_features
            if "lm_head" in name:
                head += size
            else:
                body += size
    config = model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # Q K^T and P V, 2 FLOPs each, half of the square: 2 L^2 width forward, twice that backward.
    forward_attention = 2.0 * width * config.num_hidden_layers
    return {
        "matmul": 4.0 * (body + head),
        "attention": 3 * forward_attention,
        "recompute_matmul": 2.0 * body * recomputed,
        "recompute_attention": forward_attention * recomputed,
    }
