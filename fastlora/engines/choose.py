"""The choice among the engines."""

from __future__ import annotations

from importlib.util import find_spec

from fastlora.engines.base import Announce, Engine
from fastlora.engines.liger import LigerEngine
from fastlora.engines.peft import PeftEngine
from fastlora.engines.unsloth import UnslothEngine
from fastlora.errors import EngineError


def choose_engine(name: str, announce: Announce, why_not_unsloth: str = "") -> Engine:
    """The engine of that name; `auto` is unsloth where a CUDA GPU and unsloth are there, else peft.
    `liger` is for the benchmark alone: no recipe can name it. `why_not_unsloth`: for which `auto` is peft, if any.

    Raises EngineError: unsloth is asked for and cannot run here.
    """
    import torch

    cuda, installed = torch.cuda.is_available(), find_spec("unsloth") is not None
    reason = "" if cuda and installed else "no CUDA GPU" if not cuda else "unsloth is not installed"
    if name == "peft":
        return PeftEngine()
    if name == "liger":
        return LigerEngine()
    if name == "unsloth" and reason:
        fix = "pip install 'fastlora[cuda]'" if cuda else 'set engine = "peft"'
        raise EngineError(f"engine: unsloth cannot run here: {reason}; {fix}")
    if name == "auto":
        if reason := reason or why_not_unsloth:
            announce(f"engine: peft ({reason})")
            return PeftEngine()
        announce("engine: unsloth")
    return UnslothEngine()
