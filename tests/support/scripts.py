"""The scripts in benchmarks/, which are no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(stem: str) -> ModuleType:
    """benchmarks/`stem`.py, run anew; under another name, since kernels.py has that of a folder."""
    name = f"bench_{stem}"
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks itself up
    spec.loader.exec_module(module)
    return module
