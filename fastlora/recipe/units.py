"""Amounts of memory, as people write them."""

from __future__ import annotations

import math
import re


def gib_of(text: str) -> float | None:
    """GiB of "24GiB", "24G" or "24"; a GB is 10^9 bytes. None: not an amount, or none at all."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(GiB|GB|G)?\s*", text, re.IGNORECASE)
    if found is None or not 0 < float(found[1]) < math.inf:
        return None
    return float(found[1]) * (1e9 / 2**30 if (found[2] or "").upper() == "GB" else 1)
