"""Whose loss a run takes: that of the model's own forward, with our kernel in it where it is wanted, or TRL's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastlora.engines.base import Announce, Engine
from fastlora.engines.engaged import loss_line, plan_kernels, remedy
from fastlora.engines.unsloth import attach_own_loss
from fastlora.errors import EngineError
from fastlora.recipe.schema import Recipe

if TYPE_CHECKING:
    from peft import PeftModel


def takes_own_loss(recipe: Recipe, model: PeftModel, engine: Engine, announce: Announce) -> bool:
    """Whether `model(labels=...)` gives the loss; if not, TRL's trainer takes it from the weight of the output layer.

    Our kernel goes into the model for an adapter on its output layer, which TRL's loss would go past, for
    train.chunked_loss, and, where that is unset, wherever our kernels run. It serves most architectures; for the
    others the notes say what is done instead. On the unsloth engine it is there for memory.cuda_graphs alone.

    Raises EngineError: it would hold all logits, unasked, although kernels.require_fast is set.
    """
    import torch

    if engine.name != "peft":  # unsloth has put a fast one of its own in TRL's place
        if engine.name != "unsloth" or not recipe.memory.cuda_graphs:
            return False
        plan = plan_kernels(recipe)
        reason = attach_own_loss(model) if plan.ours else plan.why_not_ours
        announce(f"loss: unsloth's ({reason})" if reason else loss_line(None))
        return reason is None
    adapted, asked = _head_is_adapted(model), recipe.train.chunked_loss
    if not (adapted or asked or (asked is None and plan_kernels(recipe).ours)):
        return True
    from fastlora_kernels.layers.head import attach_head

    reason = attach_head(model, in_evaluation=True)
    if reason is None:
        announce(loss_line(None))
        return True
    # TRL's needs Triton, and is slower than logits where they fit.
    trls = bool(asked) and not adapted and torch.cuda.is_available()
    if adapted or not asked:
        announce(loss_line(reason, ", because of an adapter" if adapted else ""))
    else:
        announce(f"train.chunked_loss: {'by TRL' if trls else 'not used'} ({reason})")
    if recipe.kernels.require_fast and not trls and asked is not False:
        mend = remedy(reason, "")
        raise EngineError(
            f"kernels.require_fast: the loss would hold all logits ({reason}); {mend}{', or ' if mend else ''}"
            "set train.chunked_loss = false if it may, or set kernels.require_fast = false"
        )
    return not trls


@contextmanager
def adapted_head_allowed(model: PeftModel) -> Iterator[None]:
    """TRL's trainer refuses to be made for a model with an adapter on its output layer, for the sake of its own loss,
    which such a run does not take. Within this it finds the base layer there."""
    if not _head_is_adapted(model):
        yield
        return
    model.get_output_embeddings = model.get_output_embeddings().get_base_layer
    try:
        yield
    finally:
        del model.get_output_embeddings


def _head_is_adapted(model: PeftModel) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(model.get_output_embeddings(), BaseTunerLayer)
