"""GPUs: what their makers state, and the one in this machine."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace

REACHED = {"tflops": 0.76, "gb_s": 0.84}
"""Of the stated figures, what a 16-bit product of 8,192³ and a copy reach: H100 0.75 and 0.84 (3 machines), H200 0.80
and no copy measured."""


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    vram_gib: float | None
    tflops: float
    """Of a 16-bit matrix product, as reached."""
    gb_s: float
    """Of a copy, read and write together."""
    host_gb_s: float
    """From pinned host memory, or to it."""
    hopper: bool
    """Compute capability 9.0 or later: larger cuBLAS workspaces."""
    bfloat16: bool
    source: str


# Part of the name that nvidia-smi gives -> (GiB that CUDA can use, dense 16-bit TFLOP/s with float32 sums, GB/s,
# compute capability, generation of its PCIe with 16 lanes). TFLOP/s and GB/s are NVIDIA's; of the memory, H100's and
# H200's were read here, the others are what is usually reported and hold to 1 %. The first match counts, so longer
# names come first. Whole words: an RTX A1000 is no A100, a GH200 no H200.
_STATED: dict[str, tuple[float, float, float, float, int]] = {
    "B200": (178, 2250, 8000, 10.0, 5),
    "H200": (139.8, 989, 4800, 9.0, 5),
    "H100 NVL": (93.1, 835, 3900, 9.0, 5),
    "H100 PCIe": (79.2, 756, 2000, 9.0, 5),
    "H100": (79.2, 989, 3350, 9.0, 5),
    "A100 40GB": (39.4, 312, 1555, 8.0, 4),
    "A100": (79.2, 312, 1935, 8.0, 4),
    "L40S": (44.4, 362, 864, 8.9, 4),
    "L40": (44.4, 181, 864, 8.9, 4),
    "L4": (22.0, 121, 300, 8.9, 4),
    "A40": (44.4, 150, 696, 8.6, 4),
    "A10G": (22.0, 70, 600, 8.6, 4),
    "A10": (22.0, 125, 600, 8.6, 4),
    "RTX A6000": (47.5, 155, 768, 8.6, 4),
    "RTX 6000 Ada": (47.4, 364, 960, 8.9, 4),
    "RTX 5090": (31.4, 209, 1792, 12.0, 5),
    "RTX 4090": (23.5, 165, 1008, 8.9, 4),
    "RTX 3090": (23.6, 71, 936, 8.6, 4),
    "T4": (14.6, 65, 320, 7.5, 3),
    "V100 16GB": (15.8, 125, 900, 7.0, 3),
    "V100": (31.7, 125, 900, 7.0, 3),
}


_PCIE = {3: 12.6, 4: 25.2, 5: 60.0}
"""GB/s of a copy to or from pinned host memory over 16 lanes: measured on H200 machines; before generation 5 the usual
0.8 of what the lanes carry."""


GUESSED = "taken for an RTX 3090"
"""A Gpu's source, where it is not known."""


def known() -> list[str]:
    return list(_STATED)


def like_a_3090(name: str, vram_gib: float) -> Gpu:
    """What a GPU that is not known is taken for where speeds are only compared."""
    stated = gpu_named("RTX 3090")
    assert stated is not None
    return replace(stated, name=name, vram_gib=vram_gib, source=GUESSED)


def gpu_named(name: str, ceilings: dict[str, float] | None = None) -> Gpu | None:
    """`ceilings`: measured by `fastlora bench` on this GPU; they go before the stated ones. None: not known."""
    words = _words(name)
    # A laptop's has the name of a larger one.
    key = next((one for one in _STATED if _words(one) <= words and "laptop" not in words), None)
    if key is None and not ceilings:
        return None
    vram, tflops, gb_s, capability, pcie = _STATED.get(key or "", (None, 0.0, 0.0, 8.0, 4))
    source = f"NVIDIA's data sheet x {REACHED['tflops']}"
    tflops, gb_s = tflops * REACHED["tflops"], gb_s * REACHED["gb_s"]
    host_gb_s = _PCIE[pcie]
    if ceilings:
        tflops, gb_s = ceilings["gemm_tflops"], ceilings["copy_gb_s"]
        host_gb_s = ceilings.get("host_gb_s", host_gb_s)  # measured since November 2026
        source = "measured by fastlora bench"
    return Gpu(
        name=name,
        vram_gib=vram,
        tflops=tflops,
        gb_s=gb_s,
        host_gb_s=host_gb_s,
        hopper=capability >= 9,
        bfloat16=capability >= 8,
        source=source,
    )


def _words(name: str) -> set[str]:
    return set(re.split(r"[\s-]+", name.lower()))


def installed() -> tuple[str, float] | None:
    """(name, GiB that CUDA can use) of this machine's first GPU; None where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,memory.reserved", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
        name, total, reserved = done.stdout.splitlines()[0].rsplit(",", 2)
        held = (
            float(reserved) if reserved.strip().isdigit() else 0.0
        )  # by the driver; old ones do not say
        return name.strip(), (float(total) - held) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
