"""Runs of the tiny model, cut to two layers, in this process."""

from __future__ import annotations

import io
import json
import shutil
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastlora.recipe.load import load_recipe
from fastlora.train.oom import Continuation
from fastlora.train.session import Request, train_run

SETTINGS = (
    "train.micro_batch=8", "train.effective_batch=8", "lora.dropout=0.0", "lora.alpha=4.0", "train.lr=1e-3",
    "train.scheduler=constant", "train.warmup_fraction=0.0", "train.save_every_steps=20",
    "train.eval_every_steps=50",
)  # fmt: skip


class Place:
    """A folder with a recipe for two layers of the tiny model."""

    def __init__(self, workplace: Any) -> None:
        self.work = workplace
        source, model = workplace.root / "recipes/tiny/model", workplace.folder / "model"
        shutil.copytree(source, model)
        config = json.loads((model / "config.json").read_text())
        config["num_hidden_layers"] = 2
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:2]
        (model / "config.json").write_text(json.dumps(config))
        text = workplace.recipe.read_text().replace("epochs = 2\n", "")
        workplace.recipe.write_text(text.replace(str(source), str(model)))
        self.said = ""

    def lengthen_some_rows(self) -> None:
        """So that lengths differ much."""
        rows = self.work.folder / "rows.jsonl"
        longer = []
        for number, line in enumerate(rows.read_text().splitlines()):
            row = json.loads(line)
            row["messages"][-1]["content"] += "x" * (24 if number % 6 == 0 else 0)
            longer.append(json.dumps(row) + "\n")
        rows.write_text("".join(longer))

    def run(self, *settings: str, resume: bool = False) -> dict[str, Any]:
        settings = (*SETTINGS, *settings)
        recipe = load_recipe(self.work.recipe, settings)
        said = io.StringIO()
        try:
            request = Request(recipe, str(self.work.recipe), settings, resume)
            return train_run(request, Console(file=said, width=2000))
        finally:
            self.said = said.getvalue()

    def adapter(self, number: int = 1) -> dict[str, torch.Tensor]:
        return load_file(self.work.path(number) / "adapter" / "adapter_model.safetensors")


def last(manifest: dict[str, Any]) -> int:
    return int(manifest["path"].rpartition("/")[2])


def assert_same(place: Place, one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the last bit. Held-out losses are means over other batches."""
    mine, yours = (
        [entry for entry in place.work.losses(last(run)) if entry[1] != "eval_loss"]
        for run in (one, other)
    )
    assert mine == yours
    mine, yours = place.adapter(last(one)), place.adapter(last(other))
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)


class Crash:
    """What a killed process is to its run: an end in the middle of a step, with nothing written for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at = at
        original = Continuation.train

        def train(continuation: Continuation, *rest: Any, **named: Any) -> Any:
            if continuation.step == self.at:
                raise RuntimeError("crashed")
            return original(continuation, *rest, **named)

        monkeypatch.setattr(Continuation, "train", train)
