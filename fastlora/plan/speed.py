"""Tokens per second, from the GPU's ceilings.

A micro-batch takes the longer of two times: the GPU's, its FLOPs at a share of the measured matrix-product ceiling; and
the host's, which hands over the kernels of one layer after the other. The constants come from the committed
reports, and a test holds them to those.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastlora.plan.gpus import Gpu
from fastlora.plan.setup import Setup
from fastlora.plan.shape import Shape

EFFICIENCY = {"peft": 0.46, "liger": 0.5, "unsloth": 0.594}
"""Share of the ceiling with what is recomputed: unsloth's at 8B; liger's at Qwen2.5 7B. peft has never been bound by
the GPU where it was measured (0.40 at most), so its is a guess under liger's."""

HOST_MS = {"peft": 19.6, "liger": 18.8, "unsloth": 12.6}
"""Of a layer, forward, computed again and backward (H100 machines): means of 1B, 7B and 8B. Hosts differ much: the
H200's took 8.7 for unsloth."""
_WITHOUT_RECOMPUTING = 0.83
"""Of that: 1B with unsloth, 35,672 against 29,461 tokens/s."""


@dataclass(frozen=True, slots=True)
class Speed:
    tokens_per_s: float
    bound_by: str
    """GPU or host: which of the two takes longer."""
    gpu_s: float
    host_s: float

    def seconds(self, tokens: float) -> float:
        return tokens / self.tokens_per_s


def flops(shape: Shape, setup: Setup) -> float:
    """Of a micro-batch's forward and backward to the inputs: 4 per frozen weight and token (6 in layers that are
    computed again), head included; attention over the causal half of the square, 2 row² width forward, twice back."""
    body = shape.layers * sum(one.weights for one in shape.linears)
    again = setup.policy != "none"
    products = setup.tokens * ((6 if again else 4) * body + 4 * shape.head.weights)
    attention = 2.0 * shape.query * shape.layers * setup.row_tokens * setup.tokens
    return products + attention * (4 if again else 3)


def speed(shape: Shape, setup: Setup, gpu: Gpu) -> Speed:
    gpu_s = flops(shape, setup) / (gpu.tflops * 1e12 * EFFICIENCY[setup.engine])
    share = 1.0 if setup.policy != "none" else _WITHOUT_RECOMPUTING
    host_s = shape.layers * HOST_MS[setup.engine] * share / 1e3
    bound = "GPU" if gpu_s >= host_s else "host"
    return Speed(setup.tokens / max(gpu_s, host_s), bound, gpu_s, host_s)
