"""Checkpoints to measure on: random weights at a true shape, already in the base's format.

What a step costs does not depend on the values of the frozen weights, so nothing is downloaded; and an
8B model in NF4 is written as the 6 GB it is trained from, layer by layer, never as 16 GB of bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.engines.base import not_loadable, resolve_dtype
from fastlora.errors import EngineError
from fastlora.recipe.schema import ModelSection
from fastlora.rundir.store import locked, whole_folder

if TYPE_CHECKING:
    import torch

VERSION = 1  # part of the cache's key: raise it when the same shape would give other bytes
_INDEX = "model.safetensors.index.json"
_WRITERS = 4
"""Files that are copied from the GPU and written at once: one thread writes 1 to 2 GB/s even into memory, and a 70B
model's files are 40 GB."""

# Of a repository on the Hub: what a model in safetensors is loaded from, tokenizer and own code included,
# without copies of the weights in other formats.
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
_NOT_FETCHED = ["*/*", "consolidated*"]


def cached_folder(shape: dict[str, Any], model: ModelSection, cache: Path) -> Path:
    """Where random_checkpoint puts the checkpoint of these arguments."""
    key = [VERSION, shape, model.quantization == "nf4", str(resolve_dtype(model))]
    return cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def is_complete(folder: Path) -> bool:
    return (folder / _INDEX).exists()


def random_checkpoint(shape: dict[str, Any], model: ModelSection, cache: Path) -> Path:
    """The folder of a checkpoint with `shape` (a config.json's content), made if the cache lacks it.

    Of `model`, quantization and dtype count: nf4 is double-quantized in blocks of 64, as bitsandbytes
    writes it; int8 is quantized when loaded, so its checkpoint is that of none. The same arguments give
    the same bytes on the same kind of device.
    Raises EngineError: the shape is not a model's, or the disk is too small.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    folder = cached_folder(shape, model, cache)
    if is_complete(folder):
        return folder
    nf4, dtype = model.quantization == "nf4", resolve_dtype(model)
    try:
        config = AutoConfig.for_model(**shape)
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a wrong value does in the model's own code
        raise EngineError(f"shape: not a model's ({type(error).__name__}: {error})") from error
    if (
        "num_hidden_layers" not in config.to_dict()
    ):  # cut_down would find that out after the writing
        raise EngineError(_not_served("shape", config.model_type))
    quantized = _quantized_names(empty) if nf4 else set()
    config.dtype = dtype
    if nf4:
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ).to_dict()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f".{folder.name}.lock"):
        if is_complete(folder):  # another benchmark has made it meanwhile
            return folder
        _check_disk(cache, empty, quantized, dtype)
        with whole_folder(folder) as scratch:
            config.save_pretrained(str(scratch))
            save_byte_tokenizer(scratch)
            _write_shards(scratch, empty, quantized, dtype)
    return folder


def _not_served(what: str, model_type: str) -> str:
    return (
        f"{what}: the benchmark cannot cut {model_type or 'this architecture'} down for its gradient gate: "
        "the model's config.json has no num_hidden_layers; choose a text-only model of the Llama kind"
    )


def _quantized_names(model: Any) -> set[str]:
    """The weights that transformers quantizes: every linear layer but the head."""
    import torch

    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def _check_disk(cache: Path, model: Any, quantized: set[str], dtype: torch.dtype) -> None:
    needed = sum(
        parameter.numel() * (0.52 if name in quantized else dtype.itemsize)
        for name, parameter in model.named_parameters()
    )
    free = shutil.disk_usage(cache).free
    if free < 1.05 * needed:
        raise EngineError(
            f"{cache}: the weights take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; free some "
            "space, or set FASTLORA_CACHE to a folder on another disk"
        )


def _write_shards(folder: Path, model: Any, quantized: set[str], dtype: torch.dtype) -> None:
    """A file per decoder layer and one for the rest, so that a cut-down model reads only its layers."""
    from safetensors.torch import save_file

    tied = getattr(model, "_tied_weights_keys", None) or {}
    shards: dict[str, list[str]] = defaultdict(list)
    shapes = {}
    for (
        name,
        parameter,
    ) in model.named_parameters():  # a tied weight comes up once, by its first name
        if model.config.tie_word_embeddings and name in tied:
            continue
        layer = _layer(name)
        shards["rest" if layer is None else f"layer-{layer:03d}"].append(name)
        shapes[name] = tuple(parameter.shape)
    gemma = model.config.model_type.startswith("gemma")
    making = threading.Lock()  # of one tensor at a time, in float32 as well, there is room

    def write(shard: str) -> dict[str, int]:
        """Bytes by name."""
        tensors = {}
        for name in shards[shard]:
            with making:
                parts = list(_random(name, shapes[name], name in quantized, dtype, gemma))
            for part, tensor in parts:
                tensors[part] = tensor.cpu().contiguous()
        save_file(tensors, folder / _file(shard), metadata={"format": "pt"})
        return {part: tensor.nbytes for part, tensor in tensors.items()}

    with ThreadPoolExecutor(_WRITERS) as pool:
        written = dict(zip(shards, pool.map(write, shards), strict=True))
    where = {part: _file(shard) for shard, sizes in written.items() for part in sizes}
    total = sum(sum(sizes.values()) for sizes in written.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _file(shard: str) -> str:
    return f"model-{shard}.safetensors"


def _layer(name: str) -> int | None:
    """The number of the decoder layer that a parameter belongs to."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def _random(
    name: str, shape: tuple[int, ...], quantize: bool, dtype: torch.dtype, gemma: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the file, tensor) of one parameter: normal with deviation 0.02, as models are
    initialised; norms at the identity. Seeded by the name, so that a layer is the same at any depth."""
    import torch
    from bitsandbytes import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if len(shape) == 1 and name.endswith("norm.weight"):
        yield name, torch.full(shape, 0.0 if gemma else 1.0, dtype=dtype)  # gemma's is 1 + weight
        return
    draw = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    tensor = (torch.randn(shape, generator=draw, device=device) * 0.02).to(dtype)
    if not quantize:
        yield name, tensor
        return
    codes, state = functional.quantize_4bit(
        tensor, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    yield name, codes
    for part, value in state.as_dict(packed=True).items():
        yield f"{name}.{part}", value


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer with a token per byte and Llama 3's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>"],
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(str(folder))


_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def cut_down(checkpoint: str, revision: str | None, layers: int, target: Path) -> Path:
    """A checkpoint of the first `layers` decoder layers of another one: its config, with links to its files.

    checkpoint: a folder, or a Hub id, which is fetched into the Hub's cache. Weights of later layers
    that share a file with needed ones are not in the index and are passed over when loading.
    Raises EngineError: the checkpoint cannot be found or read, has no safetensors, or is of an
    architecture whose depth is not in num_hidden_layers.
    """
    try:
        source = _fetched(checkpoint, revision)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        where = _weight_map(source)
    except EngineError:
        raise
    except Exception as error:  # the Hub client and safetensors raise many unrelated types
        raise EngineError(not_loadable(checkpoint, error)) from error
    if "num_hidden_layers" not in config:
        raise EngineError(_not_served(f"model.name: {checkpoint}", config.get("model_type", "")))
    layers = min(layers, config["num_hidden_layers"])
    for key, value in config.items():  # layer_types and the like: an entry per layer
        if isinstance(value, list) and len(value) == config["num_hidden_layers"]:
            config[key] = value[:layers]
    config["num_hidden_layers"] = layers
    kept = {
        name: file
        for name, file in where.items()
        if (layer := _layer(name)) is None or layer < layers
    }
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and (path.suffix != ".safetensors" or path.name in kept.values()):
            (target / path.name).unlink(missing_ok=True)
            os.symlink(path.absolute(), target / path.name)
    _replace(target / "config.json", config)
    _replace(target / _INDEX, {"metadata": {}, "weight_map": kept})
    return target


def _fetched(checkpoint: str, revision: str | None) -> Path:
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            checkpoint, revision=revision, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED
        )
    )


def _replace(path: Path, content: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)  # it may be a link into somebody's model
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _weight_map(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return dict(index["weight_map"])
    single = folder / "model.safetensors"
    if not single.exists():
        raise EngineError(f"{folder}: holds no safetensors; convert the model with save_pretrained")
    with safe_open(str(single), framework="pt") as file:
        return dict.fromkeys(file.keys(), single.name)
