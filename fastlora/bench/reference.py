"""What gradients ought to be: the cut-down model in float32, and how near plain PEFT comes to that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.bench import work as works
from fastlora.bench.arm import parity_rows, parity_step
from fastlora.bench.loaded import ArmTask
from fastlora.engines.memory import free_memory

if TYPE_CHECKING:
    from peft import PeftModel


class ReferenceTask(ArmTask):
    """`arm` is peft; `gradients` gets float32's."""

    plain_gradients: str
    """Gets those of plain PEFT in the recipe's own type."""


def run_reference(task: ReferenceTask) -> dict[str, Any]:
    """The parity step twice: in the recipe's type, and in float32 on the same (dequantized) weights."""
    import torch
    from safetensors.torch import save_file

    rows = parity_rows(works.load(Path(task.rows)), max(2, task.compared_rows))
    torch.backends.cuda.matmul.allow_tf32 = False
    plain = parity_step(task.load_for_parity(), rows)
    free_memory()
    save_file(plain, task.plain_gradients)
    # Loaded as the arms load it and only then widened: the same codes, the same rounded weights.
    loaded = task.load_for_parity()
    dequantize(loaded.model)
    loaded.model.float()
    loaded.dtype = torch.float32
    save_file(parity_step(loaded, rows), task.gradients)
    return {}


def dequantize(model: PeftModel) -> None:
    """Put float32 linear layers in the place of quantized ones, with exactly the weights that those
    stand for: code times scale, not rounded to 16 bits."""
    import bitsandbytes as bnb
    import torch

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, bnb.nn.Linear4bit):
                state = layer.weight.quant_state
                state.dtype = torch.float32
                weight = bnb.functional.dequantize_4bit(layer.weight.data, state)
            elif isinstance(layer, bnb.nn.Linear8bitLt):
                weight = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
            else:
                continue
            plain = torch.nn.Linear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
            )
            plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = torch.nn.Parameter(layer.bias.data.float(), requires_grad=False)
            setattr(parent, name, plain)
