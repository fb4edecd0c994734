"""Environment variables, folders and the models in the Hub's cache."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlora.cache import cache_folder
from fastlora.doctor import Check
from fastlora.errors import RunDirError
from fastlora.rundir.store import check_place

_LITTLE_GIB = 10
_TRUE = ("1", "ON", "YES", "TRUE")


def offline() -> bool:
    """As huggingface_hub reads it."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in _TRUE


def variables(gpu: bool) -> Iterator[Check]:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    found = "the Hub is not asked" if offline() else "the Hub is asked for what the cache lacks"
    data = os.environ.get("HF_DATASETS_OFFLINE")
    if data is not None and (data.upper() in _TRUE) != offline():
        yield Check(
            "offline", "warn", f"{found} for models, and the contrary for data ({said})",
            f"unset HF_DATASETS_OFFLINE; export HF_HUB_OFFLINE={'1' if data.upper() in _TRUE else '0'}",
        )  # fmt: skip
    else:
        yield Check("offline", "ok", found + (f" ({said})" if said else ""))
    odd = {
        "FASTLORA_KERNELS": "the kernels are not chosen by the machine",
        "TRITON_INTERPRET": "Triton's kernels run in Python" if gpu else "",
        "CUDA_LAUNCH_BLOCKING": "the GPU waits for Python after every kernel" if gpu else "",
    }
    for name, effect in odd.items():
        if effect and os.environ.get(name, "") not in ("", "0"):
            yield Check(name, "warn", f"{os.environ[name]}: {effect}", f"unset {name}")


def folders() -> Iterator[Check]:
    """Whether each can be written, and has room."""
    home = Path.home()
    hub = Path(os.environ.get("HF_HUB_CACHE") or _hf_home() / "hub").expanduser()
    triton = Path(os.environ.get("TRITON_HOME") or home) / ".triton" / "cache"
    inductor = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    for name, path, variable in (
        ("runs", Path.cwd(), ""),
        ("fastlora cache", cache_folder(), "FASTLORA_CACHE"),
        ("hub cache", hub, "HF_HOME"),
        ("triton cache", Path(os.environ.get("TRITON_CACHE_DIR") or triton), "TRITON_CACHE_DIR"),
        (
            "compile cache",
            Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor),
            "TORCHINDUCTOR_CACHE_DIR",
        ),
    ):
        elsewhere = (
            f"export {variable}=/a/folder/with/room" if variable else "change to a folder with room"
        )
        try:
            check_place(path)
        except RunDirError as error:
            reason = str(error).partition("cannot be made here: ")[2].partition(";")[0]
            if name == "hub cache" and offline() and path.is_dir():
                yield Check(name, "ok", f"{path}, to be read only")
            else:
                yield Check(name, "wrong", f"{path} cannot be written: {reason}", elsewhere)
            continue
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        free_gib = shutil.disk_usage(existing).free / 2**30
        yield Check(
            name,
            "warn" if free_gib < _LITTLE_GIB else "ok",
            f"{path}, {free_gib:,.1f} GiB free",
            elsewhere if free_gib < _LITTLE_GIB else "",
        )


def _hf_home() -> Path:
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or users / "huggingface")


def models(answer: Mapping[str, Any]) -> Iterator[Check]:
    """`answer`: what the probe found in the Hub's cache."""
    if "error" in answer:
        yield Check(
            "base models", "warn", f"the Hub's cache cannot be read: {answer['error']}",
            "pip install --force-reinstall --no-deps huggingface_hub",
        )  # fmt: skip
        return
    for name in (name for name, _, incomplete in answer["models"] if incomplete):
        yield Check(
            "base models", "warn", f"{name} was not downloaded to its end", f"hf download {name}"
        )
    if answer["damaged"]:
        yield Check(
            "base models", "warn", f"damaged: {answer['damaged'][0]}", "remove that folder; it is downloaded again"
        )  # fmt: skip
    whole = [(name, gib) for name, gib, incomplete in answer["models"] if not incomplete]
    shown = ", ".join(f"{name} ({gib:.1f} GiB)" for name, gib in whole[:5])
    more = f" and {len(whole) - 5} more" if len(whole) > 5 else ""
    if whole:
        yield Check("base models", "ok", shown + more)
    elif offline():
        yield Check(
            "base models", "warn", "none in the Hub's cache, and the Hub is not asked",
            "set model.name to a folder with a model, or HF_HUB_OFFLINE=0 hf download MODEL",
        )  # fmt: skip
    else:
        yield Check(
            "base models", "ok", "none in the Hub's cache; they are downloaded when asked for"
        )
