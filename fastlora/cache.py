"""Where what can be made again is kept: tokens, random checkpoints, compiled modules."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """FASTLORA_CACHE, else fastlora/ in the user's cache; absolute, not made."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FASTLORA_CACHE") or users / "fastlora").absolute()
