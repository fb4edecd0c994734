"""How long a training is, counted as the trainer counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastlora.recipe.advice import default_epochs
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    from fastlora.data.prepared import Prepared


def effective_batch(recipe: Recipe) -> int:
    return recipe.train.micro_batch * recipe.train.accumulation_steps


def count_steps(recipe: Recipe, data: Prepared) -> tuple[int, float]:
    """(optimizer steps, epochs)."""
    micro_batches = math.ceil(len(data.train) / recipe.train.micro_batch)
    per_epoch = math.ceil(micro_batches / recipe.train.accumulation_steps)
    if recipe.train.steps is not None:
        return recipe.train.steps, round(recipe.train.steps / per_epoch, 4)
    epochs = recipe.train.epochs or default_epochs(data.stats.train.rows)
    return math.ceil(epochs * per_epoch), epochs
