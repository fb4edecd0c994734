"""Python's time for one call of our LoRA ops, in microseconds, on any machine: where a GPU waits for Python, it counts.

    python benchmarks/host.py [--profile CASE]

On CPU tensors too small to matter, as if on a GPU: the code that launches Triton kernels runs, the launches do nothing.
`registered`: the op as a compiled graph calls it; `eager`: the autograd.Function. PyTorch's own products are in it.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
from fastlora_kernels import dispatch
from fastlora_kernels.ops import (
    cast,
    dequantize,
    dora_linear,
    dropout,
    glu,
    lora_linear,
    registered,
    skinny,
)
from fastlora_kernels.ops.four_bit import FourBit
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, WIDTH, RANK = 16, 16, 8
DTYPE, MASTER = torch.float32, torch.float64
"""Of x and W, and of the adapters: in place of bfloat16 and float32, since a CPU's products in 16 bits take longer."""
REPEATS, ROUNDS = 300, 9


class Launched:
    """A Triton kernel and what it was compiled to, in one."""

    def __init__(self, kernel: Any) -> None:
        self.fn = kernel.fn

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **constants: self


def pretend() -> None:
    choose = dispatch.choose_backend
    gpu = torch.device("cuda", 0)

    def chosen(device: torch.device, available: Any) -> str:
        choose(gpu, available)
        return "triton"

    for module in (cast, dequantize, dora_linear, dropout, glu, skinny):
        module.choose_backend = chosen  # type: ignore[attr-defined]
        for name, value in list(vars(module).items()):
            if type(value).__name__ == "JITFunction":
                setattr(module, name, Launched(value))
    served = skinny.served
    for module in (skinny, lora_linear):
        module.served = lambda g, rank: (served(g, rank), True)[1]  # type: ignore[attr-defined]


def weight(kind: str) -> Any:
    if kind == "dense":
        return torch.randn(WIDTH, WIDTH, dtype=DTYPE)
    blocks = WIDTH * WIDTH // 64
    return FourBit(
        None, torch.zeros(WIDTH * WIDTH // 2, 1, dtype=torch.uint8), torch.zeros(blocks, dtype=torch.uint8),
        torch.zeros(16), (WIDTH, WIDTH), 64, torch.zeros(1), torch.zeros(256), 256, torch.zeros(()),
    )  # fmt: skip


def random(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def projection(kind: str) -> lora_linear.Projection:
    a, b = random(RANK, WIDTH, dtype=MASTER), random(WIDTH, RANK, dtype=MASTER)
    return lora_linear.Projection(weight(kind), None, a, b, 2.0)


class Calls(TorchDispatchMode):
    """Our ops that were called, and with what, as a graph would call them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == registered.NAME:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def case(ops: Any, op: str, kind: str) -> Callable[[], Any]:
    x, gate, up = (random(1, TOKENS, WIDTH) for _ in range(3))
    if op == "dora_linear":
        _, _, a, b, scaling, *_ = projection(kind)
        m, w = random(WIDTH, dtype=MASTER), weight(kind)
        return lambda: ops.dora_linear(x, w, None, a, b, m, scaling)
    if op == "glu_lora_linear":
        one = projection(kind)
        return lambda: ops.glu_lora_linear(gate, up, "silu", one, DTYPE)
    some = [projection(kind) for _ in range(3 if op == "lora_linears" else 1)]
    return lambda: ops.lora_linears(x, some)


class Eager:
    lora_linears = staticmethod(lora_linear.lora_linears)
    glu_lora_linear = staticmethod(glu.glu_lora_linear)
    dora_linear = staticmethod(dora_linear.dora_linear)


def calls(op: str, kind: str) -> dict[str, Callable[[], Any]]:
    """Forward and backward of both ways."""
    forward = case(registered, op, kind)
    with Calls() as seen:
        _backward(forward())()
    (fw, fw_args), (bw, bw_args) = seen.calls
    fw_args, bw_args = ([_detached(one) for one in args] for args in (fw_args, bw_args))
    eager = case(Eager, op, kind)
    return {
        "registered forward": torch.no_grad()(lambda: fw(*fw_args)),
        "registered backward": torch.no_grad()(lambda: bw(*bw_args)),
        "eager forward": eager,
        "eager backward": _backward(eager()),
    }


def _detached(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_detached(one) for one in arg]
    return arg.detach() if isinstance(arg, torch.Tensor) else arg


def _backward(ys: Any) -> Callable[[], Any]:
    ys = ys if isinstance(ys, tuple | list) else [ys]
    gs = [torch.ones_like(y) for y in ys]
    return lambda: torch.autograd.backward(ys, gs, retain_graph=True)


def microseconds(call: Callable[[], Any]) -> float:
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        rounds.append((time.perf_counter() - start) / REPEATS * 1e6)
    return min(rounds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", help="as 'lora_linears nf4 registered backward'")
    profile = parser.parse_args().profile
    torch.set_num_threads(1)
    pretend()
    for op in ("lora_linear", "lora_linears", "glu_lora_linear", "dora_linear"):
        for kind in ("nf4", "dense"):
            for name, call in calls(op, kind).items():
                title = f"{op} {kind} {name}"
                if profile is None:
                    print(f"{title:45s} {microseconds(call):7.1f}", flush=True)
                elif profile == title:
                    with cProfile.Profile() as profiler:
                        for _ in range(3000):
                            call()
                    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
