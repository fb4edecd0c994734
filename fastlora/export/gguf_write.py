"""Base + adapter as one GGUF file, through the gguf package, a tensor at a time.

Only what the file needs to be right is here: which architectures, what each is told of the model, and the one
reordering that llama.cpp wants (rows of q and k where its rotation takes neighbours for pairs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlora.errors import EngineError
from fastlora.export.k_quants import K_QUANTS, q4_k_m_type
from fastlora.export.stream import weight_count

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

    from fastlora.export.plan import Plan
    from fastlora.export.vocabulary import Vocabulary

# model_type of transformers -> architecture of llama.cpp
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_Encode = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
PAIRED_ROTATION = ("llama",)
"""They rotate rows 2i and 2i + 1 of a head together; transformers rotates i and i + half a head."""


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    parameter: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    heads: int | None = None
    """Rows to be reordered, within each of so many heads."""


def architecture(plan: Plan) -> str:
    """Raises EngineError: one that is not served."""
    kind = plan.model.config.model_type
    if kind not in ARCHITECTURES or plan.fused:
        raise EngineError(
            f"{plan.base}: GGUF is written for {', '.join(ARCHITECTURES)} models, and this is {kind}; use fastlora "
            "merge, and llama.cpp's convert_hf_to_gguf.py on its result"
        )
    return ARCHITECTURES[kind]


def entries(plan: Plan, quant: str) -> list[Entry]:
    """The tensors of the file, in the order of the model's layers."""
    import gguf

    config, arch = plan.model.config, architecture(plan)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
        config.num_hidden_layers,
    )
    tied = {name for name in plan.names.ties if not plan.untied}
    made = []
    for parameter, part in plan.of_parameter.items():
        if parameter in tied or parameter not in plan.model.state_dict():
            continue
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise EngineError(f"{plan.base}: {parameter} has no name in llama.cpp's {arch}")
        heads = None
        if arch in PAIRED_ROTATION and ".q_proj." in parameter:
            heads = config.num_attention_heads
        elif arch in PAIRED_ROTATION and ".k_proj." in parameter:
            heads = config.num_key_value_heads
        shape = plan.shape(part)
        made.append(
            Entry(
                name, parameter, shape, _type(name, shape, quant, config.num_hidden_layers), heads
            )
        )
    return sorted(made, key=_place)


def _place(entry: Entry) -> tuple[int, str]:
    parts = entry.name.split(".")
    return (
        int(parts[1]) if parts[0] == "blk" else -1 if parts[0] == "token_embd" else 10**6,
        entry.name,
    )


def _wanted(name: str, quant: str, layers: int) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    return q4_k_m_type(name, layers) if quant == "q4_k_m" else GGMLQuantizationType[quant.upper()]


def larger_types(made: Sequence[Entry], quant: str, layers: int) -> str:
    """What to tell of matrices that are not of the type that was asked for; nothing where there are none."""
    matrices = [entry for entry in made if len(entry.shape) > 1]
    others = [entry for entry in matrices if entry.type != _wanted(entry.name, quant, layers)]
    if not others:
        return ""
    widths = ", ".join(map(str, sorted({entry.shape[-1] for entry in others})))
    return (
        f"{len(others)} of {len(matrices)} matrices are {' and '.join(sorted({one.type.name for one in others}))}: "
        f"rows of {widths} weights hold no whole number of {quant}'s blocks. The file is larger than one of {quant}"
    )


def _type(name: str, shape: tuple[int, ...], quant: str, layers: int) -> GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32  # norms and biases: llama.cpp adds them to float32
    wanted = _wanted(name, quant, layers)
    if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    # Rows that hold no whole number of blocks.
    q8_0 = GGMLQuantizationType.Q8_0
    return q8_0 if shape[-1] % GGML_QUANT_SIZES[q8_0][0] == 0 else GGMLQuantizationType.F16


def write_gguf(
    plan: Plan, path: Path, quant: str, vocabulary: Vocabulary, name: str
) -> list[Entry]:
    """Write the file; returns its tensors. Raises EngineError: an architecture or a type that is not served."""
    import gguf

    made = entries(plan, quant)
    writer = gguf.GGUFWriter(path, architecture(plan))
    try:
        _describe(writer, plan, quant, name)
        vocabulary.write(writer)
        factors = rope_factors(plan.model.config)
        if factors is not None:
            writer.add_tensor_info(
                "rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes
            )
        for entry in made:
            size = _bytes(entry)
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=entry.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for entry in made:
            writer.write_tensor_data(_data(plan, entry))
    finally:
        writer.close()
    return made


def total_bytes(made: list[Entry]) -> int:
    return sum(_bytes(entry) for entry in made)


def _bytes(entry: Entry) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[entry.type]
    return int(weight_count(entry.shape) // block * size)


def _data(plan: Plan, entry: Entry) -> np.ndarray[Any, Any]:
    """The tensor as the file has it. Held are its bytes in the file, and float32 of a few rows."""
    part = plan.of_parameter[entry.parameter]
    encode: _Encode = _encoder(entry.type)
    if entry.heads is not None or not entry.shape:
        (block,) = plan.blocks(part, whole=True)
        rows = block.float().numpy()
        return encode(_pair_rows(rows, entry.heads) if entry.heads else rows)
    whole: np.ndarray[Any, Any] | None = None
    start = 0
    for block in plan.blocks(part):
        data = encode(block.float().numpy())
        if len(data) == entry.shape[0]:
            return data
        if whole is None:
            whole = np.empty((entry.shape[0], *data.shape[1:]), data.dtype)
        whole[start : start + len(data)] = data
        start += len(data)
    assert whole is not None
    assert start == entry.shape[0]
    return whole


def _encoder(kind: GGMLQuantizationType) -> _Encode:
    from gguf import GGMLQuantizationType, quants

    if kind in K_QUANTS:
        packed: _Encode = K_QUANTS[kind]
        return packed
    if kind == GGMLQuantizationType.F16:
        return _float16
    return lambda rows: np.ascontiguousarray(quants.quantize(np.ascontiguousarray(rows), kind))


def _float16(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if float(np.abs(rows).max(initial=0)) > np.finfo(np.float16).max:
        raise EngineError("weights beyond float16 (65504); export with --quant bf16")
    return rows.astype(np.float16)


def _pair_rows(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """What llama.cpp divides each frequency by, where the model scales them each by its own factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    size = 2 * len(scaled)
    plain = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    factors: np.ndarray[Any, Any] = (plain / scaled.double().numpy()).astype(np.float32)
    return factors


def _describe(writer: GGUFWriter, plan: Plan, quant: str, name: str) -> None:
    import gguf

    config = plan.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    _describe_rope(writer, plan)


def _describe_rope(writer: GGUFWriter, plan: Plan) -> None:
    from gguf import RopeScalingType

    rope = plan.model.config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):
        return  # llama3's factors are a tensor
    if kind not in ("linear", "yarn"):
        raise EngineError(
            f"{plan.base}: GGUF is written for rope_type default, linear, llama3 and yarn, and this is {kind}"
        )
    writer.add_rope_scaling_type(RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(
            int(original or plan.model.config.max_position_embeddings)
        )
