"""Tokens per second, from the GPU's ceilings.

A micro-batch takes the longer of two times: the GPU's, for its products at a share of the measured matrix-product
ceiling, for what only reads and writes its activations, for dequantizing weights, and waiting for copies between host
and GPU memory; and the host's, which hands over the kernels of one layer after the other, unless it is recorded.
Copies of a layer's forward have to be hidden behind that forward, and those of its backward behind the backward of a
layer, which for fastlora's begins once that layer is computed again. The constants come from the committed reports, a
test holding them to those, and from measurements on an H200 (docs/plan.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastlora.plan.gpus import Gpu
from fastlora.plan.setup import Setup
from fastlora.plan.shape import Linear, Shape
from fastlora.plan.stored import streamed_bytes
from fastlora.plan.working import (
    MLP,
    again_layers,
    attention_layers,
    copied,
    dense_among,
    dense_weights,
    dequantized_kept,
    input_bytes,
    keeps_projections,
)

_EFFICIENCY = {"peft": 0.635, "liger": 0.665, "unsloth": 0.88}
_WITH_KERNELS = 0.985
"""Share of the ceiling that products reach: unsloth's at 8B (H100), liger's at Qwen2.5 7B. With fastlora's kernels
unsloth's GPU time was 0.92 (1B) and 0.91 (8B) of that with its own. PEFT alone has never been bound by the GPU where it
was measured, so its is a guess under liger's."""

_READ_BYTES = {"peft": 262, "liger": 150, "unsloth": 150}
"""Norms, rotary embeddings, activations and residuals: what they read and write for one number of the hidden states in
one pass over a layer, of which backward takes two. By what 1B (with h = 2048) takes longer than its products at 8B's
share of the ceiling; peft's are transformers' own, without fusion."""

_WEIGHT_BYTES = 2.52
_DEQUANTIZING, _WITH_FOLD = 0.66, 0.33
"""Of one NF4 weight, read and written in 16 bits; and at what share of the memory's speed: three passes over 6 layers
of 8B take 3.0 ms with unsloth's kernel and 6.35 with ours, which folds the adapter in (H200; it is faster since then,
and 8B's steps take 2 to 3 % less than predicted)."""

_HOST_MS = {"peft": 19.6, "liger": 18.8, "unsloth": 12.6}
_HOST_MS_UNSLOTH_WITH_KERNELS = 18.2
"""Of a layer, forward, computed again and backward: means of 1B, 7B and 8B (H100 machines), and of 6 layers of 8B
(H200). Hosts differ much: another H200's took 8.7 for unsloth."""
_WITHOUT_RECOMPUTING = 0.83
"""Of that: 1B with unsloth, 35,672 against 29,461 tokens/s."""


_LEAST_LAYER_S = 0.25e-3
"""Of one layer, forward and backward: some 100 kernels (1B: 1,642 in 16 layers), of which none takes less than 2.5 us
with what lies between two in a CUDA graph."""


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
    back."""
    whole, attention = _again_flops(shape, setup)
    forward = shape.layers * _layer_flops(shape, setup) + 2.0 * setup.tokens * shape.head.weights
    backward = forward + shape.layers * _attention_flops(shape, setup)
    backward += again_layers(shape, setup) * whole + attention_layers(setup) * attention
    return forward, backward


def dequantized(shape: Shape, setup: Setup) -> tuple[float, float]:
    """Weights that a forward dequantizes, and a backward with what it computes again: each product its own, however
    many tokens it has, but for those that stay from the repetition (memory.keep_dequantized). Those of dense_layers are
    made once a step, of which a micro-batch's forward has its part."""
    if setup.quantization != "nf4":
        return 0.0, 0.0
    layers = float(shape.layers * sum(one.weights for one in shape.linears))
    dense = float(setup.dense_layers * dense_weights(shape, setup))
    forward, backward = layers - dense + dense / setup.accumulation, layers - dense
    counts = again_layers(shape, setup), attention_layers(setup)
    modes = zip(
        counts, dense_among(setup), _again_products(shape, setup), dequantized_kept(shape, setup), strict=True
    )  # fmt: skip
    for count, of_dense, products, stay in modes:
        ours = sum(one.weights for one in products if setup.adapted(one))
        backward += count * (sum(one.weights for one in products) - stay)
        backward -= of_dense * (ours - stay)
    return forward, backward


def _attention_flops(shape: Shape, setup: Setup) -> float:
    return 2.0 * shape.query * setup.row_tokens * setup.tokens


def _layer_flops(shape: Shape, setup: Setup) -> float:
    """Of one layer's forward."""
    products = 2.0 * setup.tokens * sum(one.weights for one in shape.linears)
    return products + _attention_flops(shape, setup)


def _again_products(shape: Shape, setup: Setup) -> tuple[list[Linear], list[Linear]]:
    """Those that the backward of a layer makes again: of one whose input alone is kept, and of one that keeps its
    attention, which is gate and up where fastlora's kernels run the projections, else all products. fastlora's
    checkpointing leaves out the product of down_proj where fastlora's kernel runs it: nothing needs it again, but for a
    norm behind it. Where unsloth compiles the layer, it is made."""
    unused = setup.recomputed_by_us and shape.layer_norms == 2
    whole = [one for one in shape.linears if not (unused and one.name == "down_proj")]
    kept = keeps_projections(setup)
    return whole, [one for one in whole if not kept or one.name in MLP]


def _again_flops(shape: Shape, setup: Setup) -> tuple[float, float]:
    """Of what a layer computes again, likewise: of one whose input alone is kept with attention itself."""
    whole, attention = (
        2.0 * setup.tokens * sum(one.weights for one in products)
        for products in _again_products(shape, setup)
    )
    return whole + _attention_flops(shape, setup), attention


def speed(shape: Shape, setup: Setup, gpu: Gpu) -> Speed:
    forward, backward = flops(shape, setup)
    share = _WITH_KERNELS if setup.kernels else _EFFICIENCY[setup.engine]
    rate = gpu.tflops * 1e12 * share
    pass_s = setup.tokens * shape.hidden * _READ_BYTES[setup.engine] / (gpu.gb_s * 1e9)
    dequantizing = _WITH_FOLD if setup.kernels else _DEQUANTIZING
    weight_s = _WEIGHT_BYTES / (dequantizing * gpu.gb_s * 1e9)
    weights, weights_back = dequantized(shape, setup)
    passes = 2 * shape.layers + again_layers(shape, setup) + attention_layers(setup)
    forward_s = forward / rate + shape.layers * pass_s + weights * weight_s
    backward_s = backward / rate + passes * pass_s + weights_back * weight_s
    # Weights come once for the forward and once for the backward; what is kept goes out, and comes back. Both
    # directions go at once.
    weights_s = streamed_bytes(shape, setup) / (gpu.host_gb_s * 1e9)
    layer_s = _layer_flops(shape, setup) / rate + pass_s
    back_s = waits_out_s = waits_back_s = 0.0
    for one, again in zip(copied(shape, setup), _again_flops(shape, setup), strict=True):
        copy_s = one.bytes / (gpu.host_gb_s * 1e9)
        back_s += one.layers * copy_s
        waits_out_s += one.layers * max(0.0, copy_s - layer_s)
        behind_s = 2 * _layer_flops(shape, setup) / rate + 2 * pass_s
        if setup.policy == "unsloth":
            behind_s += again / rate + pass_s
        waits_back_s += one.layers * max(0.0, copy_s - behind_s)
    waits_s = max(weights_s - forward_s, waits_out_s)
    waits_s += max(weights_s + back_s - backward_s, waits_back_s)
    # The lookup of an embedding in host memory is a kernel of the GPU that reads over the bus.
    rows_s = setup.host_embedding * input_bytes(shape, setup) / (gpu.host_gb_s * 1e9)
    gpu_s = max(rows_s + forward_s + backward_s, shape.layers * _LEAST_LAYER_S)
    host_s = _host_s(shape, setup)
    bound = "host" if host_s > gpu_s + waits_s else "copies" if waits_s else "GPU"
    return Speed(setup.tokens / max(gpu_s + waits_s, host_s), bound, gpu_s, waits_s, host_s)


def _host_s(shape: Shape, setup: Setup) -> float:
    if setup.graphs:
        return 0.0
    own = setup.engine == "unsloth" and setup.kernels
    layer_ms = _HOST_MS_UNSLOTH_WITH_KERNELS if own else _HOST_MS[setup.engine]
    again = again_layers(shape, setup) / shape.layers
    attention = attention_layers(setup) / shape.layers
    share = again + (1 - again) * _WITHOUT_RECOMPUTING + attention * (1 - _WITHOUT_RECOMPUTING) / 2
    return shape.layers * layer_ms * share / 1e3
