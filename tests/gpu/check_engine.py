"""One engine, one checkpoint: train by recipe, then compare with plain PEFT. Prints one line of JSON.

python check_engine.py train  RECIPE ENGINE CHECKPOINT DATA OUT   fastlora run, and the trained model's logits
python check_engine.py reload OUT                                 the same logits from plain PEFT
python check_engine.py bare   RECIPE ENGINE CHECKPOINT DATA OUT   the same steps in a bare loop, without a trainer

A process per call: unsloth patches transformers for the whole process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def load(arguments: list[str]) -> Any:
    from fastlora.recipe import library
    from fastlora.recipe.load import load_recipe
    from fastlora.train.session import Request

    recipe, engine, checkpoint, data, out = arguments
    settings = [
        f"engine={engine}",
        f"model.name={checkpoint}",
        f'data.sources=["{data}"]',
        f"output.dir={out}/runs",
    ]
    return Request(load_recipe(library.find(recipe), settings), recipe, settings), Path(out)


def probe(model: Any, ids: list[int]) -> Any:
    import torch

    model.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
        return model(input_ids=torch.tensor([ids], device=model.device)).logits.float().cpu()


def train(arguments: list[str]) -> dict[str, Any]:
    import torch
    from rich.console import Console

    from fastlora.train.session import train_run

    request, out = load(arguments)

    def keep_logits(model: Any, manifest: dict[str, Any]) -> None:
        ids = manifest["probe_ids"][:256]
        with model.disable_adapter():
            bare_base = probe(model, ids)
        torch.save({"adapted": probe(model, ids), "base": bare_base}, out / "logits.pt")

    manifest = train_run(request, Console(stderr=True), on_trained=keep_logits)
    (out / "run.txt").write_text(manifest["path"])
    entries = [json.loads(line) for line in (Path(manifest["path"]) / "metrics.jsonl").open()]
    return {
        "result": manifest["result"],
        "losses": [round(entry["loss"], 4) for entry in entries if "loss" in entry],
        "merge": manifest.get("merge"),
        "notes": manifest["notes"],
        "load_s": manifest["load_s"],
        "machine": manifest["machine"],
        "versions": manifest["versions"],
    }


def reload(arguments: list[str]) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    out = Path(arguments[0])
    run = Path((out / "run.txt").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    quantization = None
    if manifest["recipe"]["model"]["quantization"] == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, manifest["dtype"]),
        )
    base = AutoModelForCausalLM.from_pretrained(
        manifest["recipe"]["model"]["name"],
        quantization_config=quantization,
        dtype=getattr(torch, manifest["dtype"]),
        device_map={"": 0} if torch.cuda.is_available() else {"": "cpu"},
    )
    ids = manifest["probe_ids"][:256]
    plain = probe(base, ids)
    got = probe(PeftModel.from_pretrained(base, str(run / "adapter")), ids)
    saved = torch.load(out / "logits.pt")
    wanted = saved["adapted"]

    def distance(left: Any, right: Any) -> float:
        return float((left - right).square().mean().sqrt() / right.square().mean().sqrt())

    return {
        "logit_error": distance(got, wanted),
        "base_error": distance(
            plain, saved["base"]
        ),  # the engine's own rounding, without the adapter
        "base_distance": distance(plain, wanted),  # what a forgotten adapter would give
        "top1": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
    }


def bare(arguments: list[str]) -> dict[str, Any]:
    """Forward, backward, clip, step on the same rows; no trainer, no callback, no logging."""
    import torch
    from rich.console import Console

    from fastlora.data.prepare import prepare_data
    from fastlora.engines import choose_engine
    from fastlora.engines.base import load_tokenizer, resolve_checkpointing
    from fastlora.train.collate import Collator

    request, _ = load(arguments)
    recipe = request.recipe
    say = Console(stderr=True).print
    engine = choose_engine(recipe.engine, say)
    engine.prepare()
    tokenizer = load_tokenizer(recipe.model)
    data = prepare_data(recipe, tokenizer, say)
    model = engine.load(recipe, say)
    if engine.name == "peft" and resolve_checkpointing(recipe, engine) == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    import bitsandbytes as bnb

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bnb.optim.AdamW8bit(parameters, lr=recipe.train.lr)
    collate = Collator(tokenizer.pad_token_id, engine)
    rows = list(data.train.select(range(min(len(data.train), 64))))
    batch, accumulation = recipe.train.micro_batch, recipe.train.accumulation_steps
    torch.cuda.reset_peak_memory_stats()
    speeds, losses, place = [], [], 0
    for _ in range(10):
        torch.cuda.synchronize()
        started, tokens, total = time.perf_counter(), 0, 0.0
        for _ in range(accumulation):
            inputs = {
                name: value.cuda(non_blocking=True)
                for name, value in collate(
                    [rows[(place + k) % len(rows)] for k in range(batch)]
                ).items()
            }
            place += batch
            tokens += inputs["input_ids"].numel()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**inputs).loss / accumulation
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(total), 4))
        torch.cuda.synchronize()
        speeds.append(tokens / (time.perf_counter() - started))
    settled = sorted(speeds[2:])
    return {
        "tokens_per_s_median": round(settled[len(settled) // 2]),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "losses": losses,
    }


if __name__ == "__main__":
    results, sys.stdout = sys.stdout, sys.stderr
    document = {"train": train, "reload": reload, "bare": bare}[sys.argv[1]](sys.argv[2:])
    print(json.dumps(document), file=results)
