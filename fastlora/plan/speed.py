"""Tokens per second, from the GPU's ceilings.

A micro-batch takes the longest of three times: the GPU's, its FLOPs at a share of the measured matrix-product ceiling;
the host's, which hands over the kernels of one layer after the other; and that of the copies between their memories,
of which those of the forward have to be hidden behind the forward, and those of the backward behind the backward. The
first two's constants come from the committed reports, and a test holds them to those.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastlora.plan.gpus import Gpu
from fastlora.plan.setup import Setup
from fastlora.plan.shape import Shape
from fastlora.plan.stored import streamed_bytes
from fastlora.plan.working import MLP, again_layers, host_inputs_bytes

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
    """GPU, copies or host: what takes longest."""
    gpu_s: float
    waits_s: float
    """Of the GPU, for copies between host and GPU memory that nothing hides."""
    host_s: float

    def seconds(self, tokens: float) -> float:
        return tokens / self.tokens_per_s


def flops(shape: Shape, setup: Setup) -> tuple[float, float]:
    """Of a micro-batch's forward, and of its backward to the inputs with what it computes again: 2 per frozen weight
    and token each and again, head included; attention over the causal half of the square, 2 row² width forward, twice
    back. fastlora's checkpointing leaves out the product of down_proj where fastlora's kernel runs it: nothing needs
    it again, but for a norm behind it.
    """
    layer = sum(one.weights for one in shape.linears)
    again = layer
    mlp = sum(one.weights for one in shape.linears if one.name in MLP)
    if setup.kernels and setup.policy in ("full", "offload"):
        unused = sum(one.weights for one in shape.linears if one.name == "down_proj")
        mlp -= unused
        again -= unused if shape.layer_norms == 2 else 0
    layers = again_layers(shape, setup)
    recomputed = layers * again + setup.keep_attention_layers * mlp
    once = 2.0 * setup.tokens
    forward = once * (shape.layers * layer + shape.head.weights)
    attention = 2.0 * shape.query * setup.row_tokens * setup.tokens
    backward = forward + once * recomputed + attention * (2 * shape.layers + layers)
    return forward + attention * shape.layers, backward


def speed(shape: Shape, setup: Setup, gpu: Gpu) -> Speed:
    forward, backward = flops(shape, setup)
    rate = gpu.tflops * 1e12 * EFFICIENCY[setup.engine]
    gpu_s = (forward + backward) / rate
    again = again_layers(shape, setup) / shape.layers
    attention = setup.keep_attention_layers / shape.layers
    share = again + (1 - again) * _WITHOUT_RECOMPUTING + attention * (1 - _WITHOUT_RECOMPUTING) / 2
    host_s = 0.0 if setup.graphs else shape.layers * HOST_MS[setup.engine] * share / 1e3
    # Weights come once for the forward and once for the backward; an input goes out, and comes back.
    weights_s = streamed_bytes(shape, setup) / (gpu.host_gb_s * 1e9)
    inputs_s = host_inputs_bytes(shape, setup) / (gpu.host_gb_s * 1e9)
    # Both directions go at once.
    waits_s = max(0.0, weights_s - forward / rate, inputs_s - forward / rate)
    waits_s += max(0.0, weights_s + inputs_s - backward / rate)
    bound = "host" if host_s > gpu_s + waits_s else "copies" if waits_s else "GPU"
    return Speed(setup.tokens / max(gpu_s + waits_s, host_s), bound, gpu_s, waits_s, host_s)
