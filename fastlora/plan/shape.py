"""A model's layers, from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.errors import EngineError

# Families whose layers are known. norms: of hidden_size, per layer; bias: on which linear layers, unless a key of
# config.json says so; head_norms: a norm on every head of q and of k.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"bias": ("q_proj", "k_proj", "v_proj")},
    "qwen3": {"head_norms": True},
    "gemma": {"tied": True},
    "gemma2": {"norms": 4, "tied": True},
    "gemma3_text": {"norms": 4, "head_norms": True, "tied": True},
    "phi3": {"fused": True},
}


@dataclass(frozen=True, slots=True)
class Linear:
    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes in elements. Every decoder layer is like the others."""

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    query: int
    """Width of q, and of what attention gives: heads x head_dim."""
    key_value: int
    """Width of k, and of v."""
    linears: tuple[Linear, ...]
    """Of one decoder layer."""
    layer_norms: int
    """Norms of one decoder layer over the hidden size: 2, or 4 where what attention and MLP give is normed too."""
    head_norms: int
    """Width of the norms on every head of q and of k; 0: there are none."""
    tied: bool
    """Embedding and output layer are one weight."""
    softcapped: bool
    """Logits go through a tanh."""
    quantized: str | None
    """How the checkpoint itself is quantized, e.g. "bitsandbytes"."""
    max_tokens: int | None
    window: int
    """Tokens that attention looks back, in some layers at least; 0: all."""
    not_recorded: str
    """What of it keeps micro-batches from being recorded (memory.cuda_graphs); "": nothing."""
    notes: tuple[str, ...]
    """What was assumed."""

    @property
    def norms(self) -> int:
        """Norm weights of one decoder layer."""
        return self.layer_norms * self.hidden + 2 * self.head_norms

    @property
    def fused_projections(self) -> bool:
        """q, k and v are one product, and gate and up another."""
        return any(one.name == "qkv_proj" for one in self.linears)

    @property
    def embedding(self) -> Linear:
        return Linear("embed_tokens", self.vocabulary, self.hidden)

    @property
    def head(self) -> Linear:
        return Linear("lm_head", self.hidden, self.vocabulary)

    @property
    def parameters(self) -> int:
        """All of them; a tied weight counts once."""
        layer = sum(one.weights + one.outputs * one.bias for one in self.linears) + self.norms
        outside = self.embedding.weights * (1 if self.tied else 2) + self.hidden
        return self.layers * layer + outside


def read_config(name: str, revision: str | None = None, *, local: bool = False) -> dict[str, Any]:
    """The config.json of a folder or of a Hub id; of the latter that file alone is fetched, into the Hub's cache, or
    with `local` only looked for there.

    Raises EngineError: there is none, or it is not JSON.
    """
    path = Path(name) / "config.json"
    if not Path(name).is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise EngineError(f"model.name: {name}: no such folder")
        path = _fetched(name, revision, local)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(
            f"model.name: {name} holds no config.json; give the folder of a model, or its Hub id"
        ) from None
    except (OSError, ValueError) as error:
        raise EngineError(f"model.name: {path} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise EngineError(f"model.name: {path} is not a model's configuration")
    return config


def _fetched(name: str, revision: str | None, local: bool) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=local))
    except Exception as error:  # the Hub client raises many unrelated types
        reason = next((line for line in str(error).splitlines() if line.strip()), "no answer")
        raise EngineError(
            f"model.name: the config.json of {name} cannot be fetched ({reason}). Check the spelling; a gated model "
            "needs `hf auth login`; without internet, give the path of a folder with the model's config.json"
        ) from None


def shape_of(config: Mapping[str, Any], name: str = "config.json") -> Shape:
    """Raises EngineError: sizes are missing or make no sense; all of them in one error."""
    text = config.get("text_config")
    whole, config = config, text if isinstance(text, Mapping) else config
    kind = str(config.get("model_type") or whole.get("model_type") or "unknown")
    notes = []
    if config is not whole:
        notes.append(f"{whole.get('model_type')}: its language model alone is counted")
    family = _FAMILIES.get(kind)
    if family is None:
        notes.append(
            f"{kind}: not among the families that are known ({', '.join(_FAMILIES)}); taken for a Llama with the "
            "sizes of its config.json"
        )
        family = {}
        if any(key in config for key in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise EngineError(f"{name}: {kind} has experts, which are not counted yet")
    sizes, problems = {}, []
    for key, other, default in _SIZES:
        value = next((config[k] for k in (key, *other) if config.get(k) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{name}: {key}: {'is missing' if value is None else repr(value)}")
        else:
            sizes[key] = value
    if problems:
        raise EngineError("\n".join(problems))
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    intermediate = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    return Shape(
        model_type=kind,
        vocabulary=sizes["vocab_size"],
        hidden=hidden,
        intermediate=intermediate,
        layers=sizes["num_hidden_layers"],
        heads=heads,
        query=heads * head,
        key_value=kv_heads * head,
        linears=_linears(config, family, hidden, heads * head, kv_heads * head, intermediate),
        layer_norms=family.get("norms", 2),
        head_norms=head if family.get("head_norms") else 0,
        tied=bool(_first(config, whole, "tie_word_embeddings", family.get("tied", kind not in _FAMILIES))),
        softcapped=bool(config.get("final_logit_softcapping", kind == "gemma2")),
        quantized=(whole.get("quantization_config") or {}).get("quant_method"),
        max_tokens=config.get("max_position_embeddings"),
        window=(config.get("use_sliding_window", True) and config.get("sliding_window")) or 0,
        not_recorded=_not_recorded(config),
        notes=tuple(notes),
    )  # fmt: skip


_SIZES: tuple[tuple[str, tuple[str, ...], int | None], ...] = (
    ("vocab_size", (), None),
    ("hidden_size", ("n_embd", "d_model"), None),
    ("num_hidden_layers", ("n_layer", "num_layers"), None),
    ("num_attention_heads", ("n_head",), None),
)


def _not_recorded(config: Mapping[str, Any]) -> str:
    for name in ("attention_dropout", "attn_pdrop"):
        if config.get(name):
            return f"{name} draws random numbers"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = one.get("rope_type", one.get("type"))
        if kind in ("dynamic", "longrope"):
            return f"{kind} rotary embeddings ask the GPU for the largest position"
    return ""


def _first(config: Mapping[str, Any], whole: Mapping[str, Any], key: str, default: Any) -> Any:
    return config.get(key, whole.get(key, default))


def _linears(
    config: Mapping[str, Any], family: Mapping[str, Any], hidden: int, query: int, kv: int, inner: int
) -> tuple[Linear, ...]:  # fmt: skip
    if family.get("fused"):
        return (
            Linear("qkv_proj", hidden, query + 2 * kv),
            Linear("o_proj", query, hidden),
            Linear("gate_up_proj", hidden, 2 * inner),
            Linear("down_proj", inner, hidden),
        )
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    biased = family.get("bias", ())
    sizes = {
        "q_proj": (hidden, query), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (query, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    mlps = ("gate_proj", "up_proj", "down_proj")
    return tuple(
        Linear(name, *size, bias=name in biased or (mlp if name in mlps else attention))
        for name, size in sizes.items()
    )
