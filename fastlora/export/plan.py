"""Which tensor of the base's checkpoint each part of an adapter changes, settled before anything is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import EngineError
from fastlora.export.adapter import Adapter, Edit
from fastlora.export.stream import Checkpoint, row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the merged checkpoint: the base's `source`, edited."""

    name: str
    source: str
    edit: Edit | None = None


def empty_model(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
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


class Plan:
    """How base and adapter become one checkpoint.

    parts: the tensors of the merged checkpoint, by name; of_parameter: the same by the model's own names.

    Raises EngineError: a part of the adapter that finds no weight, or one that does not fit.
    """

    def __init__(self, base: Path, adapter_folder: Path, trust_remote_code: bool = False) -> None:
        self.base, self.trust_remote_code = base, trust_remote_code
        self.config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
        method = (self.config.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise EngineError(
                f"{base}: quantized with {method}, which cannot be merged into; name the 16-bit original as model.name"
            )
        self.checkpoint = Checkpoint(base)
        self.adapter = Adapter(adapter_folder)
        self.model = empty_model(base, trust_remote_code)
        self._names()
        edits = self.adapter.edits(self._modules_with_input_rows())
        self.untied = self._untie(edits)
        self._assign(edits)

    def _names(self) -> None:
        """The model's names of the checkpoint's tensors, by transformers' own rules."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(self.model)
        self.shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        self.ties: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.source_of: dict[str, str] = {}
        self.fused: dict[str, list[str]] = {}
        """Parameters that are made of several tensors, or turned, at loading."""
        for stored in self.checkpoint.stored:
            name, pattern = rename_source_key(
                stored, renamings, converters, self.model.base_model_prefix, self.shapes
            )
            if pattern is not None:
                self.fused.setdefault(name, []).append(stored)
            else:
                self.source_of[name] = stored
        have = self.source_of.keys() | self.fused.keys()
        shared = {name for name, other in self.ties.items() if other in have}
        if missing := sorted(self.shapes.keys() - have - shared):
            raise EngineError(
                f"{self.base}: lacks {len(missing)} weights of {type(self.model).__name__}, such as {missing[0]}; the "
                "checkpoint is incomplete, or its names are not known to this version of transformers"
            )

    def _modules_with_input_rows(self) -> set[str]:
        from transformers.pytorch_utils import Conv1D

        return {name for name, module in self.model.named_modules() if isinstance(module, Conv1D)}

    def _untie(self, edits: dict[str, Edit]) -> bool:
        """Whether embedding and output layer must part, since the adapter changes one, or both differently."""
        untied = False
        for name, other in self.ties.items():
            mine, its = edits.get(name), edits.get(other)
            if mine is None and its is None:
                continue
            if self.adapter.config.get("ensure_weight_tying"):
                # PEFT then trains one change for both, and may save it under either name.
                edits[other] = its or mine  # type: ignore[assignment]
                edits.pop(name, None)
            elif self._same_replacement(mine, its):
                edits.pop(name, None)
            else:
                untied = True
        return untied

    def _same_replacement(self, mine: Edit | None, its: Edit | None) -> bool:
        """PEFT may save a frozen embedding twice, or beside the adapter: two whole tensors, alike."""
        import torch

        weights = self.adapter.weights
        if mine is None or its is None or mine.replaced is None or its.replaced is None:
            return False
        if mine.a or its.a or weights.stored[mine.replaced].shape != weights.stored[its.replaced].shape:
            return False
        return all(
            torch.equal(weights.rows(mine.replaced, *block), weights.rows(its.replaced, *block))
            for block in row_blocks(weights.stored[mine.replaced].shape)
        )

    def _assign(self, edits: dict[str, Edit]) -> None:
        self.parts: dict[str, Part] = {}
        self.of_parameter: dict[str, Part] = {}
        parameter_of = {stored: name for name, stored in self.source_of.items()}
        for stored in self.checkpoint.stored:
            name = parameter_of.get(stored, "")
            # Some checkpoints hold a shared weight twice.
            owner = name if self.untied else self.ties.get(name, name)
            self.parts[stored] = Part(stored, stored, edits.get(owner))
            if name:
                self.of_parameter[name] = self.parts[stored]
        for name, other in self.ties.items():
            if not self.untied:
                self.of_parameter[name] = self.of_parameter[other]
            elif name not in self.of_parameter:
                # The checkpoint had one tensor for two; its name for the second is the model's.
                part = Part(name, self.of_parameter[other].source, edits.get(name))
                self.parts[name] = self.of_parameter[name] = part
        problems = []
        for name in sorted(edits.keys() - self.of_parameter.keys()):
            if name in self.fused:
                problems.append(
                    f"{name} is made of {len(self.fused[name])} tensors when the model is loaded, such as "
                    f"{self.fused[name][0]}"
                )
            else:
                problems.append(f"the base has no weight {name}")
        for name, part in self.of_parameter.items():
            if part.edit is None:
                continue
            why = self.adapter.shape_problem(part.edit, self.checkpoint.stored[part.source].shape)
            if why:
                problems.append(f"{name}: {why}")
        if problems:
            raise EngineError(
                f"{self.adapter.folder}: the adapter does not fit {self.base}: {problems[0]} ({len(problems)} such); "
                "nothing was written. Was it trained on another base? Else merge it with PEFT's merge_and_unload"
            )

    def shape(self, part: Part) -> tuple[int, ...]:
        return self.checkpoint.stored[part.source].shape

    def blocks(self, part: Part, whole: bool = False) -> Iterator[torch.Tensor]:
        """The tensor of `part` a few rows at a time: edited, in float32; as it is stored where nothing edits it.

        Raises EngineError: a value that is not finite.
        """
        import torch

        shape = self.shape(part)
        one = [(0, shape[0] if shape else 1)]
        edit = part.edit
        for start, stop in (
            one if whole or (edit and edit.needs_all_rows) else row_blocks(shape)
        ):
            rows = self.checkpoint.rows(part.source, start, stop)
            if edit is not None:
                rows = self.adapter.apply(edit, rows, start)
                if not torch.isfinite(rows).all():
                    raise EngineError(
                        f"{self.adapter.folder}: with the adapter, {part.name} has values that are not finite"
                    )
            yield rows

    def weight(self, parameter: str, edited: bool = True) -> torch.Tensor:
        """All of a parameter, by the model's name, in float32; `edited`: with the adapter."""
        part = self.of_parameter[parameter]
        if not edited:
            part = Part(part.name, part.source)
        (tensor,) = self.blocks(part, whole=True)
        return tensor.float()
