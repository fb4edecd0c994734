"""What stays in memory all the time, in bytes: exact, and held to real tensors by the tests."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from fastlora.plan.setup import Setup
from fastlora.plan.shape import Linear, Shape

_NF4_BLOCK = 64
_NESTED_BLOCK = 256
_STATE_BLOCK = 256
_SMALLEST_8BIT_STATE = 4096
_SMALLEST_PAGED_STATE = 100_000


def nf4_bytes(weights: int) -> int:
    """A matrix as bitsandbytes stores it with double quantization: half a byte a weight; a byte of absmax for 64
    weights; 4 bytes for 256 of those; and per matrix the two tables (16 and 256 float32) and an offset."""
    blocks = ceil(weights / _NF4_BLOCK)
    return ceil(weights / 2) + blocks + 4 * ceil(blocks / _NESTED_BLOCK) + 4 * (16 + 256 + 1)


def int8_bytes(linear: Linear) -> int:
    """LLM.int8(): a byte a weight and a float32 scale a row."""
    return linear.weights + 4 * linear.outputs


def linear_bytes(linear: Linear, setup: Setup) -> int:
    """A frozen linear layer; its bias stays in the compute type."""
    size = {
        "nf4": nf4_bytes(linear.weights),
        "int8": int8_bytes(linear),
        "none": setup.item * linear.weights,
    }[setup.quantization]
    return size + setup.item * linear.outputs * linear.bias


def layer_bytes(shape: Shape, setup: Setup) -> int:
    """The linear layers of one decoder layer."""
    return sum(linear_bytes(one, setup) for one in shape.linears)


_STREAM_SLOTS = 3
"""Layers on the GPU at once of those whose weights are in host memory: one in use and two on their way (unsloth's
default)."""


def _codes_bytes(shape: Shape, setup: Setup) -> int:
    """Of a layer, what is streamed: its parameters. What bitsandbytes scales their codes by is none of them, and stays
    on the GPU: 13 MiB a layer of 70B, 0.8 GiB of 63."""
    if setup.quantization != "nf4":
        return layer_bytes(shape, setup)
    return sum(ceil(one.weights / 2) + setup.item * one.outputs * one.bias for one in shape.linears)


def streamed_bytes(shape: Shape, setup: Setup) -> int:
    """Frozen weights in host memory."""
    return setup.stream_layers * _codes_bytes(shape, setup)


def resident_bytes(shape: Shape, setup: Setup) -> int:
    """Frozen weights on the GPU, slots for the others among them."""
    slots = min(_STREAM_SLOTS, setup.stream_layers)
    away = (setup.stream_layers - slots) * _codes_bytes(shape, setup)
    return shape.layers * layer_bytes(shape, setup) - away


def rest_bytes(shape: Shape, setup: Setup) -> int:
    """What is never quantized, on the GPU: embedding, output layer (one of them where they are tied) and norms."""
    embeddings = shape.embedding.weights * (1 if shape.tied or setup.host_embedding else 2)
    return setup.item * (embeddings + shape.layers * shape.norms + shape.hidden)


def host_embedding_bytes(shape: Shape, setup: Setup) -> int:
    """In host memory."""
    return setup.item * shape.embedding.weights if setup.host_embedding else 0


def adapter_tensors(shape: Shape, setup: Setup) -> list[int]:
    """Elements of every trained tensor: A (rank x inputs) and B (outputs x rank) of every adapted layer, the
    magnitudes of DoRA, and biases if they are trained."""
    layer: list[int] = []
    for linear in shape.linears:
        if setup.adapted(linear):
            layer += [setup.rank * linear.inputs, setup.rank * linear.outputs]
            layer += [linear.outputs] * setup.dora
        if setup.train_biases and linear.bias:
            layer.append(linear.outputs)
    outside = [
        setup.rank * size
        for one in (shape.embedding, shape.head)
        if setup.adapted(one)
        for size in (one.inputs, one.outputs)
    ]
    return layer * shape.layers + outside


def adapter_bytes(shape: Shape, setup: Setup) -> int:
    """float32, whatever the base is in; its gradients take as much."""
    return 4 * sum(adapter_tensors(shape, setup))


def state_bytes(elements: int, optimizer: str) -> int:
    """AdamW's two moments of one tensor. In 8 bits a byte each and a float32 per block of 256; tensors below 4,096
    elements keep float32 ones."""
    if optimizer == "adamw" or elements < _SMALLEST_8BIT_STATE:
        return 8 * elements
    return 2 * elements + 2 * 4 * ceil(elements / _STATE_BLOCK)


def states_bytes(sizes: Iterable[int], optimizer: str, *, paged: bool = False) -> int:
    """Of tensors of so many elements: on the GPU; with `paged` the part in unified memory instead, which the driver
    moves out when it must."""
    unified = optimizer == "paged_adamw_8bit"
    return sum(
        state_bytes(size, optimizer)
        for size in sizes
        if (unified and size >= _SMALLEST_PAGED_STATE) == paged
    )


def optimizer_bytes(shape: Shape, setup: Setup, *, paged: bool = False) -> int:
    """`states_bytes` of the adapter."""
    return states_bytes(adapter_tensors(shape, setup), setup.optimizer, paged=paged)
