"""Which implementation of an op runs: Triton on a GPU, Triton's interpreter on request, else PyTorch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

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
    """Let FASTLORA_KERNELS be looked at again."""
    wanted.cache_clear()
    _chosen.cache_clear()


@cache
def wanted() -> str | None:
    """FASTLORA_KERNELS, as it was when it was last read."""
    return os.environ.get("FASTLORA_KERNELS")


@cache
def _chosen(name: str | None, device: torch.device, available: tuple[Backend, ...]) -> Backend:
    if name is None:
        on_gpu = device.type == "cuda" and find_spec("triton") is not None
        return "triton" if on_gpu and "triton" in available else "reference"
    for backend in available:
        if backend == name:
            if backend == "triton" and device.type != "cuda":
                raise ValueError(
                    f"FASTLORA_KERNELS=triton: the tensors are on {device}, and Triton needs a GPU"
                )
            if backend == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
                raise ValueError(
                    "FASTLORA_KERNELS=interpret: set TRITON_INTERPRET=1 too, before Triton is imported"
                )
            return backend
    raise ValueError(
        f"FASTLORA_KERNELS={name}: not a backend of this op; it has {', '.join(available)}"
    )
