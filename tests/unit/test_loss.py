"""Whose loss a run takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fastlora.engines.liger import LigerEngine
from fastlora.engines.peft import PeftEngine
from fastlora.engines.unsloth import UnslothEngine
from fastlora.recipe.schema import Recipe
from fastlora.train.loss import adapted_head_allowed, takes_own_loss


def model_of(config: Any, *targets: str, **lora: Any) -> Any:
    base = AutoModelForCausalLM.from_config(config)
    return get_peft_model(base, LoraConfig(r=2, target_modules=list(targets), **lora))


LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
GPT2 = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)


OURS = "loss: fastlora, without the logits"


def taken(model: Any, engine: Any, chunked: bool | None = None) -> tuple[bool, list[str], bool]:
    """(own loss, notes, whether the model now answers without logits)."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {"sources": ["x.jsonl"]},
            "output": {"dir": "runs"},
            "train": {"chunked_loss": chunked},
        }
    )
    notes: list[str] = []
    own = takes_own_loss(recipe, model, engine, notes.append)
    ids = torch.arange(8)[None]
    return own, notes, model(input_ids=ids, labels=ids).logits is None


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("engine", [UnslothEngine(), LigerEngine()], ids=lambda e: e.name)
def test_other_engines_have_their_own(engine: Any, chunked: bool) -> None:
    assert taken(model_of(LLAMA, "q_proj"), engine, chunked) == (False, [], False)


def test_plain_chunked_and_adapted() -> None:
    assert taken(model_of(LLAMA, "q_proj"), PeftEngine()) == (True, [], False)
    assert taken(model_of(LLAMA, "q_proj"), PeftEngine(), chunked=True) == (True, [OURS], True)
    assert taken(model_of(LLAMA, "lm_head"), PeftEngine()) == (True, [OURS], True)
    own, notes, without_logits = taken(model_of(LLAMA, "lm_head", use_dora=True), PeftEngine())
    assert (own, without_logits) == (True, False)
    assert notes == ["loss: it holds all logits, because of an adapter (lm_head: DoRA)"]


def test_unset_it_is_ours_where_our_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    assert taken(model_of(LLAMA, "q_proj"), PeftEngine()) == (True, [OURS], True)
    assert taken(model_of(LLAMA, "q_proj"), PeftEngine(), chunked=False) == (True, [], False)
    own, (note,), without_logits = taken(
        model_of(GPT2, "c_proj", fan_in_fan_out=True), PeftEngine()
    )
    assert (own, without_logits) == (True, False)
    assert note.startswith("loss: it holds all logits (the forward of GPT2LMHeadModel")


def test_an_architecture_that_ours_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = model_of(GPT2, "c_proj", fan_in_fan_out=True)
    reason = "(the forward of GPT2LMHeadModel has another form)"
    assert taken(model, PeftEngine()) == (True, [], False)
    assert taken(model, PeftEngine(), True) == (True, [f"train.chunked_loss: not used {reason}"], False)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert taken(model, PeftEngine(), True) == (False, [f"train.chunked_loss: by TRL {reason}"], False)  # fmt: skip


def test_trl_finds_a_base_layer_while_its_trainer_is_made() -> None:
    model = model_of(LLAMA, "lm_head")
    with adapted_head_allowed(model):
        assert type(model.get_output_embeddings()) is nn.Linear
    assert isinstance(model.get_output_embeddings(), Linear)
    with pytest.raises(RuntimeError), adapted_head_allowed(model):
        raise RuntimeError
    assert isinstance(model.get_output_embeddings(), Linear)
    plain = model_of(LLAMA, "q_proj")
    with adapted_head_allowed(plain):
        assert "get_output_embeddings" not in vars(plain)
