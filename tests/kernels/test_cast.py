from __future__ import annotations

import pytest
import torch
from fastlora_kernels.ops.cast import BLOCK, MOST, cast_into

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKENDS = [None] if CUDA else [None, "interpret"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, MOST, MOST + 1])
def test_each_where_it_belongs(
    count: int, dtype: torch.dtype, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts off what a GPU rounds")
    if backend:
        monkeypatch.setenv("FASTLORA_KERNELS", backend)
    shapes = [(3, 16), (1,), (BLOCK + 5, 2), (16, 64), (7, 7), (2, 3, 4), (40,)][:count]
    given = [torch.randn(shape, device=DEVICE) for shape in shapes]
    given[0] = given[0].half()  # each has a dtype of its own
    sizes = [one.numel() for one in given]
    starts = [sum(-(-size // 16) * 16 for size in sizes[:i]) for i in range(count)]
    out = torch.full((starts[-1] + sizes[-1] + 5,), torch.nan, device=DEVICE, dtype=dtype)
    cast_into(out, starts, given)
    between = torch.ones_like(out, dtype=torch.bool)
    for start, one in zip(starts, given, strict=True):
        assert torch.equal(out[start : start + one.numel()].view(one.shape), one.to(dtype))
        between[start : start + one.numel()] = False
    assert out[between].isnan().all()


def test_a_transposed_one() -> None:
    given = torch.randn(8, 5, device=DEVICE).T
    out = torch.empty(40, device=DEVICE)
    cast_into(out, [0], [given])
    assert torch.equal(out.view(5, 8), given)
