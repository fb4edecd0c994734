"""A step's memory at each of its moments. The peak is the largest moment, not the sum of each term's largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastlora.plan import stored, working
from fastlora.plan.setup import Setup
from fastlora.plan.shape import Shape
from fastlora.plan.working import GIB

SPARE = 0.015
"""What is chosen for a budget was predicted to within 1 % where it is tightest, with weights streamed (docs/plan.md),
and the limit of a process keeps 16 MiB for what the CUDA context has still to load."""

Moment = Literal["loss", "backward of a layer", "optimizer step"]


@dataclass(frozen=True, slots=True)
class Term:
    name: str
    bytes: float
    about: str
    """Formula or reason, for the table."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one GPU and its host. GiB unless said otherwise."""

    moments: dict[Moment, tuple[Term, ...]]
    """What is allocated at each."""
    holes: float
    """Bytes that PyTorch's allocator reserves beside what is allocated at the peak."""
    context: float
    """Bytes that the driver counts beside the allocator."""
    host: tuple[Term, ...]
    loading: float = 0.0
    """Bytes before the first step, where it may take more than one: an embedding is on the GPU first."""
    correction: float = 1.0
    """From this machine's own runs: what is not stored weights and state is multiplied by it."""

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: _sum(self.moments[moment]))

    @property
    def always_gib(self) -> float:
        """Weights, adapter, gradients and optimizer state: exact, so not corrected."""
        return sum(one.bytes for one in self.moments["loss"] if one.name in ALWAYS) / GIB

    def _corrected(self, gib: float) -> float:
        return self.always_gib + (gib - self.always_gib) * self.correction

    @property
    def allocated_gib(self) -> float:
        return self._corrected(_sum(self.moments[self.peak]) / GIB)

    @property
    def reserved_gib(self) -> float:
        """What PyTorch takes from the card when it is free to, as a run reports it."""
        return self._corrected(self.uncorrected_gib)

    @property
    def uncorrected_gib(self) -> float:
        return (_sum(self.moments[self.peak]) + self.holes) / GIB

    @property
    def needed_gib(self) -> float:
        """The smallest card: near its limit the allocator gives its holes back, so that only what is
        allocated counts, and the context. (8B with PEFT at 24 GiB: 10,240 tokens went in, predicted 23.9.)"""
        return max(self.allocated_gib, self.loading / GIB) + self.context / GIB

    @property
    def comfortable_gib(self) -> float:
        """The card on which the allocator need not give anything back, and a prediction that errs does no harm."""
        return (1 + SPARE) * (max(self.reserved_gib, self.loading / GIB) + self.context / GIB)

    @property
    def host_gib(self) -> float:
        return _sum(self.host) / GIB

    def dominant(self) -> Term:
        return max(self.moments[self.peak], key=lambda one: one.bytes)


ALWAYS = ("weights", "embedding, head, norms", "adapter", "gradients", "optimizer state")


def _sum(terms: tuple[Term, ...]) -> float:
    return sum(one.bytes for one in terms)


def memory(
    shape: Shape, setup: Setup, *, vram_gib: float, hopper: bool, correction: float = 1.0
) -> Memory:
    """vram_gib: of the card, by which unsloth sizes its loss chunks."""
    always = _always(shape, setup)
    buffers = [Term("cuBLAS workspaces", working.cublas_bytes(hopper), "one a thread")]
    if staging := working.staging_bytes(shape, setup):
        buffers.append(Term("copy buffers", staging, "what comes back from the host"))
    if mask := working.mask_bytes(setup):
        buffers.append(Term("attention mask", mask, "tokens x row"))
    if setup.dense_layers:
        dense = setup.dense_layers * working.dense_weights(shape, setup) * setup.item
        about = f"of {setup.dense_layers} layers, from step to step"
        buffers.append(Term("dense weights", dense, about))
    dequantized = Term(
        "dequantized weight", working.dequantized_bytes(shape, setup), "the largest, in 16 bits"
    )
    if setup.engine == "unsloth":
        buffers.append(dequantized)
    lasting = [*always, *buffers]
    pinned = _pinned(shape, setup)
    context = working.CONTEXT[setup.engine] + working.page_table_bytes(_sum(pinned))
    kept = _kept(shape, setup)
    free = vram_gib * GIB - context - _sum((*lasting, *kept))
    loss = Term("loss", working.loss_bytes(shape, setup, free), _LOSSES[setup.loss])
    layer = [] if setup.engine == "unsloth" else [dequantized]
    step = [Term("optimizer's work", _optimizer_work(shape, setup), "of its largest operation")]
    moments: dict[Moment, tuple[Term, ...]] = {
        "loss": (*lasting, *kept, loss),
        "backward of a layer": (*lasting, *_backward(shape, setup), *layer),
        "optimizer step": (*always, *buffers, *step),
    }
    if setup.graphs:
        # All comes and goes within it, and it stays.
        most = max(_sum(terms) for terms in moments.values()) - _sum((*lasting,))
        pool = Term("CUDA graphs' memory", most, "a micro-batch's")
        moments["optimizer step"] = (*moments["optimizer step"], pool)
    peak = max(_sum(terms) for terms in moments.values())
    holes = working.HOLES * peak + working.SMALL_HOLES + working.GRAPH_HOLES * setup.graphs
    if setup.loss == "logits":
        holes += working.LOGITS_HOLES * setup.tokens * shape.vocabulary * setup.item
    loading = 0.0
    if embedding := stored.host_embedding_bytes(shape, setup):
        # Gradients and the optimizer's state come later; each weight comes in 16 bits to be quantized.
        there = [one for one in always if one.name not in ("gradients", "optimizer state")]
        loading = _sum((*there, dequantized)) + embedding
    host = _host(shape, setup, pinned)
    return Memory(moments, holes, context, host, loading, correction)


_LOSSES = {
    "logits": "12 bytes a logit: log-probabilities and two gradients",
    "unsloth": "a chunk's logits and gradient",
    "fastlora": "a chunk of at most 256 MiB",
    "liger": "a chunk's logits and gradient",
}


def _always(shape: Shape, setup: Setup) -> list[Term]:
    adapter = stored.adapter_bytes(shape, setup)
    return [
        Term("weights", stored.resident_bytes(shape, setup), setup.quantization),
        Term("embedding, head, norms", stored.rest_bytes(shape, setup), f"{8 * setup.item}-bit"),
        Term("adapter", adapter, f"rank {setup.rank}, float32"),
        Term("gradients", adapter, "float32"),
        Term("optimizer state", stored.optimizer_bytes(shape, setup), setup.optimizer),
    ]


def _kept(
    shape: Shape, setup: Setup, *, whole: int | None = None, attention: int | None = None
) -> list[Term]:
    """What is kept of all layers once the forward is done; or while so many of them still keep all or their
    attention."""
    whole = setup.keep_layers if whole is None else whole
    attention = working.attention_layers(setup) if attention is None else attention
    terms = []
    if whole:
        saves = working.layer_saves(shape, setup)
        terms.append(Term("activations", whole * saves, f"of {whole} whole layers"))
    if setup.inputs_on_host:
        if stays := working.stays_bytes(shape, setup):
            terms.append(Term("checkpoints", stays, "input of the last layer computed again"))
        return terms  # what is left of unsloth's is among the copy buffers
    if attention:
        each = working.attention_bytes(shape, setup)
        terms.append(Term("attention's activations", attention * each, f"of {attention} layers"))
    if again := working.again_layers(shape, setup):
        inputs = again * working.input_bytes(shape, setup)
        terms.append(Term("checkpoints", inputs, "inputs of the layers computed again"))
    return terms


def _backward(shape: Shape, setup: Setup) -> list[Term]:
    """What is kept and made again at the backward's largest layer: the last, with all still there; or the first that is
    computed again, when the kept ones behind it have gone. unsloth's whole ones lie between the others instead; and
    layers that are streamed are the last, so that all whole ones are before them.
    """
    between = setup.policy == "unsloth"
    attention = working.attention_layers(setup)
    of_layer, of_attention = working.dequantized_kept(shape, setup)
    item = setup.tokens * shape.hidden * setup.item
    coming = Term("copies", working.coming_bytes(shape, setup), "back, for the next layer")

    def work(again: bool) -> Term:
        made = working.layer_works(shape, setup, again=again)
        return Term("a layer's work", made, "gradients of its widest part")

    stages = [[*_kept(shape, setup), work(again=False)]] if setup.keep_layers else []
    if attention:
        # Its input is among what is kept of it.
        saves = working.attention_again_bytes(shape, setup) - item
        again = Term("a layer computed again", saves, "what it saves, but for its attention")
        still = _kept(shape, setup, whole=None if setup.stream_layers else 0)
        if setup.policy == "offload":
            still = [one for one in still if one.name != "checkpoints"]
            stays = working.attention_stays_bytes(shape, setup)
            still += [Term("attention's activations", stays, "of the layer, from the host"), coming]
        still += _dequantized(setup, of_attention)
        stages.append([*still, again, work(again=True)])
    if working.again_layers(shape, setup):
        saves = working.layer_saves(shape, setup)
        # Its input is among the checkpoints; with unsloth's its output is there instead.
        if not between:
            saves -= item
        again = Term("a layer computed again", saves, "what it saves")
        if setup.stream_layers > attention:
            still = _kept(shape, setup, attention=0)
        else:
            whole = max(0, setup.keep_layers - 1) if between else 0
            still = _kept(shape, setup, whole=whole, attention=0)
        if setup.policy == "offload":
            still.append(coming)
        still += _dequantized(setup, of_layer)
        stages.append([*still, again, work(again=True)])
    return max(stages, key=lambda terms: _sum((*terms,)))


def _dequantized(setup: Setup, weights: int) -> list[Term]:
    about = "of the layer computed again, until its backward"
    return [Term("dequantized weights kept", weights * setup.item, about)] if weights else []


def _optimizer_work(shape: Shape, setup: Setup) -> float:
    """PyTorch's AdamW takes all tensors at once, with a temporary as large as they are; bitsandbytes works in place."""
    return stored.adapter_bytes(shape, setup) if setup.optimizer == "adamw" else 0


_PROCESS = 3.5 * GIB
"""Python, PyTorch with its CUDA libraries, transformers: an estimate."""
_SHARD = 5e9
"""Of a checkpoint's files, as save_pretrained cuts them; they are read one after the other."""


def _pinned(shape: Shape, setup: Setup) -> tuple[Term, ...]:
    """Of the host's memory, what the GPU's page tables are for."""
    streamed = f"of {setup.stream_layers} layers"
    terms = (
        Term("pinned checkpoints", working.host_kept_bytes(shape, setup), "what layers keep for their backward"),
        Term("pinned weights", stored.streamed_bytes(shape, setup), streamed),
        Term("pinned embedding", stored.host_embedding_bytes(shape, setup), "its rows are read over the bus"),
    )  # fmt: skip
    return tuple(one for one in terms if one.bytes)


def _host(shape: Shape, setup: Setup, pinned: tuple[Term, ...]) -> tuple[Term, ...]:
    file = shape.parameters * (0.55 if shape.quantized == "bitsandbytes" else 2)
    terms = [
        Term("process", _PROCESS, "estimate: Python, PyTorch, CUDA"),
        Term("loading", min(_SHARD, file), "one file of the checkpoint"),
        *pinned,
    ]
    if paged := stored.optimizer_bytes(shape, setup, paged=True):
        terms.append(Term("paged optimizer state", paged, "where the card has no room"))
    return tuple(terms)
