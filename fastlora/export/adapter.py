"""What an adapter does to each weight of its base: W' = m/|W + s B A| (W + s B A), or part of it.

LoRA, Hu et al. 2021; rsLoRA, Kalajdzievski 2023; DoRA, Liu et al. 2024. Shapes: rows first, as stored.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import EngineError
from fastlora.export.stream import Checkpoint

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?)"
)
# Each changes what the adapter does, beyond what is computed here.
_NOT_SERVED = (
    "target_parameters", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# The others rewrite the base before training.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(slots=True)
class Edit:
    """What becomes of one tensor of the base."""

    replaced: str | None = None
    """The adapter's tensor that takes its place first."""
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    bias: str | None = None
    """lora_B's, of lora_bias = true: added to the base's bias."""
    scaling: float = 1.0
    rows_are_inputs: bool = False
    """The weight is stored (inputs, outputs): Conv1D, and embeddings."""
    embedding: bool = False

    @property
    def needs_all_rows(self) -> bool:
        return self.magnitude is not None and self.rows_are_inputs


@dataclass(slots=True)
class Adapter:
    """The adapter in a folder, in PEFT's format.

    Raises EngineError: a kind that cannot be merged.
    """

    folder: Path
    config: dict[str, Any] = field(init=False)
    weights: Checkpoint = field(init=False)

    def __post_init__(self) -> None:
        self.config = json.loads((self.folder / "adapter_config.json").read_text(encoding="utf-8"))
        problems = [
            f"{key} = {json.dumps(self.config[key])}"
            for key in _NOT_SERVED
            if self.config.get(key) not in (None, False, [], {})
        ]
        if self.config.get("peft_type") != "LORA":
            problems.append(f"peft_type = {self.config.get('peft_type')!r}")
        start = self.config.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            problems.append(
                f"init_lora_weights = {start!r} (it rewrote the base; save the adapter with "
                "path_initial_model_for_weight_conversion)"
            )
        if problems:
            raise EngineError(
                f"{self.folder}: an adapter with {'; '.join(problems)} cannot be merged weight by weight; merge it "
                "with PEFT's merge_and_unload"
            )
        self.weights = Checkpoint(self.folder, WEIGHTS)

    def edits(self, input_rows: set[str]) -> dict[str, Edit]:
        """By the name of the base's parameter. `input_rows`: modules whose weight is (inputs, outputs)."""
        edits: dict[str, Edit] = {}

        def edit(parameter: str) -> Edit:
            return edits.setdefault(parameter, Edit())

        for key in self.weights.stored:
            name = key.removeprefix(_PREFIX)
            found = _PART.fullmatch(name)
            if found is None:
                edit(name.replace(".base_layer.", ".")).replaced = key
                continue
            module, part = found["module"], found["part"]
            if part == "lora_B.bias":
                bias = edit(f"{module}.bias")
                bias.bias, bias.scaling = key, self._scaling(module)
                continue
            weight = edit(f"{module}.weight")
            weight.scaling = self._scaling(module)
            weight.embedding = weight.embedding or part.startswith("lora_embedding")
            weight.rows_are_inputs = weight.embedding or module in input_rows
            if part.startswith("lora_magnitude"):
                weight.magnitude = key
            elif part.removesuffix(".weight").endswith("A"):
                weight.a = key
            else:
                weight.b = key
        halves = [name for name, edit in edits.items() if (edit.a is None) != (edit.b is None)]
        if halves:
            raise EngineError(
                f"{self.folder}: {halves[0]} has only one of its two LoRA matrices ({len(halves)} such); the adapter "
                "is damaged"
            )
        return edits

    def _scaling(self, module: str) -> float:
        from peft.utils.other import get_pattern_key

        def of(pattern: dict[str, float] | None, default: float) -> float:
            pattern = pattern or {}
            return pattern.get(get_pattern_key(pattern.keys(), module), default)

        rank = of(self.config.get("rank_pattern"), self.config["r"])
        alpha = of(self.config.get("alpha_pattern"), self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def shape_problem(self, edit: Edit, shape: tuple[int, ...]) -> str | None:
        """Why `edit` does not fit a weight of `shape`."""
        stored = self.weights.stored
        if edit.replaced is not None and stored[edit.replaced].shape != shape:
            return f"the adapter's {edit.replaced} is {stored[edit.replaced].shape}, the base's {shape}"
        if edit.bias is not None and stored[edit.bias].shape != shape:
            return f"the adapter's {edit.bias} is {stored[edit.bias].shape}, the base's {shape}"
        if edit.a is None or edit.b is None:
            return None
        (rank, inputs), (outputs, rank_b) = stored[edit.a].shape, stored[edit.b].shape
        product = (inputs, outputs) if edit.rows_are_inputs else (outputs, inputs)
        if rank != rank_b or product != shape:
            return f"the adapter's B A is {product}, the base's weight {shape}"
        return None

    def apply(self, edit: Edit, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Rows `start` on of the edited tensor, in float32; `rows` are the base's, in any type."""
        import torch

        stop = start + (rows.shape[0] if rows.dim() else 1)
        weights = self.weights
        value = (
            rows.float()
            if edit.replaced is None
            else weights.rows(edit.replaced, start, stop).float()
        )
        if edit.bias is not None:
            value = value + edit.scaling * weights.rows(edit.bias, start, stop).float()
        if edit.a is None or edit.b is None:
            return value
        if edit.rows_are_inputs:
            left, right = weights.rows(edit.a)[:, start:stop].T, weights.rows(edit.b).T
        else:
            left, right = weights.rows(edit.b, start, stop), weights.rows(edit.a)
        value = torch.addmm(value, left.float(), right.float(), alpha=edit.scaling)
        if edit.magnitude is not None:
            magnitude = weights.rows(edit.magnitude).float().flatten()
            if edit.rows_are_inputs:
                value = value * (magnitude / value.norm(dim=0))
            else:
                value = value * (magnitude[start:stop] / value.norm(dim=1)).unsqueeze(1)
        return value
