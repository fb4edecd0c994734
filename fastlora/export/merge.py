"""Base + adapter as a checkpoint of 16-bit safetensors, written as it is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import EngineError, RunDirError
from fastlora.export.plan import Part, Plan
from fastlora.export.stream import Spec, weight_count, write_safetensors

if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_CODE = ("*.py",)  # of a model with code of its own


def merged_dtype(plan: Plan, wanted: str | None) -> str:
    """The type of the merged weights: `wanted`, else the base's own where that has 16 bits, else bfloat16."""
    if wanted is not None:
        return wanted
    base = plan.checkpoint.dtype
    return base if base in ("bfloat16", "float16") else "bfloat16"


def write_merged(plan: Plan, folder: Path, dtype: str, stop_token_ids: Sequence[int]) -> None:
    """Fill `folder` with weights of the names and the files of the base, configuration and tokenizer.

    Raises RunDirError: no room on the disk. EngineError: weights beyond the range of float16.
    """
    specs = {
        name: Spec(plan.shape(part), _dtype(plan, part, dtype)) for name, part in plan.parts.items()
    }
    check_room(folder, sum(spec.bytes for spec in specs.values()))
    files: dict[str, list[str]] = {file: [] for file in plan.checkpoint.file_names}
    for name, part in plan.parts.items():
        files[plan.checkpoint.stored[part.source].file].append(name)
    for file, names in files.items():
        write_safetensors(
            folder / file,
            {name: specs[name] for name in names},
            (
                block
                for name in names
                for block in _blocks(plan, plan.parts[name], specs[name].dtype)
            ),
            {"format": "pt"},
        )
    if list(files) != [_SINGLE]:
        index = {
            "metadata": {
                "total_parameters": sum(weight_count(spec.shape) for spec in specs.values()),
                "total_size": sum(spec.bytes for spec in specs.values()),
            },
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        _write_json(folder / f"{_SINGLE}.index.json", index)
    _write_json(folder / "config.json", _config(plan, dtype))
    copy_beside(plan, folder, stop_token_ids)


def _dtype(plan: Plan, part: Part, dtype: str) -> str:
    stored = plan.checkpoint.stored[part.source]
    if "float" not in stored.dtype:
        return stored.dtype
    # A 16-bit checkpoint that keeps some tensors in float32 has its reasons.
    if stored.dtype == "float32" and plan.checkpoint.dtype != "float32":
        return "float32"
    return dtype


def _blocks(plan: Plan, part: Part, dtype: str) -> Iterator[torch.Tensor]:
    import torch

    for block in plan.blocks(part):
        rounded = block.to(getattr(torch, dtype))
        if dtype == "float16" and bool((torch.isinf(rounded) & ~torch.isinf(block)).any()):
            raise EngineError(
                f"{plan.base}: {part.name} has values of up to {float(block.abs().max()):.3g}, beyond float16 (65504); "
                "merge in bfloat16"
            )
        yield rounded


def _config(plan: Plan, dtype: str) -> dict[str, Any]:
    config = {key: value for key, value in plan.config.items() if key != "quantization_config"}
    for section in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = dtype
        if plan.untied and "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = False
    if plan.untied:
        config["tie_word_embeddings"] = False
    if "torch_dtype" not in config:
        config["dtype"] = dtype
    return config


def copy_beside(plan: Plan, folder: Path, stop_token_ids: Sequence[int]) -> None:
    """What a model needs beside its weights: generation settings that stop where the run's answers do, code of
    its own, and the tokenizer that was trained with."""
    generation = plan.base / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
    if stop_token_ids:
        settings["eos_token_id"] = (
            list(stop_token_ids) if len(stop_token_ids) > 1 else stop_token_ids[0]
        )
    _write_json(folder / "generation_config.json", settings)
    for pattern in _CODE:
        for file in plan.base.glob(pattern):
            shutil.copy2(file, folder)
    for file in plan.adapter.folder.iterdir():
        if file.is_file() and not file.name.startswith(
            ("adapter_", "README", "training_args", ".")
        ):
            shutil.copy2(file, folder)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise RunDirError(
            f"{folder.parent}: the export needs {needed / 2**30:.2g} GiB and the disk has {free / 2**30:.2g} free; "
            "free some space"
        )
