"""4-bit weights of bitsandbytes, dense: against bitsandbytes itself, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from fastlora_kernels import reference
from fastlora_kernels.ops import dequantize as ops
from fastlora_kernels.ops.dequantize import dequantize
from fastlora_kernels.ops.four_bit import FourBit

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Whole blocks in a row, or an odd number of rows: with others, blocks that go on in the next row, bitsandbytes' own
# CPU kernel is wrong (0.50.2: a 64 x 96 matrix comes out 20 % off), and cannot be what ours is held to.
SHAPES = [(64, 128), (1, 64), (63, 130), (257, 70), (96, 1024)]


def quantized(n: int, k: int, blocksize: int, nested: bool, quant_type: str = "nf4") -> FourBit:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 0.02
    parameter = bnb.nn.Params4bit(
        weight, requires_grad=False, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    ).to(DEVICE)  # fmt: skip
    found = FourBit.of(parameter)
    assert found is not None
    return found


def bitsandbytes(n: int, k: int, blocksize: int, nested: bool, quant_type: str) -> torch.Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 0.02
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(codes, state)


def adapter(n: int, k: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    draw = torch.Generator().manual_seed(1)
    a = torch.randn(rank, k, generator=draw).to(DEVICE) / k**0.5
    return a, torch.randn(n, rank, generator=draw).to(DEVICE) * 0.02, 2.0


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("blocksize", "quant_type"), [(64, "nf4"), (128, "nf4"), (256, "nf4"), (64, "fp4")]
)
def test_it_is_bitsandbytes_matrix(
    n: int, k: int, nested: bool, blocksize: int, quant_type: str, backend: str
) -> None:
    if k % blocksize and n % 2 == 0:
        pytest.skip("bitsandbytes' own CPU kernel is wrong there")  # see SHAPES
    weight = quantized(n, k, blocksize, nested, quant_type)
    expected = bitsandbytes(n, k, blocksize, nested, quant_type)
    torch.testing.assert_close(dequantize(weight, torch.float32), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 512, 1024, 2048, 4096])
def test_the_other_sizes_of_a_block(nested: bool, blocksize: int, backend: str) -> None:
    for n, k in [(3, 4096), (1, 8192), (63, 4096)]:  # see SHAPES
        expected = bitsandbytes(n, k, blocksize, nested, "nf4")
        got = dequantize(quantized(n, k, blocksize, nested), torch.float32)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rank", [1, 16, 40, 130, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("backend", "hopper"),
    [("reference", False), ("triton", False), ("triton", True)],
    indirect=["backend"],
)
def test_the_fold_is_the_sum(
    n: int, k: int, rank: int, dtype: torch.dtype, hopper: bool, backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """err(ours, float32) <= 2 err(rounding the exact sum) + eps."""
    monkeypatch.setattr(ops, "_is_hopper", lambda device: hopper)
    weight, fold = quantized(n, k, 64, True), adapter(n, k, rank)
    a, b, scaling = fold
    exact = bitsandbytes(n, k, 64, True, "nf4") + scaling * (b @ a)
    got = dequantize(weight, dtype, fold)
    assert got.dtype == dtype
    # A and B are rounded to the dtype first: part of the allowance, as in the split products.
    plain = bitsandbytes(n, k, 64, True, "nf4") + scaling * (
        b.to(dtype).float() @ a.to(dtype).float()
    )
    allowed = 2 * float((plain.to(dtype).float() - exact).norm()) + 1e-6 * float(exact.norm())
    assert float((got.float() - exact).norm()) <= allowed


@pytest.mark.parametrize("rank", [16, 64, 130])
@pytest.mark.parametrize("hopper", [False, True])
def test_a_cast_fold_is_the_same_to_the_last_bit(
    rank: int, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a scaling by a power of two, though the tiles differ; on a CPU but for the order of NumPy's sums, which goes
    by the tile's shape and the processor (0.02 % of the weights are then off by a bit; unrounded A and B: 23 %)."""
    monkeypatch.setattr(ops, "_is_hopper", lambda device: hopper)
    # The interpreter knows no bfloat16. B is far from where float16 has fewer bits.
    monkeypatch.setenv("FASTLORA_KERNELS", "triton" if CUDA else "interpret")
    dtype = torch.bfloat16 if CUDA else torch.float16
    weight, (a, b, _) = quantized(257, 192, 64, True), adapter(257, 192, rank)
    b = b + 0.02 * b.sign()
    for scaling in (2.0, -0.5):
        wide = dequantize(weight, dtype, (a, b, scaling))
        cast = dequantize(weight, dtype, (a.to(dtype), b.to(dtype), scaling))
        assert torch.equal(wide, cast) if CUDA else float((wide != cast).float().mean()) < 0.002


def test_blocks_that_go_on_in_the_next_row(backend: str) -> None:
    """Each weight within what its scale leaves open: half of the widest gap in NF4's table, 0.15."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 0.02
    got = dequantize(quantized(64, 96, 64, False), torch.float32)
    scale = weight.view(-1, 64).abs().amax(dim=1).repeat_interleave(64).view(64, 96)
    assert float(((got - weight).abs() / scale).max()) < 0.16


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("fold", [False, True])
def test_bfloat16_on_a_gpu(fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantized(1000, 2050, 64, True)
    given = adapter(1000, 2050, 40) if fold else None
    ours = dequantize(weight, torch.bfloat16, given)
    exact = reference.dequantize(weight, torch.float32, given)
    rounded = reference.dequantize(weight, torch.bfloat16, given)
    assert float((ours - exact).norm()) <= 2 * float((rounded - exact).norm())


def test_other_layouts_are_not_taken() -> None:
    assert FourBit.of(torch.zeros(4, 4)) is None
    weight = bnb.nn.Params4bit(torch.zeros(4, 64), requires_grad=False)
    assert FourBit.of(weight) is None  # not quantized yet
    odd = bnb.nn.Params4bit(torch.randn(4, 33), requires_grad=False).to(DEVICE)
    assert FourBit.of(odd) is None
