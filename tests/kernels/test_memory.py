"""What each op keeps for backward, to the byte; and on a GPU the most that it takes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from fastlora_kernels.ops.dora_linear import dora_linear
from fastlora_kernels.ops.eight_bit import EightBit
from fastlora_kernels.ops.embedding import lora_embedding
from fastlora_kernels.ops.glu import glu_lora_linear
from fastlora_kernels.ops.lora_linear import Projection, folds, lora_linear, lora_linears

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
T, K, N, R = (16384, 4096, 8192, 16) if CUDA else (40, 64, 96, 4)
HALF, FULL = 2, 4  # bytes
Case = tuple[Callable[[], Any], list[torch.Tensor], int, int, int]
"""The op, its inputs and weights, and in bytes: kept, and at once at the most, forward and backward."""


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * 0.1).to(dtype).requires_grad_()


def adapter(k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(R, k, dtype=torch.float32), random(n, R, dtype=torch.float32)


def weight(k: int, n: int, four_bit: bool) -> Any:
    dense = random(n, k).detach()
    if not four_bit:
        return dense
    return bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4").to(DEVICE)


def linear(four_bit: bool, dropout: float = 0.0) -> Case:
    x, w, (a, b) = random(T, K), weight(K, N, four_bit), adapter(K, N)
    dense = N * K * HALF * four_bit
    dropped = T * K * HALF * bool(dropout)
    folded = four_bit and folds(T, N, K, R)  # then x alone is kept
    kept = T * R * HALF * (not folded) + 8 * bool(dropout)
    forward = T * N * HALF + max(dense, dropped)
    backward = T * K * HALF + max(dense, dropped)
    op = lambda: lora_linear(x, w, None, a, b, 2.0, None, dropout)  # noqa: E731
    return op, [x, w, a, b], kept, forward, backward


def three(four_bit: bool) -> Case:
    x, given = random(T, K), []
    projections = []
    for n in (N, N // 4, N // 4):
        w, (a, b) = weight(K, n, four_bit), adapter(K, n)
        projections.append(Projection(w, None, a, b, 2.0))
        given += [w, a, b]
    kept = 3 * T * R * HALF * (not (four_bit and folds(T, N + N // 2, K, R)))
    dense = N * K * HALF * four_bit
    forward = T * (N + N // 2) * HALF + dense
    return lambda: lora_linears(x, projections), [x, *given], kept, forward, T * K * HALF + dense


def mlp() -> Case:
    """K is the width of the MLP here."""
    gate, up, w, (a, b) = random(T, K), random(T, K), weight(K, N, False), adapter(K, N)
    kept = T * R * HALF
    projection = Projection(w, None, a, b, 2.0)
    op = lambda: glu_lora_linear(gate, up, "silu", projection, torch.bfloat16)  # noqa: E731
    return op, [gate, up, w, a, b], kept, T * (N + K) * HALF, 3 * T * K * HALF


def eight_bit() -> Case:
    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(random(N, K).detach(), requires_grad=False).to(DEVICE)
    x, (a, b) = random(T, K), adapter(K, N)
    layer(x.detach())  # its scales are in place from now on
    op = lambda: lora_linear(x, EightBit(layer), None, a, b, 2.0)  # type: ignore[arg-type] # noqa: E731
    given = [x, a, b, layer.state.CB]
    # x in 8 bits beside y, made by bitsandbytes in int32, float16 and bfloat16; backward makes W dense.
    forward = T * (N * (FULL + HALF + HALF) + K)
    return op, given, T * R * HALF, forward, T * K * HALF + N * K * HALF


def dora(four_bit: bool, dropout: float = 0.0) -> Case:
    x, w, (a, b), m = random(T, K), weight(K, N, four_bit), adapter(K, N), random(N)
    # z, or y with a fold, and per output c and the norm.
    kept = (T * R * (not four_bit) + T * N) * HALF + 2 * N * FULL
    op = lambda: dora_linear(x, w, None, a, b, m, 2.0, dropout)  # noqa: E731
    dense = N * K * HALF * four_bit
    # Backward: c g, then dx beside it; with a fold dx beside W.
    backward = T * K * HALF + (dense or T * N * HALF)
    forward = max(2 * T * N, T * N + N * K * four_bit) * HALF
    if dropout:  # D(x) all the time; then x - D(x) beside W; in backward g W beside W, and dx twice
        forward = 2 * T * (K + N) * HALF + dense
        backward = max(backward + T * K * HALF, 3 * T * K * HALF + dense, 4 * T * K * HALF)
    return op, [x, w, a, b, m], kept, forward, backward


def embedding() -> Case:
    ids = torch.arange(T, device=DEVICE) % N
    w, (a, b) = random(N, K).detach(), adapter(N, K)
    op = lambda: lora_embedding(ids, w, a, b, 2.0)  # noqa: E731
    return op, [ids, w, a, b], T * R * HALF, T * K * HALF, 2 * N * R * FULL


CASES: dict[str, Callable[[], Case]] = {
    "dense": lambda: linear(False),
    "4 bits": lambda: linear(True),
    "dropout": lambda: linear(False, 0.1),
    "three": lambda: three(False),
    "three of 4 bits": lambda: three(True),
    "mlp": mlp,
    "8 bits": eight_bit,
    "dora": lambda: dora(False),
    "dora on 4 bits": lambda: dora(True),
    "dora, dropout": lambda: dora(False, 0.1),
    "dora on 4 bits, dropout": lambda: dora(True, 0.1),
    "embedding": embedding,
}


@pytest.mark.parametrize("case", CASES)
def test_kept_for_backward(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    op, given, kept, *_ = CASES[case]()
    ours = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = op()
    assert sum(found.values()) == kept
    del y


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", CASES)
def test_at_once(case: str) -> None:
    """Within 48 MiB for cuBLAS' workspace, the small products and their parts: less than a copy of x or y."""
    op, given, kept, forward, backward = CASES[case]()
    inputs = [tensor for tensor in given if tensor.requires_grad]

    def gradients(ys: Any, gs: list[torch.Tensor]) -> Any:
        return torch.autograd.grad(ys, inputs, gs)

    def outputs() -> tuple[torch.Tensor, ...]:
        ys = op()
        return ys if isinstance(ys, tuple) else (ys,)

    def above(start: int) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start

    slack = 48 * 2**20
    gs = [torch.randn_like(y) for y in outputs()]
    gradients(outputs(), gs)  # the workspace is there from now on
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ys = outputs()
    assert above(start) <= kept + forward + slack
    held = torch.cuda.memory_allocated() - start
    assert held <= kept + sum(y.nbytes for y in ys) + 2**20
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(ys, gs)
    assert above(start) <= backward + slack
