"""A checkpoint by the names that the model's own modules have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.errors import EngineError
from fastlora.export.stream import Checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder's configuration, its weights on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
        )
    return model.eval()


class Named:
    """The tensors of the checkpoint in `folder` under the names of `model`, by transformers' own rules.

    source_of: parameter -> tensor; fused: parameters that are made of several tensors, or turned, at loading;
    ties: parameters that are another's.

    Raises EngineError: weights of the model that the checkpoint does not have.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self.checkpoint, self.model = Checkpoint(folder), model
        self.ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.source_of: dict[str, str] = {}
        self.fused: dict[str, list[str]] = {}
        for stored in self.checkpoint.stored:
            name, pattern = rename_source_key(
                stored, renamings, converters, model.base_model_prefix, shapes
            )
            if pattern is None:
                self.source_of[name] = stored
            else:
                self.fused.setdefault(name, []).append(stored)
        have = self.source_of.keys() | self.fused.keys()
        shared = {name for name, other in self.ties.items() if other in have}
        if missing := sorted(shapes.keys() - have - shared):
            raise EngineError(
                f"{folder}: lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; the "
                "checkpoint is incomplete, or its names are not known to this version of transformers"
            )

    def weight(self, name: str) -> torch.Tensor:
        """A parameter that is not fused, in its own type."""
        return self.checkpoint.rows(self.source_of.get(name) or self.source_of[self.ties[name]])
