"""Which engine `auto` is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plans import LLAMA_8B, card, recipe

import fastlora.engines.choose as module
from fastlora.engines.base import resolve_checkpointing
from fastlora.engines.choose import choose_engine
from fastlora.engines.peft import PeftEngine
from fastlora.errors import EngineError, RecipeError
from fastlora.plan.predict import predict
from fastlora.plan.shape import shape_of
from fastlora.recipe.schema import LoraSection


def chosen(
    monkeypatch: pytest.MonkeyPatch, name: str, targets: list[str], *, cuda: bool, unsloth: bool
) -> tuple[str, list[str]]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(module, "find_spec", lambda _: object() if unsloth else None)
    said: list[str] = []
    why = LoraSection(target_modules=targets).why_not_unsloth
    return choose_engine(name, said.append, why).name, said


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


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"engine": "unsloth"}, 'trains lm_head whole, not with LoRA; leave it out, or set engine = "peft"'),
        ({"train": {"checkpointing": "unsloth"}}, "engine has no 'unsloth', and unsloth trains lm_head whole"),
        ({"memory": {"stream_layers": 4}}, "unsloth trains lm_head whole, not with LoRA: leave one of the two out"),
    ],
)  # fmt: skip
def test_keys_that_go_with_unsloth_alone(sections: dict[str, Any], problem: str) -> None:
    asked = recipe(**{"engine": "auto", "lora": {"target_modules": ["lm_head"]}} | sections)
    with pytest.raises(RecipeError, match=problem):
        predict(asked, shape_of(LLAMA_8B, "8b"), card(80.0))
    if "train" in sections:
        with pytest.raises(EngineError, match="and unsloth trains lm_head whole"):
            resolve_checkpointing(asked, PeftEngine())


def test_what_else_does_nothing_is_no_problem_of_the_targets() -> None:
    asked = recipe(
        engine="unsloth",
        lora={"target_modules": ["q_proj"]},
        memory={"dense_layers": 4, "cuda_graphs": False},
    )
    notes = predict(asked, shape_of(LLAMA_8B, "8b"), card(80.0)).setup.notes
    assert any(note.startswith("memory.dense_layers: it does nothing") for note in notes)
