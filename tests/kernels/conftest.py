from __future__ import annotations

from collections.abc import Callable, Iterator

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


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Lines of our log since the last call of it."""

    def lines() -> list[str]:
        ours = [record for record in caplog.records if record.name == "fastlora_kernels"]
        assert all(record.levelname == "WARNING" for record in ours)
        found = [record.getMessage() for record in ours]
        caplog.clear()
        return found

    return lines
