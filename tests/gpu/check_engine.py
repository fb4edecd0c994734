"""One engine, one checkpoint: train by recipe, then compare with plain PEFT. Prints one line of JSON.

python check_engine.py train  RECIPE ENGINE CHECKPOINT DATA OUT   fastlora run, and the trained model's logits
python check_engine.py reload OUT                                 the same logits from plain PEFT
python check_engine.py overhead RECIPE ENGINE CHECKPOINT DATA OUT the trainer's steps against bare ones
python check_engine.py packing  RECIPE ENGINE CHECKPOINT DATA OUT whether packed rows see each other

Settings of the recipe may follow.

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

    recipe, engine, checkpoint, data, out, *more = arguments
    settings = [
        f"engine={engine}",
        f"model.name={checkpoint}",
        f'data.sources=["{data}"]',
        f"output.dir={out}/runs",
        *more,
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
        "answers": manifest["answers"],
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


def overhead(arguments: list[str]) -> dict[str, Any]:
    """Trainer's steps and bare ones in turn, in one process: forward, backward, clip, step; no trainer.

    The speed of a shared machine drifts by more than what is measured here, so that only neighbours
    compare. The bare steps learn nothing (lr 0), so that the training is undisturbed.
    """
    import bitsandbytes as bnb
    import torch
    from rich.console import Console
    from transformers import TrainerCallback

    from fastlora.train import trainer as wiring
    from fastlora.train.collate import split
    from fastlora.train.session import train_run

    request, _ = load(arguments)
    train = request.recipe.train
    times: dict[str, list[float]] = {"trainer": [], "bare": []}

    class BareSteps(TrainerCallback):  # type: ignore[misc]
        def __init__(self, trainer: Any) -> None:
            self.model, self.collate = trainer.model, trainer.data_collator
            self.rows = trainer.train_dataset
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = bnb.optim.AdamW8bit(self.parameters, lr=0.0, weight_decay=0.0)
            self.resumed = 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            # Else gradient checkpointing and dropout are off, which is faster, and not what was asked for.
            assert all(module.training for module in self.model.modules())
            if self.resumed:
                times["trainer"].append(time.perf_counter() - self.resumed)
            wrapped = self.model.forward
            self.model.forward = getattr(self.model, "_original_forward", wrapped)
            for parameter in self.parameters:
                parameter.grad = None
            started = time.perf_counter()
            for batch in range(train.accumulation_steps):
                places = range(batch * train.micro_batch, (batch + 1) * train.micro_batch)
                rows = self.collate([self.rows[place] for place in places])
                [inputs] = split(rows, train.micro_batch, self.collate.engine)
                on_gpu = {name: value.cuda() for name, value in inputs.items()}
                with torch.autocast("cuda", torch.bfloat16):
                    loss = self.model(**on_gpu).loss / train.accumulation_steps
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            times["bare"].append(time.perf_counter() - started)
            self.model.forward = wrapped
            self.resumed = time.perf_counter()

    build = wiring.build_trainer

    def with_bare_steps(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(BareSteps(trainer))
        return trainer

    wiring.build_trainer = with_bare_steps
    train_run(request, Console(stderr=True))
    bare, theirs = times["bare"][2:-1], times["trainer"][2:]  # the first ones compile
    ratios = sorted(b / a - 1 for a, b in zip(bare, theirs, strict=True))
    return {
        "overhead": round(ratios[len(ratios) // 2], 4),
        "overhead_p20_p80": [
            round(ratios[len(ratios) // 5], 4),
            round(ratios[-1 - len(ratios) // 5], 4),
        ],
        "bare_s": round(sorted(bare)[len(bare) // 2], 4),
        "trainer_s": round(sorted(theirs)[len(theirs) // 2], 4),
    }


def packing(arguments: list[str]) -> dict[str, Any]:
    """The loss of a row packed behind another, for two others: kept apart it cannot tell which."""
    import torch
    from rich.console import Console

    from fastlora.engines import choose_engine
    from fastlora.engines.packed import keep_rows_apart
    from fastlora.train.collate import Collator

    request, _ = load(arguments)
    say = Console(stderr=True).print
    engine = choose_engine(request.recipe.engine, say)
    engine.prepare()
    model = engine.load(request.recipe, say)
    model.train()
    draw = torch.Generator().manual_seed(0)
    first, other, last = torch.randint(0, 256, (3, 200), generator=draw).tolist()
    collate = Collator(0, engine)

    def loss(ids: list[int], lengths: list[int]) -> float:
        labels = [-100] * (len(ids) - len(last) + 1) + last[1:]  # the first follows the other row
        inputs = collate([{"input_ids": ids, "labels": labels, "seq_lengths": lengths}])
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return float(model(**{name: value.cuda() for name, value in inputs.items()}).loss)

    theirs = [loss(row + last, [200, 200]) for row in (first, other)]
    keep_rows_apart(model, engine, request.recipe, say)
    apart = [loss(row + last, [200, 200]) for row in (first, other)]
    together = [loss(row + last, [400]) for row in (first, other)]
    flash = bool(engine.longest_packed)
    return {"theirs": theirs, "apart": apart, "together": together, "flash": flash}


if __name__ == "__main__":
    results, sys.stdout = sys.stdout, sys.stderr
    command = {"train": train, "reload": reload, "overhead": overhead, "packing": packing}
    document = command[sys.argv[1]](sys.argv[2:])
    print(json.dumps(document), file=results)
