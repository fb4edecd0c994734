"""How much of an adapter's first updates arrives in bfloat16: losses step by step, with PEFT's layers and with ours.

python benchmarks/first_updates.py          (a minute on 2 CPU cores)

A random Llama of 8 layers of 512, NF4, rank 16 on all linear layers, AdamW at 2e-4 after a first step at 0. What is
printed for `float32` is computed in float32 throughout, on the same NF4 weights. On a CPU, where ours are the
reference path; the rounding is that of bfloat16 products everywhere.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["FASTLORA_KERNELS"] = "reference"  # which serves 4-bit weights on a CPU too

import bitsandbytes as bnb
import torch
from fastlora_kernels import attach
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, MICRO_BATCHES, ROWS, TOKENS = 6, 2, 2, 511
LR = 2e-4


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    base: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            linear = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            linear.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, linear.to("cpu"))
    base.is_loaded_in_4bit = True
    torch.manual_seed(1)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train()


def losses(how: str) -> list[float]:
    trained = model()
    if how == "float32":
        trained = trained.float()
        for module in trained.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype, module.compute_type_is_set = torch.float32, True
    elif how == "fastlora":
        attach(trained)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    pattern = torch.tensor([5, 6, 7]).repeat(TOKENS // 3 + 1)[: TOKENS - 1]
    found = []
    for step in range(STEPS):
        total = 0.0
        for place in range(MICRO_BATCHES):
            first = 10 + (step * MICRO_BATCHES + place) * ROWS
            ids = torch.stack(
                [torch.cat([torch.tensor([first + row]), pattern]) for row in range(ROWS)]
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=how != "float32"):
                loss = trained(input_ids=ids, labels=ids).loss / MICRO_BATCHES
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


def main() -> None:
    print("loss of each step; the third is the first after an update")
    for how in ("float32", "peft", "fastlora"):
        print(f"{how:9}", *(f"{loss:8.4f}" for loss in losses(how)), flush=True)


if __name__ == "__main__":
    main()
