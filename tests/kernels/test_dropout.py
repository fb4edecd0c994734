from __future__ import annotations

import pytest
import torch
from fastlora_kernels.ops.dropout import draw_seeds, dropout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (63, 70), (257, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_values_are_scaled_and_the_seed_decides(
    tokens: int, k: int, dtype: torch.dtype, backend: str
) -> None:
    x = (torch.rand(tokens, k, device=DEVICE) + 0.5).to(dtype)
    one, other = torch.tensor([5, 6], device=DEVICE)
    found = dropout(x, 0.25, one)
    assert found.dtype == dtype
    kept = found != 0
    torch.testing.assert_close(found[kept], (x.float() / 0.75).to(dtype)[kept])
    assert torch.equal(found, dropout(x, 0.25, one))
    assert torch.equal(dropout(x, 0.0, one), x)
    size = tokens * k
    if size > 1:
        assert not torch.equal(found, dropout(x, 0.25, other))
        # Five standard deviations of a binomial count.
        assert abs(int(kept.sum()) - 0.75 * size) < 5 * (0.25 * 0.75 * size) ** 0.5


def test_seeds_come_from_torchs_generator() -> None:
    assert draw_seeds([0.0, 0.0], DEVICE) is None
    state = torch.get_rng_state()
    torch.manual_seed(0)
    first = draw_seeds([0.1, 0.0], DEVICE)
    again = draw_seeds([0.1, 0.0], DEVICE)
    torch.manual_seed(0)
    assert first is not None
    assert again is not None
    assert torch.equal(first, draw_seeds([0.1, 0.0], DEVICE))
    assert not torch.equal(first, again)
    torch.set_rng_state(state)
