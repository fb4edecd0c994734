"""What is measured where nothing else is asked for, and for shapes of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from opbench import Case
from opbench.ends import embedding_case, head_case
from opbench.modules import Module

BASES = ("dense", "nf4")

LINEAR, DORA, HEAD, EMBEDDING = "linear", "DoRA", "head and loss", "embedding"
LEFT_BY_UNSLOTH = ("q and v alone", "biased q, k, v", "fused projections", "other architectures")
"""What runs PEFT's layers under Unsloth today."""

_QV = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024)}
_QWEN = {"q_proj": (3584, 3584), "k_proj": (3584, 512), "v_proj": (3584, 512)}
_GEMMA = {"q_proj": (2560, 2048), "k_proj": (2560, 1024), "v_proj": (2560, 1024)}
_GEMMA_MLP = {"gate_proj": (2560, 10240), "up_proj": (2560, 10240), "down_proj": (10240, 2560)}

PINNED: tuple[tuple[str, Module], ...] = (
    *(
        (group, Module(op, "Llama 3.1 8B", {"proj": widths}, dora=group == DORA))
        for group, op in ((LINEAR, "lora_linear"), (DORA, "dora_linear"))
        for widths in ((4096, 4096), (4096, 14336))
    ),
    (LEFT_BY_UNSLOTH[0], Module("lora_qv", "Llama 3.1 8B", _QV, bare=("k_proj",))),
    (LEFT_BY_UNSLOTH[1], Module("lora_qkv", "Qwen2.5 7B", _QWEN, bias=True)),
    (LEFT_BY_UNSLOTH[2], Module("lora_linear", "Phi 4", {"qkv_proj": (5120, 7680)})),
    (LEFT_BY_UNSLOTH[2], Module("lora_linear", "Phi 4", {"gate_up_proj": (5120, 35840)})),
    (LEFT_BY_UNSLOTH[3], Module("lora_qkv", "Gemma 3 4B", _GEMMA)),
    (LEFT_BY_UNSLOTH[3], Module("lora_linear", "Gemma 3 4B", {"o_proj": (2048, 2560)})),
    (LEFT_BY_UNSLOTH[3], Module("lora_mlp", "Gemma 3 4B", _GEMMA_MLP, act="gelu_tanh")),
)


def pinned() -> Iterator[Case]:
    """Of real models, as the suites of `fastlora bench` have them."""
    for group, module in PINNED:
        for base in BASES:
            yield module.case(group, base)
    yield head_case(HEAD, "Llama 3.1 8B", 128256, 4096)
    yield embedding_case(EMBEDDING, "Llama 3.1 8B", 128256, 4096)


def compiled(every: Iterable[Case]) -> Iterator[Case]:
    """Of real models those that unsloth compiles; of the user's shapes all but the ends of a model, whose arms never
    are."""
    for case in every:
        by_unsloth = case.group in LEFT_BY_UNSLOTH[2:]
        if by_unsloth if case.model else case.group not in (HEAD, EMBEDDING):
            yield case


def of_shapes(shapes: Sequence[Sequence[int]]) -> Iterator[Case]:
    """Every op at inputs x outputs; k and v are a quarter as wide as q."""
    for group in (LINEAR, DORA, "q, k, v", "q and v alone", "gated MLP"):
        for base in BASES:
            for k, n in shapes:
                yield _of_shape(group, k, n).case(group, base)
    for k, n in shapes:
        yield head_case(HEAD, "", n, k)
        yield embedding_case(EMBEDDING, "", n, k)


def _of_shape(group: str, k: int, n: int) -> Module:
    if group in (LINEAR, DORA):
        op = "dora_linear" if group == DORA else "lora_linear"
        return Module(op, "", {"proj": (k, n)}, dora=group == DORA)
    if group == "gated MLP":
        layers = {"gate_proj": (k, n), "up_proj": (k, n), "down_proj": (n, k)}
        return Module("lora_mlp", "", layers, act="silu")
    narrow = (k, max(1, n // 4))
    layers = {"q_proj": (k, n), "k_proj": narrow, "v_proj": narrow}
    if group == "q, k, v":
        return Module("lora_qkv", "", layers, bias=True)
    return Module("lora_qv", "", layers, bare=("k_proj",))
