"""Real models of transformers with our loss in their forward, against their own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from fastlora_kernels import attach
from fastlora_kernels.layers import head as layers
from fastlora_kernels.layers.head import attach_head, detach_head, is_attached
from fastlora_kernels.ops import head_loss
from fastlora_kernels.ops.head_loss import Shape, lora_head_loss
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from waits import Waits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "smollm3": {},
    "phi3": {},
    "glm4": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "stablelm": {},
    "nemotron": {},
}
TIED = {"gemma", "gemma2", "gemma3_text", "cohere"}
Results = dict[str, torch.Tensor]


def model_of(kind: str = "llama", tied: bool | None = None, **lora: Any) -> Any:
    """A PeftModel away from its start (B not zero), in float32 and training mode."""
    torch.manual_seed(0)
    tied = kind in TIED if tied is None else tied
    config = AutoConfig.for_model(kind, **SIZES | SERVED.get(kind, {}), tie_word_embeddings=tied)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    targets = ["q_proj"] if kind != "phi3" else ["qkv_proj"]
    targets += [] if tied else ["lm_head"]
    model = get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets} | lora)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("embed_tokens.weight"):
            nn.init.normal_(parameter, std=0.3)
    return model.to(DEVICE).train()


def batch(**more: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, 101, (3, 17), device=DEVICE)
    labels = ids.clone()
    labels[:, :5] = labels[2, 9:] = -100
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask} | more


def results(model: Any, autocast: bool = False, **more: Any) -> Results:
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = model(**batch(**more)).loss
    (3 * loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_close(ours: Results, theirs: Results) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call that reached the op, whether there was an adapter."""
    seen: list[bool] = []

    def spy(hidden: Any, weight: Any, bias: Any, a: Any, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append(a is not None)
        return lora_head_loss(hidden, weight, bias, a, *rest, **named)

    monkeypatch.setattr(layers, "lora_head_loss", spy)
    monkeypatch.setattr(head_loss, "LOGITS_BYTES", 7 * 101 * 4)
    return seen


@pytest.mark.parametrize("kind", SERVED)
def test_loss_and_gradients_are_the_classes_own(kind: str, calls: list[bool]) -> None:
    model = model_of(kind)
    theirs = results(model)
    assert attach_head(model) is None
    assert_close(results(model), theirs)
    assert calls == [kind not in TIED]
    assert any("lm_head.lora_A" in name for name in theirs) is (kind not in TIED)
    assert float(theirs["loss"]) > 0
    softcap = SERVED[kind].get("final_logit_softcapping")
    if softcap:  # it does something here
        model.get_base_model().config.final_logit_softcapping = None
        assert abs(float(results(model)["loss"] - theirs["loss"])) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_under_autocast_it_errs_no_more(kind: str, calls: list[bool]) -> None:
    model = model_of(kind)
    exact = results(model)
    theirs = results(model, autocast=True)
    assert attach_head(model) is None
    ours = results(model, autocast=True)
    assert len(calls) == 1
    for name, true in exact.items():
        error, allowed = (float((t[name] - true).norm()) for t in (ours, theirs))
        # The loss is one number, in which the rows' errors may cancel by luck.
        slack = 1e-3 if name == "loss" else EPS
        assert error <= 2 * allowed + slack * float(true.norm()), name


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": torch.tensor(77)},
        {"num_items_in_batch": 77},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(51).view(3, 17)},
        {"output_hidden_states": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_arguments_of_the_loss(more: dict[str, Any], calls: list[bool]) -> None:
    if more == {"ignore_index": 5}:
        more = more | {"labels": batch()["labels"].clamp(min=5)}
    model = model_of()
    theirs = results(model, **more)
    hidden = model(**batch(), output_hidden_states=True).hidden_states
    attach_head(model)
    assert_close(results(model, **more), theirs)
    assert len(calls) == 1
    output = model(**batch(), output_hidden_states=True)
    assert output.logits is None
    for own, their in zip(output.hidden_states, hidden, strict=True):
        assert torch.equal(own, their)


def test_positional_arguments(calls: list[bool]) -> None:
    model = model_of().get_base_model()
    given = batch()
    theirs = model(given["input_ids"], given["attention_mask"], labels=given["labels"]).loss
    attach_head(model)
    ours = model(given["input_ids"], given["attention_mask"], labels=given["labels"])
    torch.testing.assert_close(ours.loss, theirs)
    assert ours.logits is None
    assert calls == [True]


def test_beside_the_linear_layers_op(calls: list[bool]) -> None:
    """attach serves lm_head's layer as well, for calls without labels; here its parts are what is used."""
    plain = model_of()
    model = copy.deepcopy(plain)
    assert attach(model).served == {"q_proj": 2, "lm_head": 1}
    assert attach_head(model) is None
    assert_close(results(model), results(plain))
    assert calls == [True]
    torch.testing.assert_close(
        model(batch()["input_ids"]).logits, plain(batch()["input_ids"]).logits
    )


def own_forward(model: Any) -> None:
    model.get_base_model().forward = lambda **kwargs: None


LEFT: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "disabled": (lambda m: m.lm_head.enable_adapters(False), {}, "lm_head: adapter disabled"),
    "merged": (lambda m: m.lm_head.merge(), {}, "lm_head: adapter merged"),
    "dropout": (lambda m: None, {"lora_dropout": 0.5}, "lm_head: dropout in training"),
    "dora": (lambda m: None, {"use_dora": True}, "lm_head: DoRA"),
    "hook": (
        lambda m: m.lm_head.register_forward_hook(lambda m, i, o: o * 2),
        {},
        "hooks on lm_head",
    ),
    "whole": (
        lambda m: None,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "lm_head: layer is a ModulesToSaveWrapper",
    ),
    "loss": (
        lambda m: setattr(m.get_base_model(), "loss_function", lambda logits, labels, *_, **__: logits.mean()),
        {},
        "another loss function",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_is_the_classes_own_to_the_last_bit(case: str, calls: list[bool]) -> None:
    change, lora, reason = LEFT[case]
    model = model_of(**lora)
    change(model)

    def found() -> Results:
        torch.manual_seed(3)  # dropout
        return results(model)

    theirs = found()
    assert attach_head(model) == reason
    ours = found()
    assert calls == []
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_second_adapter_and_states_that_change(calls: list[bool]) -> None:
    plain = model_of()
    plain.add_adapter(
        "second", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    model = copy.deepcopy(plain)
    assert attach_head(model) is None

    def compare(served: list[bool]) -> None:
        calls.clear()
        assert_close(results(model), results(plain))
        assert calls == served

    compare([True])
    for each in (plain, model):
        each.set_adapter("second")
    compare([True])
    with model.disable_adapter(), plain.disable_adapter():
        for each in (plain, model):
            each.get_input_embeddings().weight.requires_grad_()
        compare([])
    for each in (plain, model):
        each.get_input_embeddings().weight.requires_grad_(False)
        each.base_model.set_adapter(["default", "second"])
    compare([])


def test_what_has_no_loss_to_take_has_logits(calls: list[bool]) -> None:
    plain = model_of()
    model = copy.deepcopy(plain)
    attach_head(model)
    given = batch()
    without = {name: value for name, value in given.items() if name != "labels"}
    assert torch.equal(model(**without).logits, plain(**without).logits)
    assert isinstance(model(**given, return_dict=False), tuple)
    for each in (plain, model):
        each.eval()
    assert torch.equal(model(**given).logits, plain(**given).logits)
    assert calls == []
    text = [each.generate(**without, max_new_tokens=4, do_sample=False) for each in (model, plain)]
    assert torch.equal(*text)


def test_the_most_labels_reach_the_op_and_no_forward_of_the_class(calls: list[bool]) -> None:
    model = model_of()
    assert not is_attached(model)
    theirs = results(model)
    attach_head(model)
    assert is_attached(model)
    assert_close(results(model, most_labels=40), theirs)
    with Waits() as waits:
        model(**batch(most_labels=40))
    assert not [wait for wait in waits.found if "fastlora_kernels" in wait]
    with model.disable_adapter():  # the op declines
        assert model(**batch(most_labels=40)).logits is not None
    assert len(calls) == 2
    detach_head(model)
    assert not is_attached(model)


def test_in_evaluation_where_asked_for(calls: list[bool]) -> None:
    model = model_of().eval()
    theirs = model(**batch()).loss
    assert attach_head(model, in_evaluation=True) is None
    with torch.no_grad():
        ours = model(**batch())
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.detach())
    assert len(calls) == 1


def test_it_is_the_same_model_to_everyone_else(tmp_path: Any, calls: list[bool]) -> None:
    model = model_of()
    base, before = model.get_base_model(), type(model.get_base_model())
    names = list(model.state_dict())
    attach_head(model)
    attach_head(model)
    assert type(base) is not before
    assert isinstance(base, before)
    assert type(base).__bases__ == (before,)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert_close(results(twin), results(model))
    assert calls == [True, True]
    merged = twin.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    detach_head(model)
    assert type(base) is before
    detach_head(model)


def test_a_wrapper_that_kept_our_forward_does_not_outlive_detach(calls: list[bool]) -> None:
    model = model_of()
    base = model.get_base_model()
    attach_head(model)
    kept = base.forward
    base.forward = lambda *args, **kwargs: kept(*args, **kwargs)  # as TRL does
    assert model(**batch()).logits is None
    assert attach_head(model) == "its forward was replaced"
    detach_head(model)
    assert model(**batch()).logits is not None
    assert calls == [True]


def test_a_loss_that_is_served_no_longer_is_said(
    calls: list[bool], said: Callable[[], list[str]]
) -> None:
    """Once; not what the report said, and not of what does not train."""

    def lines() -> list[str]:
        return [line.partition(": ")[2] for line in said() if line.startswith("loss: ")]

    model = model_of()
    assert attach_head(model) is None
    results(model)
    assert lines() == []
    hook = model.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(**batch())
    assert lines() == []
    results(model)
    results(model)
    (line,) = lines()
    assert line.startswith(
        "the model's own forward runs from now on, which holds all logits: hooks on lm_head"
    )
    assert attach_head(model) == "hooks on lm_head"
    results(model)
    assert lines() == []
    hook.remove()
    assert attach_head(model) is None
    hook = model.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    results(model)
    assert len(lines()) == 1  # after a new report
    hook.remove()
    detach_head(model)
    assert not any("fastlora" in name for name in vars(model.get_base_model()))
    assert attach_head(model) is None
    model.get_base_model().lm_head.merge()
    results(model)
    assert [line.partition("lm_head: ")[2][:14] for line in lines()] == ["adapter merged"]
    assert calls == [True]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_without_an_adapter(tied: bool, calls: list[bool]) -> None:
    """Tied, with the embedding trained whole: its gradient is the sum of both its uses."""
    model = model_of(tied=tied, target_modules=["q_proj"])
    embedding = model.get_input_embeddings().weight.requires_grad_()
    model.get_output_embeddings().weight.requires_grad_()
    theirs = results(model)
    assert embedding.grad is not None
    assert attach_head(model) is None
    assert_close(results(model), theirs)
    assert calls == [False]


def test_a_forward_is_known_by_its_class_where_another_has_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As unsloth's fused loss has Phi-3's."""
    monkeypatch.setattr(transformers.Phi3ForCausalLM, "forward", lambda self, **given: None)
    assert layers._shape_of(transformers.Phi3ForCausalLM.forward) is None
    shape = layers.shape_as_written(transformers.Phi3ForCausalLM)
    assert shape is not None
    assert shape(None) == Shape(1.0, None)
    for unknown in (transformers.GPT2LMHeadModel, int, type("Made", (), {})):
        assert layers.shape_as_written(unknown) is None


def test_other_forms_are_left(calls: list[bool]) -> None:
    for made in (
        transformers.MixtralForCausalLM,
        transformers.GPT2LMHeadModel,
        transformers.OPTForCausalLM,
    ):
        assert layers._shape_of(made.forward) is None
    assert attach_head(nn.ModuleDict()) == "the forward of ModuleDict has another form"

    class Own(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert layers._shape_of(Own.forward) is None
    model = model_of()
    own_forward(model)
    assert attach_head(model) == "its forward was replaced"


def test_dtypes_that_differ_are_pefts_outside_autocast(calls: list[bool]) -> None:
    model = model_of()
    model.get_base_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert attach_head(model) is None
    results(model)
    assert calls == []
    results(model, autocast=True)
    assert calls == [True]
