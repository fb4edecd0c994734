"""What [memory] and train.checkpointing ask of an engine: what is refused, what is chosen, what unsloth is told."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from flash import pretend_to_have_it

from fastlora.engines.kept import (
    dense_as_asked,
    keep_as_asked,
    memory_problems,
    modes_of,
    recompute_all,
)
from fastlora.engines.peft import PeftEngine
from fastlora.engines.unsloth import UnslothEngine, rows_as_long_as_they_are
from fastlora.errors import EngineError, RunDirError
from fastlora.recipe.schema import MemorySection, Recipe
from fastlora.rundir.store import RunDir
from fastlora.train.resume import MEMORY_KEYS, changed_keys, open_for_resume


def recipe(checkpointing: str = "full", quantization: str = "nf4", **memory: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "m", "quantization": quantization, "dtype": "float32"},
            "data": {"sources": ["rows.jsonl"]},
            "train": {"checkpointing": checkpointing},
            "memory": memory,
            "output": {"dir": "out"},
        }
    )


def test_every_problem_is_said_at_once() -> None:
    asked = recipe("unsloth", "int8", keep_attention_layers=2, stream_layers=4)
    keys = [line.partition(":")[0] for line in memory_problems(asked, PeftEngine())]
    assert keys == ["train.checkpointing", "memory.stream_layers"]
    theirs = list(memory_problems(asked, UnslothEngine()))
    assert [line.partition(":")[0] for line in theirs] == [
        "memory.keep_attention_layers", "memory.stream_layers",
    ]  # fmt: skip
    assert "int8" in theirs[1]
    (dense,) = memory_problems(recipe("unsloth", keep_dequantized=True), UnslothEngine())
    assert dense.startswith("memory.keep_dequantized: unsloth's own checkpointing")
    for key, value in (("keep_dequantized", True), ("dense_layers", 1)):
        (sixteen,) = memory_problems(recipe("unsloth", "none", **{key: value}), UnslothEngine())
        assert sixteen.startswith(f"memory.{key}: only 4-bit weights are dequantized")
        scaled = recipe("full", **{key: value})
        scaled = scaled.model_copy(update={"lora": scaled.lora.model_copy(update={"dora": True})})
        (problem,) = memory_problems(scaled, PeftEngine())
        assert problem.startswith(f"memory.{key}: DoRA's")
    (never,) = memory_problems(recipe("none", stream_layers=1), UnslothEngine())
    assert "backward needs all layers' weights" in never
    for checkpointing in ("full", "offload", "none"):
        fine = recipe(checkpointing, keep_layers=3, keep_attention_layers=2, stream_layers=0)
        assert list(memory_problems(fine, PeftEngine())) == []
    fine = recipe("offload", keep_attention_layers=2, stream_layers=4)
    assert list(memory_problems(fine, UnslothEngine())) == []


@pytest.mark.parametrize(
    ("memory", "streamed", "modes", "clipped"),
    [
        ({}, (), "llllll", 0),
        ({"keep_layers": 2}, (), "llllkk", 0),
        ({"keep_layers": 1, "keep_attention_layers": 2}, (), "lllaak", 0),
        ({"keep_attention_layers": 1}, (), "llllla", 0),
        ({"keep_layers": 9, "keep_attention_layers": 1}, (), "kkkkkk", 2),
        ({"keep_layers": 4, "keep_attention_layers": 4}, (), "aakkkk", 1),
        # Not where the weights would have to stay.
        ({"keep_layers": 1, "keep_attention_layers": 1}, (3, 5), "llllka", 0),
        ({"keep_layers": 2, "keep_attention_layers": 9}, (3, 4, 5), "akkaaa", 1),
        ({"keep_layers": 9}, (4, 5), "kkkkll", 1),
    ],
)
def test_which_layers_keep_what(
    memory: dict[str, int], streamed: tuple[int, ...], modes: str, clipped: int
) -> None:
    said: list[str] = []
    found = modes_of(6, MemorySection(**memory), streamed, said.append)
    assert "".join(mode[0] for mode in found) == modes
    assert len(said) == clipped
    assert all(line.startswith("memory.keep_") and "asked for" in line for line in said)


def llama(layers: int = 3) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), lora).train()


def functions(model: Any) -> list[str]:
    """The nodes of a step's graph."""
    found: list[str] = []
    ids = torch.arange(2, 12)[None]
    waiting, seen = [model(input_ids=ids, labels=ids).loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name())
            waiting += [below for below, _ in node.next_functions]
    return found


def test_it_is_put_on_the_model() -> None:
    model, said = llama(), []
    keep_as_asked(model, PeftEngine(), recipe("none", keep_layers=1), said.append)
    assert functions(model).count("RecomputedBackward") == 0
    assert "keeps every layer" in said.pop()
    keep_as_asked(model, PeftEngine(), recipe("offload", keep_layers=1), said.append)
    assert functions(model).count("RecomputedBackward") == 2
    assert not keeps_dequantized(model)
    keep_as_asked(model, PeftEngine(), recipe(keep_dequantized=True), said.append)
    assert keeps_dequantized(model)
    assert said.pop().startswith("memory.keep_dequantized: there are none")
    recompute_all(model, PeftEngine(), said.append, offload=False)
    assert functions(model).count("RecomputedBackward") == 3
    assert not keeps_dequantized(model)
    assert said == []


def test_what_would_do_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = llama(), []
    assert dense_as_asked(model, recipe(dense_layers=2), said.append) is None
    assert said.pop().startswith("memory.dense_layers: there are none")
    # Of 4-bit layers with our kernels, as far as the class tells.
    monkeypatch.setattr("fastlora.engines.kept._dequantizes", lambda m: hasattr(m, "lora_A"))
    assert dense_as_asked(model, recipe(dense_layers=9), said.append) is not None
    assert said.pop().startswith("memory.dense_layers: 3, since")
    assert dense_as_asked(model, recipe(), said.append) is None
    for graphs in (False, True):
        asked = recipe("offload", keep_dequantized=True, cuda_graphs=graphs)
        asked = asked.model_copy(
            update={"kernels": asked.kernels.model_copy(update={"mode": "all"})}
        )
        monkeypatch.setattr(UnslothEngine, "layers_are_recomputed", lambda *_: None)
        keep_as_asked(model, UnslothEngine(), asked, said.append)
        assert [line for line in said if "unsloth compiles" in line] == said
        assert bool(said) is not graphs
        said.clear()


def keeps_dequantized(model: Any) -> bool:
    layers = model.get_base_model().model.layers
    return any(
        getattr(one._gradient_checkpointing_func, "keep_dequantized", False) for one in layers
    )


def test_a_model_whose_layers_cannot_be_recomputed_falls_back_aloud() -> None:
    model, said = llama(), []
    model.config.output_router_logits = True
    keep_as_asked(model, PeftEngine(), recipe("full"), said.append)
    assert [line.startswith("train.checkpointing: transformers' own") for line in said] == [True]
    assert model.is_gradient_checkpointing
    assert functions(model).count("RecomputedBackward") == 0
    for asked in (recipe("offload"), recipe("full", keep_layers=1)):
        with pytest.raises(EngineError, match=r"output_router_logits.*leave \[memory\] out"):
            keep_as_asked(model, PeftEngine(), asked, said.append)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An unsloth that only notes what it is called with."""
    calls: dict[str, Any] = {"model_type": "llama"}

    def from_pretrained(name: str, **given: Any) -> Any:
        calls["load"] = given
        if given.get("offload_layers") == 13:
            raise ValueError("Unsloth: offload_layers has nothing to swap to here.")
        text = SimpleNamespace(num_hidden_layers=8)
        return SimpleNamespace(
            config=SimpleNamespace(model_type=calls["model_type"], get_text_config=lambda: text)
        ), None

    def get_peft_model(base: Any, **given: Any) -> Any:
        calls["adapt"] = given
        calls["compile"] = os.environ.get("UNSLOTH_BLOCK_COMPILE_LEGACY")
        embedding = SimpleNamespace(weight=torch.empty(1, device=calls.get("embedding", "meta")))
        return SimpleNamespace(
            _unsloth_gradient_checkpointing=given["use_gradient_checkpointing"],
            get_input_embeddings=lambda: embedding,
        )

    fast = SimpleNamespace(from_pretrained=from_pretrained, get_peft_model=get_peft_model)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=fast))
    return calls


@pytest.mark.parametrize(
    ("checkpointing", "memory", "asked", "skipped", "streamed", "clipped"),
    [
        ("unsloth", {}, "unsloth", 0, None, 0),
        ("unsloth", {"keep_layers": 3}, "unsloth", 3, None, 0),
        ("unsloth", {"keep_layers": 9, "stream_layers": 8}, "unsloth", 8, 8, 2),
        ("full", {"keep_layers": 3, "stream_layers": 2}, True, 0, 2, 0),  # keeping is ours then
        ("offload", {}, True, 0, None, 0),
        ("none", {}, False, 0, None, 0),
    ],
)
def test_what_unsloth_is_asked_for(
    checkpointing: str, memory: dict[str, int], asked: Any, skipped: int, streamed: int | None,
    clipped: int, told: dict[str, Any],
) -> None:  # fmt: skip
    said: list[str] = []
    model = UnslothEngine().load(recipe(checkpointing, **memory), said.append)
    assert told["load"]["use_gradient_checkpointing"] == asked
    assert told["adapt"]["use_gradient_checkpointing"] == asked
    assert told["adapt"]["checkpoint_skip_layers"] == skipped
    assert told["load"].get("offload_layers") == streamed
    assert len(said) == clipped
    UnslothEngine().layers_are_recomputed(model)
    assert model._unsloth_gradient_checkpointing is True  # what for_training sets every flag to


@pytest.mark.parametrize(
    ("checkpointing", "sections", "users", "there"),
    [
        ("offload", {}, {}, "0"),
        ("none", {"kernels": {"mode": "all"}}, {}, "0"),
        ("offload", {}, {"UNSLOTH_BLOCK_COMPILE": "1"}, None),  # the user's word
        ("offload", {}, {"UNSLOTH_BLOCK_COMPILE_LEGACY": "1"}, "1"),
        # Nothing will be recorded: then Python is what compiling spares.
        ("offload", {"memory": {"cuda_graphs": False}}, {}, None),
        ("unsloth", {}, {}, None),
        ("offload", {"kernels": {"mode": "off"}}, {}, None),
        ("offload", {"data": {"sources": ["rows.jsonl"], "packing": True}}, {}, None),
        ("offload", {"lora": {"dropout": 0.1}}, {}, None),
        ("offload", {"memory": {"cuda_graphs": True, "stream_layers": 2}}, {}, None),
    ],
)
def test_unsloth_does_not_compile_what_is_recorded(
    checkpointing: str, sections: dict[str, Any], users: dict[str, str], there: str | None,
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    names = ("UNSLOTH_BLOCK_COMPILE", "UNSLOTH_BLOCK_COMPILE_LEGACY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    asked = recipe(checkpointing).model_dump(exclude_unset=True)
    asked |= {"memory": {"cuda_graphs": True}} | sections
    UnslothEngine().load(Recipe.model_validate(asked), print)
    assert told["compile"] == there
    assert {name: os.environ[name] for name in names if name in os.environ} == users


@pytest.mark.parametrize(
    ("checkpointing", "memory", "stays"),
    [
        ("offload", {"cuda_graphs": True}, True),  # a lookup in host memory waits for the GPU
        ("unsloth", {"vram": "12GiB"}, True),  # it has been counted in
        ("unsloth", {"embedding": "gpu"}, True),  # the recipe says where it is
        ("unsloth", {"embedding": "host"}, True),  # ours is done later
        ("unsloth", {}, False),
        ("unsloth", {"cuda_graphs": True}, False),  # not recorded, then
    ],
)
def test_unsloth_moves_the_embedding_only_where_it_does_no_harm(
    checkpointing: str, memory: dict[str, Any], stays: bool, told: dict[str, Any]
) -> None:
    said: list[str] = []
    UnslothEngine().load(recipe(checkpointing, **memory), said.append)
    assert told["load"].get("offload_embedding") is (False if stays else None)
    assert said == []
    told["embedding"] = "cpu"
    UnslothEngine().load(recipe(checkpointing, **memory), said.append)
    (line,) = said
    assert "unsloth has moved the embedding to host memory" in line


@pytest.mark.parametrize(("kind", "there"), [("llama", "0"), ("gemma3_text", None)])
def test_packed_rows_are_recorded_where_flash_attention_serves_them(
    kind: str, there: str | None, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UNSLOTH_BLOCK_COMPILE", "UNSLOTH_BLOCK_COMPILE_LEGACY"):
        monkeypatch.delenv(name, raising=False)
    pretend_to_have_it(monkeypatch)
    told["model_type"] = kind
    asked = recipe("offload", cuda_graphs=True).model_dump(exclude_unset=True)
    asked["data"]["packing"] = True
    UnslothEngine().load(Recipe.model_validate(asked), print)
    assert told["compile"] == there


@pytest.mark.usefixtures("told")
def test_what_unsloth_refuses_to_stream_is_no_missing_model() -> None:
    with pytest.raises(EngineError, match=r"^memory\.stream_layers: .*nothing to swap"):
        UnslothEngine().load(recipe("full", stream_layers=13), print)


def test_memory_may_be_another_on_resume() -> None:
    then = recipe("none").model_dump(mode="json")
    now = recipe("offload", keep_layers=1, stream_layers=2).model_dump(mode="json")
    assert len(changed_keys(then, now)) == 3
    assert changed_keys(then, now, but=MEMORY_KEYS) == []
    del then["memory"]  # begun before there was one
    assert changed_keys(then, recipe("none").model_dump(mode="json")) == []


def test_a_micro_batch_that_was_chosen_stays_on_resume(tmp_path: Path) -> None:
    def asked(**train: int) -> Recipe:
        sections = recipe("none").model_dump(exclude_unset=True)
        sections["train"] |= {"effective_batch": 8, **train}
        return Recipe.model_validate(sections | {"output": {"dir": str(tmp_path)}})

    chosen = {"key": "train.micro_batch", "value": 4, "why": ""}
    with contextlib.closing(RunDir.create(tmp_path)) as run:
        began = asked(micro_batch=4).model_dump(mode="json")
        run.update(status="interrupted", recipe=began, memory={"filled": [chosen]})
    open_for_resume(asked()).close()
    open_for_resume(asked(micro_batch=4)).close()
    with pytest.raises(RunDirError, match=r"train\.micro_batch: the run chose 4, now 8"):
        open_for_resume(asked(micro_batch=8))


@pytest.mark.parametrize("word", [None, "64"])
def test_rows_are_not_padded_in_attention_where_lengths_recur(
    word: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch = ModuleType("unsloth.utils.attention_dispatch")
    dispatch._CUDNN_LENGTH_BUCKET = 128  # type: ignore[attr-defined]
    utils = ModuleType("unsloth.utils")
    utils.attention_dispatch = dispatch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    monkeypatch.setitem(sys.modules, "unsloth.utils", utils)
    monkeypatch.setitem(sys.modules, "unsloth.utils.attention_dispatch", dispatch)
    if word is not None:  # the user's
        monkeypatch.setenv("UNSLOTH_SDPA_CUDNN_BUCKET", word)
    with rows_as_long_as_they_are():
        within = dispatch._CUDNN_LENGTH_BUCKET
    assert within == (0 if word is None else 128)
    assert vars(dispatch)["_CUDNN_LENGTH_BUCKET"] == 128


@pytest.mark.parametrize(("free_gib", "pinned"), [(3.0, sys.maxsize), (1.0, 17)])
def test_streamed_weights_are_pinned_in_whole_where_the_host_has_room(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, free_gib: float, pinned: int
) -> None:
    """unsloth asks for its budget when the weights are written; outside of a load it stays its own."""
    zoo, swap = ModuleType("unsloth_zoo"), ModuleType("unsloth_zoo.block_swap")
    swap._pin_budget = lambda: 17  # type: ignore[attr-defined]
    theirs, seen = swap._pin_budget, []
    zoo.block_swap = swap  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth_zoo", zoo)
    monkeypatch.setitem(sys.modules, "unsloth_zoo.block_swap", swap)
    monkeypatch.setattr("fastlora.engines.unsloth.host_free_bytes", lambda: free_gib * 2**30)
    fast = sys.modules["unsloth"].FastLanguageModel
    load = fast.from_pretrained
    monkeypatch.setattr(
        fast, "from_pretrained", lambda *a, **k: (seen.append(swap._pin_budget()), load(*a, **k))[1]
    )
    told["model_type"] = "llama"
    for streamed in (2, None, 13):
        memory = {"stream_layers": streamed} if streamed else {}
        with contextlib.suppress(EngineError):  # 13: unsloth refuses
            UnslothEngine().load(recipe(**memory), print)
        assert swap._pin_budget is theirs
    assert seen == [pinned, 17, pinned]
