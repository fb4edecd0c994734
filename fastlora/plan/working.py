"""What comes and goes within a step, in bytes. Counted tensor by tensor from what the engines save and make; the few
constants that cannot be counted stand at the top, with the measurements that they come from.

T tokens of a micro-batch, h hidden, i intermediate, q and k widths of the query and of keys (and values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from fastlora.plan.setup import FUSED, Setup
from fastlora.plan.shape import Linear, Shape

MIB = 2**20
GIB = 2**30

CONTEXT = {"peft": 768 * MIB, "liger": 768 * MIB, "unsloth": 846 * MIB}
"""What the driver counts beside PyTorch's allocator: CUDA context and loaded kernels (Hopper: 0.75 and 0.83 GiB)."""

HOLES, SMALL_HOLES = 0.02, 40 * MIB
"""Reserved beside allocated where no tensor is a great part of all: this share of it, and so much in any case."""

GRAPH_HOLES = 64 * MIB
"""More where micro-batches are recorded: a graph's memory is a pool of its own."""

LOGITS_HOLES = 1.1
"""More where logits are kept whole, in logits of 2 bytes: freed in the forward pass, they leave room that the float32
ones of the backward do not fit into. 0.9 to 1.4 in 12 arms on 4,096 and 8,192 tokens, and 1.9 in one: the allocator's
luck."""

_UNSLOTH_LOGIT = 16
"""Bytes of one logit by which unsloth_zoo 2026.10 sizes its chunks; they aim at half of what is free, at most:"""
_UNSLOTH_CHUNK_TARGET = 4 * GIB


def page_table_bytes(pinned: float) -> float:
    """The GPU's, for bytes of pinned host memory: 8 for each page of 4 KiB. 70B with 49 GiB pinned had 0.09 GiB more
    of context than 8B with none."""
    return 8 * pinned / 4096


def cublas_bytes(hopper: bool) -> int:
    """Workspaces of the forward's and of the backward's thread: 32 MiB each on Hopper and later, else 8.1 MiB."""
    return 2 * (32 * MIB if hopper else 8_519_680)


def fused_by_unsloth(shape: Shape, setup: Setup) -> bool:
    """Whether unsloth's own functions run a layer's LoRA, and so decide what it saves."""
    whole = setup.targets == "all-linear" or {one.name for one in shape.linears} <= set(
        setup.targets
    )
    fused = setup.engine == "unsloth" and not setup.kernels
    return fused and shape.model_type in FUSED and whole and not setup.dora


def layer_saves(shape: Shape, setup: Setup) -> int:
    """What a decoder layer saves for backward, per micro-batch; peft's and fastlora's as a profiler counts it (a test
    repeats that on a CPU), the others' by what their functions save.

    unsloth: x, both norms' outputs, the residual between (4 h); q, k, v; attention's output (q); gate and up (2 i), of
    which backward makes the product again. liger: the same and the product (3 i). peft: the norms' float32 copies of
    their inputs (2 x 2 h), their outputs, and silu(gate) and the product too (4 i); on a base that is not quantized
    PEFT gives every adapter a copy of its input (3 h and q more). With fastlora's kernels neither, nor product (2 i).
    Gemma's norms behind attention and MLP save their inputs as well, and so do norms on q and k. Where q, k and v are
    one product, v is a view that keeps all of it, and attention's output is copied (2 q and k more).
    """
    h, q, k = shape.hidden, shape.query, shape.key_value
    normed = shape.layer_norms * h + (q + k if shape.head_norms else 0)
    wide = 2 if setup.engine == "peft" else 1  # transformers' norms keep float32 copies
    elements = wide * normed + 2 * h + 2 * q + 2 * k
    if shape.fused_projections:
        elements += 2 * q + k
    elif setup.engine == "peft" and not setup.kernels and setup.quantization == "none":
        elements += 2 * h + q
    attention = [one for one in shape.linears if one.name not in MLP]
    roots = shape.layer_norms
    if shape.head_norms:
        roots += (q + k) // shape.head_norms
    statistics = 4 * (shape.heads + roots)  # attention's log-sum-exp and the norms' roots, float32
    per_token = setup.item * elements + statistics + _adapters_save(attention, setup)
    return setup.tokens * per_token + _mlp_saves(shape, setup)


MLP = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj"})


def _mlp_saves(shape: Shape, setup: Setup) -> int:
    """Of `layer_saves`, all but the MLP's input."""
    i = shape.intermediate
    if fused_by_unsloth(shape, setup) or (setup.kernels and not setup.dora):
        elements = 2 * i
    elif setup.engine == "peft" and not setup.kernels:
        copied = setup.quantization == "none" and not shape.fused_projections
        elements = 4 * i + (shape.hidden if copied else 0)
    else:
        elements = 3 * i
    adapters = _adapters_save([one for one in shape.linears if one.name in MLP], setup)
    return setup.tokens * (setup.item * elements + adapters)


def _adapters_save(linears: Sequence[Linear], setup: Setup) -> int:
    """Bytes a token: x A^T; with DoRA the base's result and the adapter's, which the magnitude's gradient takes, or
    with fastlora's kernels their sum; with dropout the dropped input and a byte of mask, which the kernels make again.
    """
    adapted = [one for one in linears if setup.adapted(one)]
    elements, inputs = len(adapted) * setup.rank, sum(one.inputs for one in adapted)
    if setup.dora:
        elements += (1 if setup.kernels else 2) * sum(one.outputs for one in adapted)
    masked = setup.dropout and not setup.kernels
    if masked:
        elements += inputs
    return setup.item * elements + (inputs if masked else 0)


def layer_works(shape: Shape, setup: Setup, *, again: bool = False) -> int:
    """What the backward of a layer makes beside what is saved, at its largest. In the MLP the gradient of its output
    (h), and unsloth's copies of gate, up and product (4 i), peft's gradients of product and activation (2 i; with an
    unquantized base's copies 4 h and i more), or fastlora's of product, gate and up (3 i; if the layer is computed
    `again`, the latter two are written over what was made again). In attention, when the MLP's have gone, the float32
    sums of dq and the unshared dk and dv; in peft's norms their float32 gradients (10 h); those of a norm behind the
    MLP while all that is saved is still there (13 h)."""
    h, i, q = shape.hidden, shape.intermediate, shape.query
    others = 6 * q
    if fused_by_unsloth(shape, setup):
        mlp, saved = 4 * i, 2 * i
    elif setup.kernels:
        spent = again and setup.recomputed_by_us and not setup.dora
        mlp, saved = i if spent else 3 * i, 2 * i
    elif setup.engine == "peft":
        mlp, saved, others = 2 * i, 4 * i, max(others, 9 * h)
        if setup.quantization == "none":
            mlp += 4 * h + i
        if shape.layer_norms > 2:
            mlp = max(mlp, 12 * h)
    else:
        mlp, saved = i, 3 * i
    return setup.tokens * setup.item * (h + max(mlp, others - saved))


def dequantized_bytes(shape: Shape, setup: Setup) -> int:
    """The largest weight in the compute type: of a quantized base each product makes one. unsloth keeps its buffer."""
    if setup.quantization == "none":
        return 0
    return setup.item * max(one.weights for one in shape.linears)


def dequantized_kept(shape: Shape, setup: Setup) -> tuple[int, int]:
    """How many weights of a layer that is computed again stay dequantized until its backward: of one whose input alone
    is kept, and of one that keeps its attention. down_proj's, whose backward is the first, is made for it alone. None
    where there is no such layer but those that are dequantized once a step."""
    if not setup.keep_dequantized or setup.dense_layers == shape.layers:
        return 0, 0
    sizes = {one.name: one.weights for one in shape.linears if setup.adapted(one)}
    sizes.pop("down_proj", None)
    return sum(sizes.values()), sum(sizes[name] for name in sizes if name in MLP)


def dense_weights(shape: Shape, setup: Setup) -> int:
    """Of one of dense_layers, the weights that are dequantized once a step: those of fastlora's kernels."""
    return sum(one.weights for one in shape.linears if setup.adapted(one))


def dense_among(setup: Setup) -> tuple[int, int]:
    """Of dense_layers, which are the last, those of which nothing but the input is kept, and those that keep their
    attention."""
    rest = max(0, setup.dense_layers - setup.keep_layers)
    first = setup.policy == "offload" and setup.keep_attention_layers > 0
    attention = min(max(0, rest - first), attention_layers(setup))
    return rest - attention, attention


def attention_layers(setup: Setup) -> int:
    """Layers that keep their attention. Offloaded, fastlora leaves the last one's input on the GPU, where backward
    needs it at once, and keeps nothing else of it."""
    return max(0, setup.keep_attention_layers - (setup.policy == "offload"))


def again_layers(shape: Shape, setup: Setup) -> int:
    """Layers of which nothing but the input is kept."""
    return shape.layers - setup.keep_layers - attention_layers(setup)


def input_bytes(shape: Shape, setup: Setup) -> int:
    """Of one layer: all that is kept of those that are computed again."""
    return setup.tokens * shape.hidden * setup.item


def keeps_projections(setup: Setup) -> bool:
    """Of layers that keep their attention."""
    return setup.kernels and not setup.dora


def attention_bytes(shape: Shape, setup: Setup) -> int:
    """What is kept of one of keep_attention_layers: its input (h), attention's output (q) and log-sum-exp (float32, one
    per head); where fastlora's kernels run the projections, without DoRA, also what q, k, v and o give (q, 2 k, h).
    """
    return sum(_attention_tensors(shape, setup))


def _attention_tensors(shape: Shape, setup: Setup) -> list[int]:
    """Bytes of each."""
    widths = [shape.hidden, shape.query]
    if keeps_projections(setup):
        widths += [shape.hidden, shape.query, shape.key_value, shape.key_value]
    return [setup.tokens * setup.item * width for width in widths] + [
        setup.tokens * 4 * shape.heads
    ]


def attention_again_bytes(shape: Shape, setup: Setup) -> int:
    """What the backward of such a layer makes again of `layer_saves`: all but attention's output, its log-sum-exp, and
    v. What is kept of q and k is from before the rotary embedding, and saved is what comes of it."""
    kept = shape.query + (shape.key_value if keeps_projections(setup) else 0)
    return layer_saves(shape, setup) - setup.tokens * (setup.item * kept + 4 * shape.heads)


@dataclass(frozen=True, slots=True)
class Copied:
    """Layers of one mode, of each of which so much goes to host memory and comes back."""

    layers: int
    bytes: int


def copied(shape: Shape, setup: Setup) -> tuple[Copied, Copied]:
    """Of layers that are computed again, and of those that keep their attention. fastlora copies not the last one's."""
    whole, attention = again_layers(shape, setup), attention_layers(setup)
    if not setup.inputs_on_host:
        whole = attention = 0
    elif whole and setup.policy == "offload":
        whole -= 1
    return (
        Copied(whole, input_bytes(shape, setup)),
        Copied(attention, attention_bytes(shape, setup)),
    )


def staging_bytes(shape: Shape, setup: Setup) -> int:
    """On the GPU all the time: unsloth's two buffers through which inputs come back. fastlora takes memory when they
    come."""
    whole, _ = copied(shape, setup)
    return 0 if setup.policy == "offload" else min(2, whole.layers) * whole.bytes


def stays_bytes(shape: Shape, setup: Setup) -> int:
    """Of what fastlora copies to the host, the last such layer's input, which backward wants at once."""
    stays = setup.policy == "offload" and again_layers(shape, setup) > 0
    return stays * input_bytes(shape, setup)


def coming_bytes(shape: Shape, setup: Setup) -> int:
    """What comes back to the GPU while the backward of a layer runs: the next one's."""
    if setup.policy != "offload":
        return 0
    return max((one.bytes for one in copied(shape, setup) if one.layers), default=0)


def attention_stays_bytes(shape: Shape, setup: Setup) -> int:
    """Of `attention_bytes`, what the backward of the MLP still finds: the layer's input, attention's output, its
    log-sum-exp, and v. The rest was read when the layer was computed again; only what came from the host makes room."""
    if setup.policy != "offload":
        return attention_bytes(shape, setup)
    value = shape.key_value if keeps_projections(setup) else 0
    elements = shape.hidden + shape.query + value
    return setup.tokens * (setup.item * elements + 4 * shape.heads)


def host_kept_bytes(shape: Shape, setup: Setup) -> int:
    """In host memory, of which PyTorch takes a power of two for each tensor where it is pinned."""
    whole, attention = copied(shape, setup)
    of_attention = sum(map(_power_of_2, _attention_tensors(shape, setup)))
    return whole.layers * _power_of_2(whole.bytes) + attention.layers * of_attention


def _power_of_2(size: int) -> int:
    """The next that is not below it."""
    return 1 << max(0, size - 1).bit_length()


def mask_bytes(setup: Setup) -> int:
    """A padded micro-batch's attention mask, T x row, a byte each; unsloth and recorded ones have none."""
    if setup.engine == "unsloth" or setup.packed or setup.micro_batch == 1 or setup.graphs:
        return 0
    return setup.tokens * setup.row_tokens


def loss_bytes(shape: Shape, setup: Setup, free: float) -> int:
    """The loss and its gradient, at their largest, with the last norm. `free`: bytes before it, as unsloth asks for.

    logits: log-probabilities, their gradient and that of the logits, float32 all: 12 bytes a logit; a soft cap keeps
    two more. unsloth: a chunk's logits and their gradient, 4 bytes. fastlora: a buffer of at most 256 MiB, and the
    hidden states' gradient. liger: chunks so small that they weigh as much as the hidden states.
    """
    t, v, h, item = setup.tokens, shape.vocabulary, shape.hidden, setup.item
    norm = 2 * t * h * item  # what it saves (its input in float32), or the chunks' gradients
    if setup.loss == "logits":
        return t * v * (12 + 2 * item * shape.softcapped) + norm
    if setup.loss == "unsloth":
        return unsloth_chunk_tokens(shape, setup, free) * v * 2 * item + norm
    if setup.loss == "fastlora":
        return min(2**28, t * v * item) + norm
    chunk: int = 1 << (ceil(t / ceil(v / h)) - 1).bit_length()
    return min(chunk, t) * v * (item + 4) + norm


def unsloth_chunk_tokens(shape: Shape, setup: Setup, free: float) -> int:
    """Of a chunk of unsloth's loss: their number is a multiple of 4 beyond 1, so that a chunk takes no more than half
    of the free memory at 16 bytes a logit, and never more than 4 GiB."""
    target = max(1.0, min(_UNSLOTH_CHUNK_TARGET, free / 2))
    exact = setup.tokens * shape.vocabulary * _UNSLOTH_LOGIT / target
    chunks = 1 if exact <= 1 else min(setup.tokens, 4 * ceil(exact / 4 - 1e-9))
    return ceil(setup.tokens / chunks)
