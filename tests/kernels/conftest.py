from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that an output that a kernel leaves out is seen."""
    if torch.cuda.is_available():  # there it would also forbid matrix products without a workspace
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Off a GPU, Triton means its interpreter, which knows float32 and float16."""
    name = str(request.param)
    if name == "triton" and not torch.cuda.is_available():
        name = "interpret"
    monkeypatch.setenv("FASTLORA_KERNELS", name)
    return name
