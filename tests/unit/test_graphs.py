"""What is recorded, when, and what a record must not change; on a CPU, by a function that is run again."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastlora_kernels import recompute_layers
from peft import LoraConfig, get_peft_model
from reruns import Reruns
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from waits import Waits

from fastlora.train.causal import right_padded
from fastlora.train.graphs import Graphs, as_recorded
from fastlora.train.static import why_not


class Trained:
    """A model and a step on it, whose Python is counted."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.ran = 0

    def __call__(self, inputs: Any) -> torch.Tensor:
        self.ran += 1
        loss = self.model(inputs["x"]).square().sum() / inputs["items"]
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad.clone() for p in self.model.parameters()]

    def zero(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


def inputs(rows: int, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 4, generator=draw), "items": torch.tensor(float(1 + seed))}


def made(recorder: Any = None, **named: Any) -> tuple[Trained, Graphs, Any]:
    step = Trained()
    recorder = recorder or Reruns()
    return step, Graphs(recorder, step.model.parameters(), **named), recorder


def test_every_loss_and_gradient_is_that_of_the_function() -> None:
    """Over accumulation, shapes that come and go, and items that change: nothing lost, nothing twice."""
    plain, (step, graphs, recorder) = Trained(), made()
    kept = []
    for call, rows in enumerate((3, 3, 5, 3, 3, 5, 7, 3, 5, 5)):
        kept.append((graphs(step, inputs(rows, call)), plain(inputs(rows, call))))
        for own, want in zip(step.gradients(), plain.gradients(), strict=True):
            assert torch.equal(own, want)
        if call % 3 == 2:
            step.zero()
            plain.zero()
    assert all(torch.equal(own, want) for own, want in kept)  # no later replay has changed it
    assert recorder.warm_ups == [False, True, False, True, False]
    assert recorder.records == graphs.recorded == 2
    assert (graphs.calls, graphs.replays) == (10, 5)


def test_what_is_baked_is_recorded_by_itself() -> None:
    step, graphs, recorder = made(warm_ups=1)
    for scale in (1.0, 2.0, 1.0, 2.0):

        def scaled(given: Any, by: float = scale) -> torch.Tensor:
            return step({**given, "items": given["items"] / by})

        loss = graphs(scaled, inputs(3, 0), scale)
        assert torch.equal(loss, Trained()({**inputs(3, 0), "items": torch.tensor(1.0 / scale)}))
    assert recorder.records == 2


def test_no_more_shapes_than_allowed_and_none_that_comes_once() -> None:
    step, graphs, recorder = made(most=2)
    for rows in (1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 3):
        graphs(step, inputs(rows, rows))
    assert recorder.records == 2
    assert len(recorder.warm_ups) == 8
    assert graphs.replays == 2


def test_gradients_that_are_let_go_of_take_the_graphs_with_them() -> None:
    plain, (step, graphs, recorder) = Trained(), made(warm_ups=1)
    for call in range(6):
        graphs(step, inputs(3, call))
        plain(inputs(3, call))
        assert all(map(torch.equal, step.gradients(), plain.gradients()))
        if call == 2:
            step.model.zero_grad(set_to_none=True)
            plain.model.zero_grad(set_to_none=True)
    assert recorder.forgotten == 1
    assert recorder.records == 2


def test_dropped_they_come_again() -> None:
    step, graphs, recorder = made(warm_ups=1)
    for call in range(3):
        graphs(step, inputs(3, call))
    assert graphs.drop() == 1
    assert graphs.drop() == 0
    assert recorder.forgotten == 1
    for call in range(2):
        graphs(step, inputs(3, call))
    assert recorder.records == 2


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("\noperation not permitted\nmore"), "RuntimeError: operation not permitted"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_cannot_be_recorded_is_computed_as_usual(error: Exception, why: str) -> None:
    plain, (step, graphs, recorder) = Trained(), made(Reruns(fail={1: error}))
    for call, rows in enumerate((3, 3, 3, 5, 5, 5, 3, 5)):
        assert torch.equal(graphs(step, inputs(rows, call)), plain(inputs(rows, call)))
        assert all(map(torch.equal, step.gradients(), plain.gradients()))
    assert re.fullmatch(why + r", support/reruns.py:\d+", graphs.why_not)
    assert recorder.records == 2
    assert graphs.recorded == 0


def test_what_waits_is_found_before_it_is_recorded() -> None:
    step, graphs, recorder = made()

    def waiting(given: Any) -> torch.Tensor:
        loss = step(given)
        return loss if loss > 0 else -loss

    plain = Trained()
    for call in range(4):
        assert torch.equal(graphs(waiting, inputs(3, call)), plain(inputs(3, call)))
    assert "_local_scalar_dense" in graphs.why_not
    assert __file__ in graphs.why_not
    assert recorder.records == 0
    assert step.ran == 4
    assert all(map(torch.equal, step.gradients(), plain.gradients()))


def test_out_of_memory_is_the_callers_and_leaves_the_gradients() -> None:
    step, graphs, _ = made(Reruns(fail={0: torch.OutOfMemoryError("CUDA out of memory.")}))
    for call in range(2):
        graphs(step, inputs(3, call))
    before = step.gradients()
    with pytest.raises(torch.OutOfMemoryError):
        graphs(step, inputs(3, 2))
    assert all(map(torch.equal, step.gradients(), before))
    assert not graphs.why_not
    assert graphs.drop() == 1
    for call in range(4):
        graphs(step, inputs(3, call))
    assert graphs.replays == 2


def test_a_gradient_that_is_made_while_it_is_recorded_is_none_of_ours() -> None:
    class Making(Reruns):
        def record(self, function: Any, inputs: Any) -> Callable[[], torch.Tensor]:
            added.grad = torch.full((), float("nan"))  # in the memory of the graphs
            return super().record(function, inputs)

    step = Trained()
    added = nn.Parameter(torch.zeros(()))
    graphs = Graphs(Making(), [*step.model.parameters(), added])
    for call in range(4):
        graphs(step, inputs(3, call))
    assert added.grad is None
    assert "first gradient" in graphs.why_not
    plain = Trained()
    for call in range(4):
        plain(inputs(3, call))
    assert all(map(torch.equal, step.gradients(), plain.gradients()))


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("", ""),
        ("recomputed", ""),
        ("unsloth", ""),
        ("unsloth's loss", "unsloth's loss"),
        ("unsloth, packed", "unsloth reads the lengths"),
        ("unsloth, packed, flash attention", ""),
        ("unsloth, checkpointed", "unsloth's checkpointing"),
        ("unsloth, streamed", "memory.stream_layers"),
        ("packed", ""),
        ("TRL's loss", "TRL's loss"),
        ("checkpointed", "transformers' own checkpointing"),
        ("dropout", "dropout of 0.1 in base_model.model.model.layers.0"),
        ("attention", "attention_dropout of 0.2"),
    ],
)
def test_what_is_known_not_to_be_recordable(case: str, why: str) -> None:
    config = AutoConfig.for_model(
        "llama", **SIZES, attention_dropout=0.2 if case == "attention" else 0.0
    )
    lora = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1 if case == "dropout" else 0.0)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    if case == "recomputed":
        recompute_layers(model, ["layer", "keep"])
    if "checkpointed" in case:
        model.gradient_checkpointing_enable()
    if "streamed" in case:
        model._unsloth_block_swap = SimpleNamespace(indices=[1])
    engine: Any = SimpleNamespace(
        name="unsloth" if "unsloth" in case else "peft", longest_packed=9 * ("flash" in case)
    )
    found = why_not(model, engine, own_loss="loss" not in case, packing="packed" in case)
    assert found.startswith(why)
    assert bool(found) is bool(why)


SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more", "mask"),
    [
        ("llama", {}, False),
        ("mistral", {"sliding_window": 20}, False),
        ("mistral", {"sliding_window": 4}, True),
        ("gemma2", {"sliding_window": 4}, True),
    ],
)
def test_without_a_mask_for_padding_rows_see_what_they_saw(
    kind: str, more: dict[str, Any], mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **more)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    ids = torch.randint(3, 50, (3, 12))
    attention = torch.ones_like(ids)
    attention[1, 9:] = attention[2, 5:] = 0
    masks = []
    attend = nn.functional.scaled_dot_product_attention

    def seen(*given: Any, attn_mask: Any = None, **named: Any) -> torch.Tensor:
        masks.append(attn_mask is not None)
        return attend(*given, attn_mask=attn_mask, **named)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", seen)
    theirs = model(input_ids=ids, attention_mask=attention).logits
    assert all(masks)
    masks.clear()
    with right_padded(model), Waits() as waits:
        ours = model(input_ids=ids, attention_mask=attention).logits
    assert waits.found == []
    assert any(masks) is mask
    real = attention.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    again = model(input_ids=ids, attention_mask=attention).logits
    assert torch.equal(again, theirs)


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
def test_the_masks_of_flex_attention_wait_for_nothing() -> None:
    """unsloth gives it to Gemma 3. transformers looks into them while a graph is recorded, too. What a real token sees
    is the same."""
    from torch.nn.attention.flex_attention import create_mask
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        AttentionMaskInterface,
        create_causal_mask,
        create_sliding_window_causal_mask,
    )

    config = AutoConfig.for_model("gemma3_text", sliding_window=5, num_hidden_layers=2)
    config._attn_implementation = "flex_attention"
    model = SimpleNamespace(config=config)
    attention = torch.ones(2, 12, dtype=torch.int64)
    attention[1, 8:] = 0
    given = {"config": config, "inputs_embeds": torch.zeros(2, 12, 4), "past_key_values": None}

    def seen() -> list[torch.Tensor]:
        makers = (create_causal_mask, create_sliding_window_causal_mask)
        made = [make(**given, attention_mask=attention) for make in makers]
        return [create_mask(mask.mask_mod, 2, 1, 12, 12, device="cpu")[:, 0] for mask in made]

    def waits_of(make: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[str]]:
        with as_recorded(), Waits() as waits:
            return make(), waits.found

    theirs, waited = waits_of(seen)
    assert sum("masking_utils.py" in wait for wait in waited) == 2
    with right_padded(model):
        ours, waited = waits_of(seen)
    assert waited == []
    real = attention.bool()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our[real], their[real])
    assert not torch.equal(ours[0], ours[1])
    assert all(map(torch.equal, seen(), theirs))
    own = AttentionMaskInterface._global_mapping["flex_attention"]
    AttentionMaskInterface.register("flex_attention", lambda *given, **named: None)
    try:  # who registers one afterwards is heard
        assert ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"]() is None
    finally:
        AttentionMaskInterface.register("flex_attention", own)


def test_dense_weights_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over micro-batches, steps, and a shape that comes first when others are replayed already."""
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    import bitsandbytes as bnb
    from fastlora_kernels import DenseWeights, lora_linear

    def trained(dense: bool) -> tuple[list[torch.Tensor], DenseWeights]:
        torch.manual_seed(0)
        weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
        model = nn.ParameterDict(
            {"w": weight.to("cpu"), "a": torch.randn(4, 64) * 0.1, "b": torch.randn(64, 4) * 0.1}
        )
        adapter = [model["a"], model["b"]]
        weights = DenseWeights([model])
        graphs = Graphs(Reruns(), adapter, weights=weights if dense else None)
        optimizer = torch.optim.SGD(adapter, lr=0.1)

        def step(given: Any) -> torch.Tensor:
            loss = lora_linear(given["x"], model["w"], None, *adapter, 1.0).square().mean()
            loss.backward()
            return loss.detach()

        losses = []
        for call, rows in enumerate((64, 64, 64, 64, 80, 64, 80, 80, 64, 80)):
            x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(call))
            losses.append(graphs(step, {"x": x}))
            if call % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                graphs.stepped()
        assert graphs.replays == 6
        return losses, weights

    (plain, _), (dense, weights) = trained(dense=False), trained(dense=True)
    assert len({float(loss) for loss in plain}) == len(plain)
    assert all(torch.equal(one, other) for one, other in zip(dense, plain, strict=True))
    assert len(weights) == 1
