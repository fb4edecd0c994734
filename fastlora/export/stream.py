"""Checkpoints read and written a few rows at a time, so that no model is too large for the host's memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.engines.base import not_loadable
from fastlora.errors import EngineError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 128 * 2**20
"""Of a tensor in float32 that are worked on at a time. A few such blocks live at once."""

_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py")
_OF_4_BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE_OF_4_BIT = "quant_state.bitsandbytes__"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_CODES = {name: code for code, name in _DTYPES.items()}


def base_folder(name: str, revision: str | None) -> Path:
    """The model's folder; that of the Hub's cache, filled first, where `name` is no folder.

    Raises EngineError: it cannot be found.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the client raises many unrelated types
        raise EngineError(not_loadable(name, error)) from error


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows that make up a tensor, BLOCK_BYTES of float32 at a time."""
    if not shape:
        yield 0, 1
        return
    row = 4
    for size in shape[1:]:
        row *= size
    step = max(1, BLOCK_BYTES // max(row, 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a checkpoint; a quantized one as what it stands for."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    quantized: str | None = None
    """`4bit` or `int8` of bitsandbytes."""


class Checkpoint:
    """The tensors of a folder of safetensors, read by rows. Those that bitsandbytes had quantized are dequantized.

    Raises EngineError: no safetensors, one missing, or quantized by something else.
    """

    def __init__(self, folder: Path, single: str = "model.safetensors") -> None:
        self.folder = folder
        index = folder / f"{single}.index.json"
        if index.exists():
            files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            missing = sorted(file for file in set(files.values()) if not (folder / file).exists())
        elif (folder / single).exists():
            files, missing = {}, []
        else:
            files, missing = {}, [single]
        if missing:
            raise EngineError(
                f"{folder}: has no {', '.join(missing)}; the weights must be safetensors (load the model with "
                "transformers and save it with save_pretrained to convert it), complete"
            )
        self.file_names = sorted(set(files.values())) or [single]
        self.stored: dict[str, Stored] = {}
        """In the order of the files."""
        for file in self.file_names:
            self._read_header(file, {name for name, place in files.items() if place == file})
        self._last: tuple[str, torch.Tensor] | None = None

    def _read_header(self, file: str, wanted: set[str]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                raw = {}
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    view = opened.get_slice(name)
                    raw[name] = (tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise EngineError(not_loadable(str(self.folder), error)) from error
        if absent := sorted(wanted - raw.keys()):
            raise EngineError(
                f"{self.folder}: {file} lacks {absent[0]}, which the index names ({len(absent)} in all); copy or "
                "download the model again"
            )
        for name, (shape, code) in raw.items():
            _, _, part = name.partition(".weight.")
            if part in _OF_4_BIT or part.startswith(_STATE_OF_4_BIT):
                continue
            base = name.removesuffix(".weight")
            state = next((key for key in raw if key.startswith(f"{name}.{_STATE_OF_4_BIT}")), None)
            if state is not None:
                facts = json.loads(bytes(self._raw(file, state).tolist()))
                self.stored[name] = Stored(file, tuple(facts["shape"]), facts["dtype"], "4bit")
            elif (
                name.endswith((".SCB", ".weight_format"))
                and f"{name.rpartition('.')[0]}.weight" in raw
            ):
                continue
            elif name.endswith(".weight") and f"{base}.SCB" in raw:
                self.stored[name] = Stored(file, shape, "float16", "int8")
            elif code not in _DTYPES:
                raise EngineError(
                    f"{self.folder}: {name} ({code}) is quantized in a way that cannot be merged into; name the 16-bit "
                    "original as model.name"
                )
            else:
                self.stored[name] = Stored(file, shape, _DTYPES[code])

    def _raw(self, file: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        from safetensors import safe_open

        # Opened for each block: what is mapped counts as this process's memory until it is closed.
        with safe_open(self.folder / file, framework="pt") as opened:
            view = opened.get_slice(name)
            tensor: torch.Tensor = (
                view[start:stop].clone() if view.get_shape() else opened.get_tensor(name).clone()
            )
            return tensor

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor in its own type; of a quantized one in float32."""
        stored = self.stored[name]
        if stored.quantized is None:
            return self._raw(stored.file, name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._dequantized(name, stored))
        return self._last[1][start:stop]

    def _dequantized(self, name: str, stored: Stored) -> torch.Tensor:
        import torch

        weight = self._raw(stored.file, name)
        if stored.quantized == "int8":
            scale = self._raw(stored.file, f"{name.removesuffix('weight')}SCB")
            return weight.float() * (scale.float() / 127).unsqueeze(1)
        from bitsandbytes.functional import QuantState, dequantize_4bit
        from safetensors import safe_open

        with safe_open(self.folder / stored.file, framework="pt") as opened:
            parts = {
                key: opened.get_tensor(key)
                for key in opened.keys()  # noqa: SIM118 (not a mapping)
                if key.startswith(f"{name}.")
            }
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        # As one row: on a CPU, bitsandbytes 0.50.2 errs where a block of scales goes on in the next row.
        state.shape, state.dtype = torch.Size((1, weight_count(stored.shape))), torch.float32
        dense: torch.Tensor = dequantize_4bit(weight, state).reshape(stored.shape)
        return dense

    @property
    def is_quantized(self) -> bool:
        return any(stored.quantized for stored in self.stored.values())

    @property
    def dtype(self) -> str:
        """The floating type that most of the weights have."""
        sizes: Counter[str] = Counter()
        for stored in self.stored.values():
            if "float" in stored.dtype:
                sizes[stored.dtype] += weight_count(stored.shape)
        return sizes.most_common(1)[0][0] if sizes else "bfloat16"


def weight_count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@dataclass(frozen=True, slots=True)
class Spec:
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        import torch

        return weight_count(self.shape) * int(getattr(torch, self.dtype).itemsize)


def write_safetensors(
    path: Path, specs: dict[str, Spec], blocks: Iterable[torch.Tensor], metadata: dict[str, str]
) -> None:
    """A safetensors file whose tensors come in blocks of rows, in the order of `specs`.

    The library writes a file only from tensors that are all in memory. The format: length of the header
    in 8 bytes, the header as JSON, the data (https://huggingface.co/docs/safetensors).
    """
    import torch

    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.bytes
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            written += file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert written == end, f"{path}: {written} of {end} bytes"
