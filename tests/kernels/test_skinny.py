from __future__ import annotations

import pytest
import torch
from fastlora_kernels.ops import skinny
from fastlora_kernels.ops.skinny import (
    expand,
    expanded_by_hand,
    in_one_pass,
    one_pass,
    tile,
    up_and_gradient,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 16, 40, 64])
@pytest.mark.parametrize(
    ("tokens", "n", "transposed"), [(1, 1, False), (63, 70, True), (257, 300, False)]
)
def test_one_pass_is_both_products(
    tokens: int, n: int, rank: int, transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if CUDA:
        if dtype == torch.float32:
            pytest.skip("16-bit types alone")
    else:
        if dtype == torch.bfloat16:
            pytest.skip("needs a CUDA GPU")
        monkeypatch.setenv("FASTLORA_KERNELS", "interpret")
    # Several chunks of tokens, and several blocks of parts, at these sizes too.
    monkeypatch.setattr(skinny, "processors", lambda device: 6)
    monkeypatch.setattr(skinny, "PARTS_AT_ONCE", 2)
    torch.manual_seed(0)
    g, b = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((tokens, n), (n, rank)))
    if transposed:
        b = b.T.contiguous().T
    wide = torch.randn(tokens, rank + 16, device=DEVICE).to(dtype)
    down, ups = wide[:, 8 : 8 + rank], torch.full_like(wide, torch.nan)
    up = ups[:, 8 : 8 + rank]
    db = in_one_pass(g, b, down, 0.5, up, torch.float32)
    again = in_one_pass(g, b, down, 0.5, torch.empty_like(up), torch.float32)
    assert torch.equal(db, again)
    assert db.T.is_contiguous() if transposed else db.is_contiguous()
    assert ups[:, :8].isnan().all()
    assert ups[:, 8 + rank :].isnan().all()
    plain_up, plain_db = 0.5 * (g @ b), g.T @ down
    for found, plain, exact in (
        (up, plain_up, 0.5 * g.double() @ b.double()),
        (db, plain_db, g.double().T @ down.double()),
    ):
        error, allowed = (float((t.double() - exact).norm()) for t in (found, plain))
        assert error <= 2 * allowed + 1e-6 * float(exact.norm())


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("rank", [1, 16, 24, 40, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "n", "transposed"), [(1, 1, False), (63, 70, True), (257, 1100, False)]
)
def test_expanded_by_hand_is_the_product(
    tokens: int, n: int, transposed: bool, bias: bool, rank: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Into memory whose rows lie apart, of strips of a wider S; nothing written beside it."""
    if not CUDA:
        if dtype == torch.bfloat16:
            pytest.skip("needs a CUDA GPU")
        monkeypatch.setenv("FASTLORA_KERNELS", "interpret")
    taken = []
    monkeypatch.setattr(skinny, "expanded_by_hand", lambda *sizes: taken.append(sizes) or True)
    torch.manual_seed(0)
    b, added = (
        torch.randn(n, rank, device=DEVICE).to(dtype),
        torch.randn(n, device=DEVICE).to(dtype),
    )
    if transposed:
        b = b.T.contiguous().T
    down = torch.randn(tokens, rank + 16, device=DEVICE).to(dtype)[:, 8 : 8 + rank]
    wide = torch.full((tokens, n + 9), torch.nan, device=DEVICE, dtype=dtype)
    expand(wide[:, :n], down, b, 0.3, added if bias else None)
    exact = 0.3 * down.double() @ b.double().T + (added.double() if bias else 0.0)
    torch.testing.assert_close(wide[:, :n], exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert wide[:, n:].isnan().all()
    assert taken == [(tokens, n, rank)]


@pytest.mark.parametrize("which", ["out", "down", "bias"])
def test_what_lies_otherwise_is_left_to_cublas(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        monkeypatch.setenv("FASTLORA_KERNELS", "interpret")
    monkeypatch.setattr(skinny, "expanded_by_hand", lambda *sizes: True)
    torch.manual_seed(0)
    made = {"out": (20, 33), "down": (20, 8), "bias": (33,)}
    given = {
        name: torch.randn(*size, device=DEVICE, dtype=torch.float16) for name, size in made.items()
    }
    given[which] = torch.stack([given[which]] * 2, dim=-1)[..., 0]
    b = torch.randn(33, 8, device=DEVICE, dtype=torch.float16)
    expand(given["out"], given["down"], b, 0.5, given["bias"])
    exact = 0.5 * given["down"].double() @ b.double().T + given["bias"].double()
    torch.testing.assert_close(given["out"].double(), exact, rtol=2e-3, atol=2e-3)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded_by_hand(4096, 4096, 32)
    assert not expanded_by_hand(4096, 4096, 64)
    assert not expanded_by_hand(4096, 1024, 16)
    assert one_pass(16384, 4096, 16)
    assert not one_pass(16384, 4096, 64)
    assert one_pass(4096, 4096, 16)
    assert one_pass(4096, 1024, 16)
    assert not one_pass(512, 4096, 16)
    assert tile(227 * 1024, 14336, 16) == (512, 3)
    assert tile(227 * 1024, 4096, 16) == (256, 3)
    assert tile(99 * 1024, 14336, 16) == (128, 3)
    monkeypatch.setattr(skinny, "one_pass", lambda *sizes: False)
    g, b, down = torch.randn(5, 4), torch.randn(4, 2), torch.randn(5, 2)
    up = torch.empty(5, 2)
    assert up_and_gradient(g, b, down, 2.0, up, None) is None
    torch.testing.assert_close(up, 2 * g @ b)
