"""An 8-bit weight of bitsandbytes beside a LoRA adapter: its own product forward, the dense matrix backward.

W_nk = q_nk scale_n / 127. LLM.int8(), Dettmers et al. 2022 (arXiv:2208.07339): x is quantized too, row by row, so that
the product forward is not x W^T, and is left to bitsandbytes; its backward takes g W as it stands.
"""

from __future__ import annotations

from typing import Any

import torch


class EightBit:
    """A bitsandbytes Linear8bitLt whose weight is kept in int8 (has_fp16_weights=False)."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def linear(self, x_TK: torch.Tensor) -> torch.Tensor:
        """x W^T + b in x's dtype, x quantized to int8; without gradients."""
        with torch.no_grad():
            y_TN: torch.Tensor = self.layer(x_TK)
        return y_TN

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W, (N, K), in `dtype`. Its scales move to where `linear` left them: call that first."""
        state = self.layer.state
        dense_NK: torch.Tensor = state.CB.to(dtype)
        return dense_NK.mul_(state.SCB[:, None] / 127)
