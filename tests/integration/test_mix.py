"""A run on several sources: held-out losses of each, of the base model too; `--auto`; both resumed to the last bit."""

from __future__ import annotations

import io
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastlora.engines.peft import PeftEngine
from fastlora.errors import RunDirError
from fastlora.recipe import advice
from fastlora.recipe.load import load_recipe
from fastlora.train.callbacks import Metrics
from fastlora.train.checkpoints import Checkpoints
from fastlora.train.collate import Collator
from fastlora.train.held_out import CurveWatch
from fastlora.train.session import Request, train_run
from fastlora.train.stop import Interrupted

OPEN = """
[model]
name = "{model}"
quantization = "none"
seq_len_tokens = 64
[lora]
dropout = 0.1
[data]
sources = ["rows.jsonl"]
rehearsal = {{ source = "general.jsonl", share = 0.3 }}
{data}
[train]
epochs = 2
micro_batch = 4
lr = 2e-3
optimizer = "adamw"
{train}
[output]
dir = "runs"
"""


@pytest.fixture
def mixed(workplace: Any) -> Any:
    rows = (workplace.root / "recipes/tiny/cipher.jsonl").read_text().splitlines(keepends=True)
    (workplace.folder / "general.jsonl").write_text("".join(rows[100:200]))
    return workplace


def recipe(workplace: Any, data: str = "", train: str = "") -> None:
    model = workplace.root / "recipes/tiny/model"
    text = OPEN.format(model=model, data=data, train=train)
    workplace.recipe.write_text(text.replace('"runs"', f'"{workplace.folder}/runs"'))


def trained(workplace: Any, on_trained: Any = None, **how: Any) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    request = Request(load_recipe(workplace.recipe), str(workplace.recipe), **how)
    return train_run(request, Console(file=said, width=200), on_trained), said.getvalue()


def test_each_source_is_evaluated_as_it_would_be_alone(
    mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(mixed, "eval_split = 20", "eval_every_steps = 4\neffective_batch = 16")
    batches = 0

    def count(self: Any, *rest: Any, **_: Any) -> None:
        nonlocal batches
        batches += 1

    monkeypatch.setattr(Checkpoints, "on_prediction_step", count)
    alone: dict[str, tuple[float, int]] = {}

    def evaluate(model: Any, manifest: dict[str, Any]) -> None:
        from fastlora.data.prepare import prepare_data
        from fastlora.engines.base import load_tokenizer

        loaded = load_recipe(mixed.recipe)
        tokenizer = load_tokenizer(loaded.model)
        collate = Collator(int(tokenizer.pad_token_id), PeftEngine())
        model.eval()
        for label, rows in prepare_data(loaded, tokenizer, str).eval_by_source().items():
            total = 0.0
            for start in range(0, len(rows), 4):
                batch = list(rows.select(range(start, min(start + 4, len(rows)))))
                with torch.no_grad():
                    total += model(**collate(batch)).loss.item() * len(batch)
            alone[label] = (total / len(rows), len(rows))

    manifest, said = trained(mixed, evaluate)
    last = [entry for entry in mixed_metrics(mixed) if "eval_loss" in entry][-1]
    assert last["step"] == manifest["result"]["steps"]
    assert list(last["eval_loss_by_source"]) == list(alone) == ["rows", "general"]
    for label, (loss, _) in alone.items():
        assert last["eval_loss_by_source"][label] == pytest.approx(loss, rel=1e-5)
        assert manifest["result"]["eval_losses_by_source"][label][-1] == pytest.approx(
            loss, rel=1e-5
        )
        assert manifest["eval_before"]["by_source"][label] > loss
    rows = sum(count for _, count in alone.values())
    assert rows == 20
    whole = sum(loss * count for loss, count in alone.values()) / rows
    assert last["eval_loss"] == pytest.approx(whole, rel=1e-5)
    assert manifest["result"]["eval_losses"][-1] == last["eval_loss"]
    # No row is evaluated twice: once before training, and once at each evaluation.
    evaluations = 1 + len(manifest["result"]["eval_losses"])
    assert batches == evaluations * sum(math.ceil(count / 4) for _, count in alone.values())
    assert f"(rows {last['eval_loss_by_source']['rows']:.4f}, general " in said
    assert "advice: train.lr = 0.002: it is 6.67 times" in said
    assert manifest["advice"][0]["key"] == "train.lr"


def mixed_metrics(workplace: Any, number: int = 1) -> list[dict[str, Any]]:
    import json

    lines = (workplace.path(number) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(workplace: Any, number: int) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if key != "tokens_per_s"}
        for entry in mixed_metrics(workplace, number)
    ]


def adapter(path: Path) -> dict[str, bytes]:
    tensors = load_file(path / "adapter" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("packing", [False, True])
def test_auto_and_a_mix_resume_to_the_last_bit(
    mixed: Any, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    recipe(mixed, "packing = true" if packing else "")
    whole, said = trained(mixed, auto=True)
    filled = {one["key"]: one["value"] for one in whole["auto"]}
    assert filled.keys() == {
        "data.eval_split", "lora.rank", "lora.alpha", "train.effective_batch",
    }  # fmt: skip
    assert (filled["data.eval_split"], filled["lora.rank"]) == (0.1, 4)
    for one in whole["auto"]:
        section, _, name = one["key"].partition(".")
        assert whole["recipe"][section][name] == one["value"]
        assert f"auto: {one['key']} = {one['value']}: {one['why']}" in whole["notes"]
    assert whole["recipe"]["lora"]["dropout"] == 0.1  # written, so it stays
    assert whole["resume_command"].endswith("--auto --resume")

    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(CurveWatch, "on_evaluate", interrupt)
        with pytest.raises(Interrupted):
            trained(mixed, auto=True)
    with pytest.raises(RunDirError, match="begun with --auto"):
        trained(mixed, resume=True)
    # The rules may have changed since: what was filled then counts.
    monkeypatch.setattr(advice, "good_rank", lambda _: 8)
    resumed, said = trained(mixed, auto=True, resume=True)
    assert resumed["path"].endswith("/2")
    assert untimed(mixed, 2) == untimed(mixed, 1)
    assert adapter(mixed.path(2)) == adapter(mixed.path(1))
    assert resumed["eval_before"] == whole["eval_before"]
    assert resumed["recipe"] == whole["recipe"]
    assert resumed["advice"] == whole["advice"]
    assert "advice: train.lr" not in said  # it was told when the run began


def test_overfitting_is_said_while_it_happens_and_in_the_manifest(
    mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(mixed, "eval_split = 8", "eval_every_steps = 2\neffective_batch = 16")
    log = Metrics.on_log

    def planted(self: Any, args: Any, state: Any, control: Any, logs: Any, **rest: Any) -> None:
        step = state.global_step
        if "eval_loss" in logs:
            logs["eval_loss"] = 2.0 - 0.1 * step if step <= 4 else 1.2 + 0.1 * step
        elif "loss" in logs:
            logs["loss"] = 3.0 - 0.01 * step
        log(self, args, state, control, logs, **rest)

    monkeypatch.setattr(Metrics, "on_log", planted)
    manifest, said = trained(mixed)
    assert said.count("advice: overfitting since step 4: the held-out loss has risen") == 1
    after = [one for one in manifest["advice"] if one["when"] == "after"]
    assert [one["what"].partition(" (")[0] for one in after] == ["overfitting began after step 4"]
