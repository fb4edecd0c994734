from __future__ import annotations

from typing import Any

import pytest
import torch
from fastlora_kernels import launch as module
from fastlora_kernels.launch import launch


class Compiled:
    def __init__(self, log: list[Any], fails: bool = False) -> None:
        self.log, self.fails = log, fails

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*given: Any) -> None:
            if self.fails:
                raise TypeError
            self.log.append(("direct", grid, given))

        return run


class Kernel:
    """As Triton's: a launch compiles, and returns what was compiled."""

    def __init__(self, fails: bool = False) -> None:
        self.log: list[Any] = []
        self.compiled = Compiled(self.log, fails)

    @staticmethod
    def fn(x_ptr: Any, y_ptr: Any, size: Any, scaling: Any, FIRST: Any, BLOCK: Any) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*given: Any, **constants: Any) -> Compiled:
            self.log.append(("triton", grid, given, constants))
            return self.compiled

        return run


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "_works", True)


def ways(kernel: Kernel) -> list[str]:
    return [way for way, *_ in kernel.log]


def test_the_second_launch_is_direct_with_what_is_compiled_in() -> None:
    kernel, x, y = Kernel(), torch.zeros(8), torch.zeros(8)
    other = torch.ones(8)
    constants = {"BLOCK": 4, "FIRST": True}
    launch(kernel, (2,), (x, y), (8, 0.5), constants, num_warps=8)
    launch(kernel, (3, 4), (other, y), (9, 0.25), constants, num_warps=8)
    assert kernel.log == [
        ("triton", (2,), (x, y, 8, 0.5), constants | {"num_warps": 8}),
        ("direct", (3, 4, 1), (other.data_ptr(), y.data_ptr(), 9, 0.25, True, 4)),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": (torch.zeros(8).half(), torch.zeros(8))},
        {"tensors": (torch.zeros(9)[1:], torch.zeros(8))},  # another alignment
        {"numbers": (16, 0.5)},
        {"numbers": (1, 0.5)},
        {"numbers": (2**31 + 8, 0.5)},
        {"constants": {"FIRST": False, "BLOCK": 4}},
        {"num_warps": 4},
    ],
)
def test_what_triton_would_compile_anew(change: dict[str, Any]) -> None:
    kernel = Kernel()
    given: dict[str, Any] = {
        "tensors": (torch.zeros(8), torch.zeros(8)), "numbers": (8, 0.5),
        "constants": {"FIRST": True, "BLOCK": 4}, "num_warps": 8,
    }  # fmt: skip
    launch(kernel, (1,), **given)
    launch(kernel, (1,), **given | change)
    launch(kernel, (1,), **given)
    assert ways(kernel) == ["triton", "triton", "direct"]


def test_another_triton_is_launched_its_own_way() -> None:
    kernel = Kernel(fails=True)
    for _ in range(3):
        launch(kernel, (1,), (torch.zeros(8), torch.zeros(8)), (8, 0.5), {"FIRST": 1, "BLOCK": 4})
    assert ways(kernel) == ["triton"] * 3
