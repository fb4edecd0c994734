"""Host memory within a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fastlora.engines.memory import host_free_bytes

MIB = 2**20


def group(folder: Path, version: int, limit: str, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    two = version == 2
    (folder / ("memory.max" if two else "memory.limit_in_bytes")).write_text(f"{limit}\n")
    (folder / ("memory.current" if two else "memory.usage_in_bytes")).write_text(f"{used}\n")
    name = "inactive_file" if two else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{name} {files}\nactive_file 7\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("inside", [True, False])
def test_of_a_container_what_its_limit_leaves(tmp_path: Path, version: int, inside: bool) -> None:
    """`inside`: the tree begins with the container's own group."""
    own, tree = tmp_path / "cgroup", tmp_path / "tree"
    top = tree / ("" if version == 2 else "memory")
    own.write_text("9:pids:/\n" + ("0::/a/b\n" if version == 2 else "4:memory:/a/b\n"))
    group(top if inside else top / "a/b", version, str(64 * MIB), 24 * MIB, 3 * MIB)
    assert host_free_bytes(tree, own) == 43 * MIB
    if not inside:  # a group holds for those in it
        group(top / "a", version, str(30 * MIB), 28 * MIB, 0)
        assert host_free_bytes(tree, own) == 2 * MIB
        group(top / "a", version, str(30 * MIB), 31 * MIB, 0)
        assert host_free_bytes(tree, own) == 0


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_without_a_limit_what_is_available(tmp_path: Path, limit: str) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/\n")
    group(tmp_path / "tree", 2, limit, MIB, 0)
    for tree, lines in ((tmp_path / "tree", own), (tmp_path / "none", tmp_path / "neither")):
        free = host_free_bytes(tree, lines)
        assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)
