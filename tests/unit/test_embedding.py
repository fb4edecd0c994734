"""memory.embedding = "host" on a CPU: which tables go, what is then said, and what PyTorch and the driver are given.

That a GPU reads them right: tests/gpu/test_embedding.py.
"""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plans import recipe
from transformers import LlamaConfig, LlamaForCausalLM

from fastlora.engines import embedding, engaged
from fastlora.engines.embedding import embedding_line, embedding_to_host
from fastlora.engines.peft import PeftEngine


def model(*, tied: bool = False, **lora: Any) -> Any:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, use_cache=False, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    given = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **lora}
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(**given))


def copied(weight: torch.Tensor) -> torch.Tensor:
    """A stand-in for the tensor in host memory."""
    return weight.clone()


def test_the_model_has_the_same_numbers_in_another_place() -> None:
    peft = model()
    ids = torch.arange(2, 12)[None]
    weight = peft.get_input_embeddings().weight
    before, logits, kept = weight.data_ptr(), peft(input_ids=ids).logits, weight.detach().clone()
    assert embedding_to_host(peft, copied) == ""
    assert weight.data_ptr() != before
    assert peft.get_input_embeddings().weight is weight  # a parameter as before
    assert not weight.requires_grad
    assert torch.equal(weight, kept)
    assert torch.equal(peft(input_ids=ids).logits, logits)
    assert "0.00 GiB in host memory" in embedding_line(peft, "")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tied": True}, "output layer's weight"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapter"),
        ({"modules_to_save": ["embed_tokens"]}, "adapter"),
        # An adapter on the output layer says nothing of the table.
        ({"target_modules": ["q_proj", "lm_head"]}, ""),
    ],
)
def test_tables_with_another_use_stay(given: dict[str, Any], why: str) -> None:
    peft = model(**given)
    before = {name: value.data_ptr() for name, value in peft.named_parameters()}
    said = embedding_to_host(peft, copied)
    assert why in said
    assert bool(why) == bool(said)
    moved = [name for name, value in peft.named_parameters() if before[name] != value.data_ptr()]
    assert bool(moved) == (not why)


def test_tables_that_change_stay() -> None:
    trained, normed = model(), model()
    trained.get_input_embeddings().weight.requires_grad_()
    normed.get_input_embeddings().max_norm = 1.0
    assert embedding_to_host(trained, copied) == "it is trained"
    assert "max_norm" in embedding_to_host(normed, copied)


def refused(weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("The specified pointer is on the host.\nExplained at length.")


def test_what_cannot_be_had_leaves_it_where_it_is() -> None:
    peft = model()
    before = peft.get_input_embeddings().weight.data_ptr()
    why = embedding_to_host(peft, refused)
    assert why == "The specified pointer is on the host."
    assert embedding_line(peft, why) == f"memory.embedding: it stays where it is ({why})"
    assert embedding_to_host(peft) == "it is not on a GPU"
    assert peft.get_input_embeddings().weight.data_ptr() == before


@pytest.mark.parametrize("place", [None, "gpu", "host"])
def test_a_run_does_as_its_recipe_says(place: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    peft, said = model(), []
    before = peft.get_input_embeddings().weight.data_ptr()

    class Engine(PeftEngine):
        def load(self, *_: Any) -> Any:
            return peft

    monkeypatch.setattr(engaged, "embedding_to_host", lambda one: embedding_to_host(one, copied))
    engaged.load_model(Engine(), recipe(engine="peft", memory={"embedding": place}), said.append)
    told = [line for line in said if line.startswith("memory.embedding: ")]
    moved = peft.get_input_embeddings().weight.data_ptr() != before
    assert moved == bool(told) == (place == "host")


class Driver:
    """Of the functions that are called, those in `failing` do; the GPU sees host memory 4,096 bytes on."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.failing: set[str] = set()

    def __getattr__(self, function: str) -> Any:
        def call(*given: Any) -> int:
            place = given[1] if function == "cuMemHostGetDevicePointer_v2" else given[0]
            self.calls.append((function, place.value))
            if function == "cuMemHostGetDevicePointer_v2":
                given[0]._obj.value = place.value + 4096
            return 801 if function in self.failing else 0

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.calls.append(("wait", 0)))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pages_are_pinned_and_given_back(dtype: torch.dtype, driver: Driver) -> None:
    weight = torch.randn(5, 3).to(dtype)
    pinned = embedding._Pinned(weight)
    start = pinned.host.data_ptr()
    assert start % 4096 == 0
    assert torch.equal(pinned.host, weight)
    shown = pinned.__cuda_array_interface__
    assert shown["data"] == (start + 4096, False)
    assert shown["shape"] == (5, 3)
    assert shown["typestr"] == f"<i{weight.element_size()}"
    registered = [("cuMemHostRegister_v2", start), ("cuMemHostGetDevicePointer_v2", start)]
    assert driver.calls == registered
    del pinned, shown
    gc.collect()
    assert driver.calls == [*registered, ("wait", 0), ("cuMemHostUnregister", start)]


def test_what_the_driver_refuses_is_no_longer_pinned(driver: Driver) -> None:
    driver.failing = {"cuMemHostRegister_v2"}
    with pytest.raises(RuntimeError, match=r"cuMemHostRegister_v2: .* 801"):
        embedding._Pinned(torch.zeros(2, 2))
    gc.collect()
    assert [name for name, _ in driver.calls] == ["cuMemHostRegister_v2"]
    driver.failing = {"cuMemHostGetDevicePointer_v2"}
    with pytest.raises(RuntimeError, match="GetDevicePointer"):
        embedding._Pinned(torch.zeros(2, 2))
    assert driver.calls[-1][0] == "cuMemHostUnregister"


def test_a_host_with_too_little_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "host_free_bytes", lambda: 2**30)
    table: Any = SimpleNamespace(device=torch.device("cuda"), nbytes=2**30)
    with pytest.raises(RuntimeError, match=r"1\.00 GiB of host memory, of which 0\.50 are free"):
        embedding.in_host_memory(table)


def test_a_record_is_not_broken_by_what_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = [True]
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(embedding, "_call", lambda function, *given: done.append(function))
    embedding._release(torch.zeros(4))
    assert done == []
    recording[0] = False
    embedding._registered(torch.zeros(4))  # the next one that comes
    assert done[:2] == ["wait", "cuMemHostUnregister"]
