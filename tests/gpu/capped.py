"""`python capped.py GIB run ARGUMENTS`: fastlora, on a GPU of which PyTorch may reserve no more."""

from __future__ import annotations

import sys


def main() -> None:
    from fastlora.engines.base import prefer_expandable_segments

    prefer_expandable_segments()
    import torch

    cap_gib, arguments = float(sys.argv[1]), sys.argv[2:]
    card = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / card))
    from fastlora.cli.main import main as fastlora

    sys.argv = ["fastlora", *arguments]
    fastlora()


if __name__ == "__main__":
    main()
