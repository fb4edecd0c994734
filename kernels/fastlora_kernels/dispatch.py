"""Which implementation of an op runs: Triton on a GPU, Triton's interpreter on request, else PyTorch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["triton", "interpret", "reference"]


def choose_backend(device: torch.device, available: tuple[Backend, ...]) -> Backend:
    """The backend for tensors on `device`, among those an op has (`available`, never empty).

    The environment variable FASTLORA_KERNELS (triton, interpret or reference) overrides the choice. It is read
    once, and anew by each `attach`: a look at the environment costs the host some 3 us (benchmarks/host.py).
    Raises ValueError: an unknown name, or a backend that the op or the machine does not have.
    """
    return _chosen(wanted(), device, available)


def read_environment() -> None:
    """Look at FASTLORA_KERNELS again. Raises ValueError: an unknown name, or what this machine does not have."""
    wanted.cache_clear()
    _chosen.cache_clear()
    # The machine's device, not a model's: that may be moved to the GPU later.
    _chosen(
        wanted(), torch.device("cuda" if torch.cuda.is_available() else "cpu"), get_args(Backend)
    )


@cache
def wanted() -> str | None:
    """FASTLORA_KERNELS, as it was when it was last read; None: unset, or empty."""
    return os.environ.get("FASTLORA_KERNELS") or None


@cache
def _chosen(name: str | None, device: torch.device, available: tuple[Backend, ...]) -> Backend:
    if name is None:
        on_gpu = device.type == "cuda" and find_spec("triton") is not None
        return "triton" if on_gpu and "triton" in available else "reference"
    if name not in available:
        problem = f"not a backend; set it to one of {', '.join(available)}"
    elif name != "reference" and find_spec("triton") is None:
        problem = "Triton is not installed; pip install triton, set it to reference"
    elif name == "triton" and device.type != "cuda":
        problem = f"Triton needs a GPU, and this runs on {device}; set it to reference"
    elif name == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        problem = "set TRITON_INTERPRET=1 too, before Triton is imported"
    else:
        return name
    raise ValueError(f"FASTLORA_KERNELS={name}: {problem}, or unset it")
