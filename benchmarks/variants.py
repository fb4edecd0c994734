"""Times, on a GPU, the pieces of the LoRA ops and the ways to do each, for choosing among them. Not for keeping.

python benchmarks/variants.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

import torch  # noqa: E402
from fastlora_kernels import launch  # noqa: E402
from fastlora_kernels.layers.linear import parts_of  # noqa: E402
from fastlora_kernels.ops import dequantize as dq  # noqa: E402
from fastlora_kernels.ops import glu, lora_linear, skinny  # noqa: E402

BF16 = torch.bfloat16


def timed(call: Callable[[], Any], repeats: int = 50) -> str:
    """ms on the GPU with a cold L2, and on the host until the call comes back."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(5):
        call()
    gpu, host = [], []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # so that the host is ahead: the GPU's time alone
        begin.record()
        start = time.perf_counter()
        call()
        host.append((time.perf_counter() - start) * 1e3)
        end.record()
        torch.cuda.synchronize()
        gpu.append(begin.elapsed_time(end))
    gpu.sort()
    host.sort()
    return f"gpu {gpu[repeats // 2]:8.4f}  host {host[repeats // 2]:8.4f}"


def show(name: str, call: Callable[[], Any]) -> None:
    print(f"  {name:58s} {timed(call)}", flush=True)


def skinny_pieces(tokens: int, k: int, n: int, rank: int) -> None:
    print(
        f"\nT={tokens} K={k} N={n} R={rank}: read of x or g alone at 3 TB/s: "
        f"{tokens * k * 2 / 3e9:.4f}, {tokens * n * 2 / 3e9:.4f} ms"
    )
    x = torch.randn(tokens, k, device="cuda", dtype=BF16)
    g = torch.randn(tokens, n, device="cuda", dtype=BF16)
    a = torch.randn(rank, k, device="cuda", dtype=BF16)
    b = torch.randn(n, rank, device="cuda", dtype=BF16)
    w = torch.randn(n, k, device="cuda", dtype=BF16)
    s, u = x @ a.T, torch.empty(tokens, rank, device="cuda", dtype=BF16)
    show("S = x A^T, cuBLAS", lambda: torch.mm(x, a.T))
    show("dA = U^T x, cuBLAS to float32", lambda: skinny.product(s.T, x))
    show("dA = (x^T U)^T, cuBLAS to float32", lambda: skinny.product(x.T, s))
    show("dA, bf16 out and a cast", lambda: torch.mm(s.T, x).float())
    show("U = g B, cuBLAS", lambda: u.addmm_(g, b, beta=0, alpha=2.0))
    show("dB = g^T S, cuBLAS to float32", lambda: skinny.product(g.T, s))
    show("dB = (S^T g)^T, cuBLAS to float32", lambda: skinny.product(s.T, g))
    if rank <= 64:
        for programs, stages in ((132, 3), (264, 2), (264, 3), (528, 2)):
            for block_t, block_n in ((64, 256), (128, 128), (64, 128), (32, 256)):
                skinny.PROGRAMS, skinny.STAGES = programs, stages
                skinny.BLOCK_T, skinny.BLOCK_N = block_t, block_n
                name = (
                    f"U and dB, one pass, {programs} programs, {stages} stages, {block_t}x{block_n}"
                )
                try:
                    show(name, lambda: skinny.in_one_pass(g, b, s, 2.0, u, torch.float32))
                except Exception as error:  # out of shared memory
                    print(f"  {name:58s} {type(error).__name__}")
        skinny.PROGRAMS, skinny.STAGES, skinny.BLOCK_T, skinny.BLOCK_N = 264, 2, 64, 256
    y = torch.empty(tokens, n, device="cuda", dtype=BF16)
    show("x W^T alone", lambda: torch.mm(x, w.T))
    show("x W^T, then addmm_ S B^T", lambda: torch.mm(x, w.T).addmm_(s, b.T))
    show("S B^T, then addmm_ x W^T", lambda: torch.mm(s, b.T).addmm_(x, w.T))
    show("S B^T alone", lambda: torch.mm(s, b.T, out=y))


def four_bit(k: int, n: int, rank: int) -> Any:
    import bitsandbytes as bnb

    print(f"\n4-bit K={k} N={n} R={rank}: write alone at 3 TB/s: {k * n * 2 / 3e9:.4f} ms")
    dense = torch.randn(n, k, device="cuda", dtype=BF16) * 0.02
    weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4").to("cuda")
    a = torch.randn(rank, k, device="cuda", dtype=BF16)
    b = torch.randn(n, rank, device="cuda", dtype=BF16)
    state = weight.quant_state
    show("bitsandbytes", lambda: bnb.functional.dequantize_4bit(weight.data, state))
    show("FourBit.of alone", lambda: dq.FourBit.of(weight))
    ready = dq.FourBit.of(weight)
    assert ready is not None
    for once in (False, True):
        dq.SCALES_ONCE = once
        for block_n, block_k in ((64, 128), (32, 128), (16, 256), (32, 256), (128, 128)):
            dq.BLOCK_N, dq.BLOCK_K = block_n, block_k
            for direct in (False, True):
                launch._works = direct
                name = f"scales once {once}, N={block_n} K={block_k}, direct launch {direct}"
                show(name, lambda: dq.dequantize(ready, BF16))
                if direct:
                    show(name + ", fold", lambda: dq.dequantize(ready, BF16, (a, b, 2.0)))
    dq.SCALES_ONCE, dq.BLOCK_N, dq.BLOCK_K, launch._works = True, 32, 128, True


def whole(k: int, n: int, tokens: int, rank: int, base: str, dora: bool = False) -> None:
    import importlib.util

    from fastlora_kernels import attach

    spec = importlib.util.spec_from_file_location("bench_kernels", HERE / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    print(f"\nwhole {base} dora={dora} K={k} N={n} T={tokens} R={rank}")
    size = bench.Size(k, n, tokens, rank)
    arms = bench.linear_arms(size, BF16, base, 0, dora)
    layer = bench.linear_layer(size, BF16, base, dora)
    attach(layer)
    show("parts_of alone", lambda: parts_of(layer))
    for arm in ("floor", "peft"):
        show(arm, arms[arm])
    one_pass = skinny.one_pass
    for first in (False, True):
        for always in (False, True):
            lora_linear.EXPAND_FIRST = first
            skinny.one_pass = lambda *sizes, always=always: always and sizes[2] <= 64
            show(f"ours, expand first {first}, one pass {always}", arms["ours"])
    skinny.one_pass, lora_linear.EXPAND_FIRST = one_pass, True
    show("ours, by the rules", arms["ours"])


def activations(tokens: int, width: int) -> None:
    print(
        f"\nGLU T={tokens} F={width}: 3 and 6 passes at 3 TB/s: "
        f"{3 * tokens * width * 2 / 3e9:.4f}, {6 * tokens * width * 2 / 3e9:.4f} ms"
    )
    gate, up, dh = torch.randn(3, tokens, width, device="cuda", dtype=BF16)
    for block in (512, 1024, 2048, 4096):
        glu.BLOCK_F = block
        show(f"forward, block {block}", lambda: glu._forward(gate, up, "silu", BF16))
        show(
            f"backward, block {block}",
            lambda: glu._backward(
                dh, gate, up, torch.empty_like(gate), torch.empty_like(up), "silu"
            ),
        )
    show("torch forward", lambda: torch.nn.functional.silu(gate) * up)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    for tokens in (4096, 16384):
        for rank in (16, 64):
            skinny_pieces(tokens, 4096, 4096, rank)
    skinny_pieces(4096, 4096, 14336, 16)
    skinny_pieces(4096, 14336, 4096, 16)
    four_bit(4096, 4096, 16)
    four_bit(4096, 14336, 16)
    activations(4096, 14336)
    for base in ("dense", "nf4"):
        for n, tokens in ((4096, 4096), (4096, 16384), (14336, 4096)):
            whole(4096, n, tokens, 16, base)
            whole(4096, n, tokens, 16, base, dora=True)
