"""Which engine `auto` is."""

from __future__ import annotations

import pytest
import torch
from plans import LLAMA_8B, card, recipe

import fastlora.engines.choose as module
from fastlora.engines.choose import choose_engine
from fastlora.errors import EngineError
from fastlora.plan.predict import predict
from fastlora.plan.shape import shape_of
from fastlora.recipe.schema import LoraSection


def chosen(
    monkeypatch: pytest.MonkeyPatch, name: str, targets: list[str], *, cuda: bool, unsloth: bool
) -> tuple[str, list[str]]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(module, "find_spec", lambda _: object() if unsloth else None)
    said: list[str] = []
    whole = LoraSection(target_modules=targets).trained_whole_by_unsloth
    return choose_engine(name, said.append, whole).name, said


@pytest.mark.parametrize(
    ("targets", "cuda", "unsloth", "engine", "line"),
    [
        (["q_proj"], True, True, "unsloth", "engine: unsloth"),
        (["q_proj"], True, False, "peft", "engine: peft (unsloth is not installed)"),
        (["q_proj"], False, True, "peft", "engine: peft (no CUDA GPU)"),
        (["q_proj", "lm_head"], True, True, "peft", "engine: peft (unsloth trains lm_head whole, not with LoRA)"),
        (["model.embed_tokens"], True, True, "peft", "engine: peft (unsloth trains embed_tokens whole, not with LoRA)"),
        (["lm_head"], False, True, "peft", "engine: peft (no CUDA GPU)"),
    ],
)  # fmt: skip
def test_auto(
    targets: list[str],
    cuda: bool,
    unsloth: bool,
    engine: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen(monkeypatch, "auto", targets, cuda=cuda, unsloth=unsloth) == (engine, [line])


def test_an_engine_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What unsloth cannot do with its targets is said of the recipe as a whole (test_checks.py)."""
    for name in ("unsloth", "peft", "liger"):
        assert chosen(monkeypatch, name, ["lm_head"], cuda=True, unsloth=True) == (name, [])
    with pytest.raises(EngineError, match="no CUDA GPU"):
        chosen(monkeypatch, "unsloth", ["q_proj"], cuda=False, unsloth=True)


@pytest.mark.parametrize(("targets", "engine"), [(["q_proj"], "unsloth"), (["lm_head"], "peft")])
def test_the_plan_is_of_the_same(targets: list[str], engine: str) -> None:
    asked = recipe(engine="auto", lora={"target_modules": targets})
    setup = predict(asked, shape_of(LLAMA_8B, "8b"), card(80.0)).setup
    assert setup.engine == engine
    assert any(note.startswith(f"engine: {engine}, ") for note in setup.notes)
