from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

# `python -m pytest` puts the working directory on the path, where the folder kernels/ would pass for a
# module of that name; the packages are imported from where they are installed.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT]


# Read when the libraries are imported, here and in every process that a test starts. No test asks the Hub,
# and two workers on two cores want a thread each.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # kernels then run on the CPU, for the tests that ask for that
    )


@pytest.fixture(autouse=True)
def _environment_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora_kernels import dispatch

    monkeypatch.setattr(dispatch, "wanted", lru_cache(maxsize=0)(dispatch.wanted.__wrapped__))
    dispatch.read_environment()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves tokens in the user's cache."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path_factory.getbasetemp() / "fastlora-cache"))


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return ROOT / "recipes" / "tiny" / "model"
