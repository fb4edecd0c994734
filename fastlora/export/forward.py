"""A model whose weights are in memory only while their layer computes: of any size, on any host, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

Weights = Callable[[str], "torch.Tensor"]
"""A parameter of the model by its full name, in any type."""


def compute_device() -> torch.device:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def streaming(
    model: Any, plain: PreTrainedModel, weights: Weights, device: torch.device
) -> Iterator[None]:
    """Within it `model` computes on `device`, with `weights` for all that is on the meta device. `plain` is the
    same model, or the one in it whose layers PEFT has wrapped."""
    hooks = []
    for name in _units(plain):
        unit = plain.get_submodule(name)
        hooks.append(unit.register_forward_pre_hook(_loader(name, weights, device)))
        hooks.append(unit.register_forward_hook(_unloader(unit)))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[key] = buffer.to(device)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _units(model: PreTrainedModel) -> list[str]:
    """What is loaded at once: a layer of a list of layers, and every other module with weights of its own."""
    from torch.nn import ModuleList

    lists = [name for name, module in model.named_modules() if isinstance(module, ModuleList)]
    units: dict[str, None] = {}
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        inside = [name for name in lists if parameter.startswith(f"{name}.")]
        if inside:
            outer = min(inside, key=len)
            number = parameter.removeprefix(f"{outer}.").partition(".")[0]
            units[f"{outer}.{number}"] = None
        else:
            # PEFT's wrapper, not what it wraps: it may look at the weight as well.
            owner = parameter.rpartition(".")[0]
            for part in (".base_layer", ".original_module", ".lora_", ".modules_to_save"):
                owner = owner.partition(part)[0]
            units[owner] = None
    return list(units)


def _loader(unit_name: str, weights: Weights, device: torch.device) -> Any:
    import torch

    def load(unit: torch.nn.Module, _: Any) -> None:
        unit._streamed = []  # type: ignore[assignment]
        for path, module in unit.named_modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is None or parameter.device.type != "meta":
                    continue
                inner = f"{path}.{key}" if path else key
                value = weights(f"{unit_name}.{inner}").to(device).float()
                module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
                unit._streamed.append((module, key, parameter))  # type: ignore[union-attr, operator]

    return load


def _unloader(unit: torch.nn.Module) -> Any:
    def unload(*_: Any) -> None:
        for module, key, parameter in unit._streamed:  # type: ignore[union-attr]
            module._parameters[key] = parameter
        unit._streamed = []  # type: ignore[assignment]

    return unload


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens that every model reads; `answer_from`: where the adapter's greedy answer begins, if they hold one."""

    ids: list[int]
    answer_from: int | None = None


def batches(rows: Sequence[Row], padded_tokens: int) -> list[list[Row]]:
    """Rows of like length together, no more than `padded_tokens` with their padding, but always one."""
    made: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if made and len(row.ids) * (len(made[-1]) + 1) <= padded_tokens:
            made[-1].append(row)
        else:
            made.append([row])
    return made


def logits_of(model: Any, batch: Sequence[Row], device: torch.device) -> list[torch.Tensor]:
    """Of each row (tokens, vocabulary), in float32, on the CPU."""
    import torch

    width = max(len(row.ids) for row in batch)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch])
    with torch.no_grad():
        logits = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
    return [logits[number, : len(row.ids)].float().cpu() for number, row in enumerate(batch)]
