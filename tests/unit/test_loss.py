"""Whose loss a run takes."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastlora.engines.liger import LigerEngine
from fastlora.engines.peft import PeftEngine
from fastlora.engines.unsloth import UnslothEngine, attach_own_loss
from fastlora.errors import EngineError
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


def taken(
    model: Any, engine: Any, chunked: bool | None = None, **sections: Any
) -> tuple[bool, list[str], bool]:
    """(own loss, notes, whether the model now answers without logits)."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {"sources": ["x.jsonl"]},
            "output": {"dir": "runs"},
            "train": {"chunked_loss": chunked},
            **sections,
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


def test_require_fast_refuses_all_logits_that_were_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    strict = {"kernels": {"require_fast": True}}
    other = functools.partial(model_of, GPT2, "c_proj", fan_in_fan_out=True)
    refused = (
        r"^kernels\.require_fast: the loss would hold all logits \(the forward of GPT2LMHeadModel"
    )
    for asked in (None, True):
        with pytest.raises(EngineError, match=refused):
            taken(other(), PeftEngine(), asked, **strict)
    assert taken(other(), PeftEngine(), False, **strict) == (True, [], False)
    assert taken(model_of(LLAMA, "lm_head"), PeftEngine(), **strict) == (True, [OURS], True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own, (note,), _ = taken(other(), PeftEngine(), True, **strict)
    assert (own, note.partition(" (")[0]) == (False, "train.chunked_loss: by TRL")


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


class Unsloths(LlamaForCausalLM):
    """A forward of the kind that unsloth gives the class: hidden states on demand, else its own loss."""

    seen: dict[str, Any]

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        causal_mask: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        return_dict: Any = None,
        logits_to_keep: Any = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.seen = {"labels": labels, **kwargs}
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES", "0") == "1":
            if kwargs.get("broken"):
                raise MemoryError
            return CausalLMOutputWithPast(loss=None, logits=hidden)
        logits = self.lm_head(hidden)
        return CausalLMOutputWithPast(loss=logits.mean(), logits=logits)


def unsloths(config: Any = LLAMA) -> Any:
    torch.manual_seed(0)
    base = Unsloths(config)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


RECORDED = {"memory": {"cuda_graphs": True}, "kernels": {"mode": "all"}}


def test_unsloths_loss_is_ours_for_graphs_alone() -> None:
    assert taken(unsloths(), UnslothEngine(), **RECORDED) == (True, [OURS], True)
    assert taken(unsloths(), UnslothEngine()) == (False, [], False)
    off = RECORDED | {"kernels": {"mode": "off"}}
    assert taken(unsloths(), UnslothEngine(), **off) == (
        False, ['loss: unsloth\'s (kernels.mode = "off")'], False,
    )  # fmt: skip


def test_it_is_the_loss_of_the_hidden_states_that_unsloth_gives(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    ids, items = torch.arange(24).view(2, 12) % 32, torch.tensor(40)
    labels = torch.where(ids % 3 == 0, -100, ids)
    plain = unsloths()
    plain.get_base_model().__class__ = LlamaForCausalLM
    expected = plain(input_ids=ids, labels=labels, num_items_in_batch=items).loss
    expected.backward()
    ours = unsloths()
    assert attach_own_loss(ours) is None
    monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "0")
    found = ours(input_ids=ids, labels=labels, num_items_in_batch=items, most_labels=20)
    found.loss.backward()
    assert found.logits is None
    assert os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] == "0"
    assert ours.get_base_model().seen["labels"] is labels  # or it would take padding for a mask
    torch.testing.assert_close(found.loss, expected)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)
    monkeypatch.delenv("UNSLOTH_RETURN_HIDDEN_STATES")
    with pytest.raises(MemoryError):
        ours(input_ids=ids, labels=labels, broken=True)
    assert "UNSLOTH_RETURN_HIDDEN_STATES" not in os.environ
    assert ours(input_ids=ids).logits.shape == (2, 12, 32)  # as an answer is generated


REWRITTEN = """
def forward(self, *args, **kwargs):
    raise AssertionError("its own loss was asked for")
"""


def test_a_forward_that_unsloth_rewrote_is_taken_for_what_the_class_was_written_as(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it does with Phi 3's when the module is imported, which gives no hidden states then."""
    config = Phi3Config(**(LLAMA.to_dict() | {"model_type": "phi3"}))
    make = lambda: get_peft_model(  # noqa: E731
        Phi3ForCausalLM(config), LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    )
    torch.manual_seed(0)
    plain = make()
    ids, items = torch.arange(24).view(2, 12) % 32, torch.tensor(40)
    labels = torch.where(ids % 3 == 0, -100, ids)
    expected = plain(input_ids=ids, labels=labels, num_items_in_batch=items).loss
    expected.backward()
    torch.manual_seed(0)
    ours = make()
    written: dict[str, Any] = {}
    exec(compile(REWRITTEN, "<unsloth-fused:Phi3ForCausalLM>", "exec"), written)
    monkeypatch.setattr(Phi3ForCausalLM, "forward", written["forward"])
    assert attach_own_loss(ours) is None
    found = ours(input_ids=ids, labels=labels, num_items_in_batch=items, most_labels=20)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)
    for forward in (functools.partial(written["forward"]), lambda self, **named: None):
        monkeypatch.setattr(Phi3ForCausalLM, "forward", forward)
        assert attach_own_loss(make()) == "unsloth's forward of phi3 does not give hidden states"


def test_where_unsloth_gives_no_hidden_states() -> None:
    scaled = LlamaConfig(**(LLAMA.to_dict() | {"logit_scale": 0.5}))
    assert attach_own_loss(unsloths(scaled)) == "logits are scaled (logit_scale)"
    other = model_of(GPT2, "c_proj", fan_in_fan_out=True)
    assert attach_own_loss(other) == "unsloth's forward of gpt2 does not give hidden states"

    class Logits(Unsloths):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
            return CausalLMOutputWithPast(logits=torch.zeros(1, 12, 32))

    lying = get_peft_model(Logits(LLAMA), LoraConfig(r=2, target_modules=["q_proj"]))
    assert attach_own_loss(lying) is None
    with pytest.raises(EngineError, match="32 numbers a token where the 16"):
        lying(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None])
