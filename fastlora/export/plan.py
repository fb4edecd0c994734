"""Which tensor of the base's checkpoint each part of an adapter changes, settled before anything is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import EngineError
from fastlora.export.adapter import Adapter, Edit
from fastlora.export.names import Named, empty_model
from fastlora.export.stream import row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the merged checkpoint: the base's `source`, edited."""

    name: str
    source: str
    edit: Edit | None = None


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
        self.adapter = Adapter(adapter_folder)
        self.model = empty_model(base, trust_remote_code)
        self.names = Named(base, self.model)
        self.checkpoint, self.fused = self.names.checkpoint, self.names.fused
        edits = self.adapter.edits(self._modules_with_input_rows())
        self.untied = self._untie(edits)
        self._assign(edits)

    def _modules_with_input_rows(self) -> set[str]:
        from transformers.pytorch_utils import Conv1D

        return {name for name, module in self.model.named_modules() if isinstance(module, Conv1D)}

    def _untie(self, edits: dict[str, Edit]) -> bool:
        """Whether embedding and output layer must part, since the adapter changes one, or both differently."""
        untied = False
        for name, other in self.names.ties.items():
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
        if (
            mine.a
            or its.a
            or weights.stored[mine.replaced].shape != weights.stored[its.replaced].shape
        ):
            return False
        return all(
            torch.equal(weights.rows(mine.replaced, *block), weights.rows(its.replaced, *block))
            for block in row_blocks(weights.stored[mine.replaced].shape)
        )

    def _assign(self, edits: dict[str, Edit]) -> None:
        self.parts: dict[str, Part] = {}
        self.of_parameter: dict[str, Part] = {}
        parameter_of = {stored: name for name, stored in self.names.source_of.items()}
        for stored in self.checkpoint.stored:
            name = parameter_of.get(stored, "")
            # Some checkpoints hold a shared weight twice.
            owner = name if self.untied else self.names.ties.get(name, name)
            self.parts[stored] = Part(stored, stored, edits.get(owner))
            if name:
                self.of_parameter[name] = self.parts[stored]
        for name, other in self.names.ties.items():
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
        for start, stop in one if whole or (edit and edit.needs_all_rows) else row_blocks(shape):
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
