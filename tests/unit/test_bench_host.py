"""The host memory that an arm's report names."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from fastlora.bench import memory
from fastlora.bench.memory import HostPeak, written_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")

MIB = 2**20


def test_the_peak_is_of_what_was_written_and_stays_when_it_has_gone(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"1" * 64 * MIB)
    with HostPeak(every_s=0.001) as host, big.open("rb") as file:
        start = host.gib()
        assert start is not None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            assert pages.find(b"2") == -1  # reads all of them
            read = host.gib()
        held = bytearray(b"1") * (256 * MIB)
        host._end.wait(0.1)
        del held
        end = host.gib()
    assert read is not None
    assert end is not None
    assert read - start < 32 / 1024
    assert 224 / 1024 < end - start < 320 / 1024
    assert host.gib(2**30) == pytest.approx(end + 1)
    assert not host._thread.is_alive()


@pytest.mark.parametrize("beside", [True, False])
def test_pinned_memory_is_counted_once(monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    pinned = 2**30
    monkeypatch.setattr(memory, "pinned_bytes", lambda: pinned)
    monkeypatch.setattr(memory, "_pinned_is_beside", lambda: beside)
    with HostPeak() as host:
        found = host.gib()
    assert found is not None
    assert found == pytest.approx(written_bytes() / 2**30 + beside, abs=0.05)


@pytest.mark.parametrize("counted", [True, False])
def test_whether_it_is_counted_is_tried(monkeypatch: pytest.MonkeyPatch, counted: bool) -> None:
    """With an allocator that has a free block of 16 MiB, which would tell nothing."""
    import torch

    blocks, written = [2**28], 2**30

    def empty(size: int, **_: object) -> torch.Tensor:
        nonlocal written
        if size > 2**24:
            blocks.append(size)
            written += counted * size
        return torch.zeros(1, dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(memory, "pinned_bytes", lambda: sum(blocks))
    monkeypatch.setattr(memory, "written_bytes", lambda: written)
    assert memory._pinned_is_beside() is not counted


def test_where_the_kernel_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    with HostPeak() as host:
        assert host.gib() is None
