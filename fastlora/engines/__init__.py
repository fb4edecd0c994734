"""Engines: who loads the base model and attaches the adapter. Each is the only importer of its framework."""

from fastlora.engines.base import Capabilities, Engine
from fastlora.engines.choose import choose_engine

__all__ = ["Capabilities", "Engine", "choose_engine"]
