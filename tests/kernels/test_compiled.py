"""Our layers inside a decoder layer that is compiled, as unsloth compiles it: one region per class, no fullgraph.

A graph break there would cost what compiling gains, and a failure puts the layer back to eager, with a line in
the log that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from fastlora_kernels import attach
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# Dynamo looks at the .grad of what it finds.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = DEVICE == "cpu"
DTYPE = torch.float32 if FULL else torch.bfloat16


@pytest.fixture(autouse=True)
def _own_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTLORA_KERNELS", "triton" if DEVICE == "cuda" else "reference")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(folder: Path, nf4: bool, **lora: Any) -> PeftModel:
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPE, device_map={"": DEVICE}, quantization_config=quantized if nf4 else None
    )
    base.config.use_cache = False
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **lora)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.train()
    return model


def step(model: PeftModel) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and every gradient."""
    ids = torch.randint(100, (2, 40), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    model.zero_grad()
    with torch.autocast(DEVICE, DTYPE, enabled=not FULL):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_one_graph_for_all_layers(
    tiny_model: Path, nf4: bool, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tiny_model, nf4, use_dora=dora)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert attach(model).left == {}
    loss, gradients = step(model)
    compiled = torch.compile(LlamaDecoderLayer.forward, fullgraph=False, backend="aot_eager")
    monkeypatch.setattr(LlamaDecoderLayer, "forward", compiled)
    for _ in range(2):
        again, found = step(model)
    assert dict(counters["graph_break"]) == {}
    # Without gradients and, when a layer is run again, with; each for all four layers.
    assert counters["stats"]["unique_graphs"] == 2
    tolerance = 1e-5 if FULL else 2e-2
    assert again == pytest.approx(loss, rel=tolerance)
    assert found.keys() == gradients.keys()
    for name, exact in gradients.items():
        error = float((found[name] - exact).norm())
        assert error <= tolerance * float(exact.norm()), name
