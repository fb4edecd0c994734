"""The versions that fastlora is tested with: those of pyproject.toml, to which a test holds them."""

from __future__ import annotations

PYTHON = ">=3.11"
NEEDED = {
    "torch": ">=2.10,<2.14",
    "bitsandbytes": ">=0.50",
    "transformers": ">=5.10,<=5.17.0",
    "trl": ">=1.14,<=1.15.0",
    "peft": ">=0.21",
    "accelerate": ">=1.12",
    "datasets": ">=4.8,<5",
}
FOR_GPU = {
    "triton": ">=3.6,<3.10",
    "xformers": ">=0.0.35",
    "unsloth": "==2026.10.9",
    "unsloth_zoo": "==2026.10.9",
}
TESTED = NEEDED | FOR_GPU
