"""What the parts of one run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlora.data.prepared import Prepared
from fastlora.engines import Engine
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir
from fastlora.train.notes import Notes
from fastlora.train.stop import StopSignals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Job:
    run: RunDir
    recipe: Recipe
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    check: dict[str, Any]
    """What was found in the data, as JSON."""
    notes: Notes
    signals: StopSignals
