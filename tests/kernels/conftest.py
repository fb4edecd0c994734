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
