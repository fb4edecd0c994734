"""What a run on a GPU takes where its recipe leaves it open: recomputation as there is room, graphs as they pay."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plans import LLAMA_8B, recipe

from fastlora.errors import RunDirError
from fastlora.plan import gpus, settle
from fastlora.plan.budget import Choice
from fastlora.plan.predict import Card, Prediction, predict
from fastlora.plan.settle import MicroBatches, without_budget
from fastlora.plan.setup import memory_problems
from fastlora.plan.shape import shape_of
from fastlora.recipe.advice import apply
from fastlora.recipe.schema import Recipe
from fastlora.rundir.store import RunDir
from fastlora.train.advising import filled_from
from fastlora.train.resume import as_begun, open_for_resume

LLAMA_1B = LLAMA_8B | {
    "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
FULL = MicroBatches(tokens=2048, padding=0.0, count=2000, rehearsed=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))


def settled(
    config: Any = LLAMA_1B, gpu: str = "NVIDIA H200", free_gib: float = 139.0,
    micro_batches: MicroBatches | None = FULL, **sections: Any,
) -> Choice | None:  # fmt: skip
    """With so much free; None: graphs are not to be chosen."""
    shape = shape_of(config)
    budget = settle.FREE_SHARE * free_gib
    known = gpus.gpu_named(gpu) or gpus.like_a_3090(gpu, budget)
    there = Card(gpu=known, vram_gib=budget, host_gib=100.0, whole_gib=free_gib)

    def again(other: Recipe) -> Prediction:
        return predict(other, shape, there)

    count = None if micro_batches is None else lambda _: micro_batches
    return settle.settle(again(without_budget(recipe(**sections))), again, count)


def keys(choice: Choice | None) -> dict[str, Any]:
    assert choice
    return choice.settings


def test_1b_by_default_is_recorded_with_our_kernels_and_computes_nothing_again() -> None:
    """Measured so: 46.8 ms; dequantized in each 49.8, with unsloth's kernels 53.8, as calls with its checkpointing
    206."""
    train = {"micro_batch": 2}
    assert keys(settled(train=train)) == {
        "memory.cuda_graphs": True, "kernels.mode": "all", "train.checkpointing": "none",
        "memory.dense_layers": 16,
    }  # fmt: skip
    assert keys(settled(engine="peft", train=train)) == {
        "memory.cuda_graphs": True, "train.checkpointing": "none", "memory.dense_layers": 16,
    }  # fmt: skip


def test_weights_are_dequantized_once_a_step_where_there_is_room() -> None:
    """1.81 GiB for two of three passes and more: all layers or none, and none that nothing records."""
    train = {"micro_batch": 2, "effective_batch": 8}
    key = "memory.dense_layers"
    roomy, tight = settled(free_gib=9, train=train), settled(free_gib=7, train=train)
    assert roomy
    assert tight
    assert roomy.settings[key] == 16
    assert next(one.why for one in roomy.filled if one.key == key).startswith("1.81 GiB, for which")
    assert key not in tight.settings
    assert roomy.plainest.setup.dense_layers == 0
    taken = apply(recipe(train=train), roomy.filled)
    assert (taken.memory.dense_layers, taken.memory.cuda_graphs) == (16, True)
    sections: tuple[dict[str, Any], ...] = (
        {"memory": {"cuda_graphs": False}}, {"memory": {key[7:]: 0}}, {"lora": {"dora": True}},
        {"model": {"quantization": "none"}}, {"train": train | {"checkpointing": "full"}},
        {"micro_batches": None},
    )  # fmt: skip
    for others in sections:
        assert key not in keys(settled(**{"train": train, **others})), others
    some = settled(train=train, memory={key[7:]: 4})
    assert some
    assert key not in some.settings
    assert some.result.setup.dense_layers == 4
    # Asked for where graphs do not pay: it does nothing, which is said, and the run can still be resumed.
    asked = recipe(engine="unsloth", train=train, memory={key[7:]: 4})
    few = settled(
        engine="unsloth", train=train, memory={key[7:]: 4}, micro_batches=replace(FULL, count=1)
    )
    assert few
    ran = apply(asked, few.filled)
    assert ran.memory.cuda_graphs is False
    resumed = as_begun(asked, manifest(**few.settings))
    assert resumed.memory.cuda_graphs is False
    for one in (ran, resumed):
        assert list(memory_problems(one, "unsloth", one.train.checkpointing, streams=True)) == []


GEMMA = LLAMA_8B | {
    "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 2560, "intermediate_size": 10_240,
    "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "tie_word_embeddings": True,
}  # fmt: skip


def test_pefts_layers_stay_where_the_gpu_waits_for_python() -> None:
    """Gemma 3 4B on an H200, measured: 13,771 tokens/s, with our kernels 13,589. A slower GPU does not wait."""
    given: dict[str, Any] = {
        "config": GEMMA,
        "engine": "unsloth",
        "train": {"micro_batch": 2},
        "memory": {"cuda_graphs": False},
    }
    found = settled(**given)
    assert found
    assert found.settings["kernels.mode"] == "off"
    assert "waits for Python" in next(one.why for one in found.filled if one.key == "kernels.mode")
    assert (
        apply(recipe(engine="unsloth", train={"micro_batch": 2}), found.filled).kernels.mode
        == "off"
    )
    begun = manifest(**{one.key: one.value for one in found.filled})
    assert as_begun(recipe(engine="unsloth"), begun).kernels.mode == "off"
    # An A100 does where rows are short, whatever the longest.
    a100 = given | {"gpu": "NVIDIA A100-SXM4-80GB", "free_gib": 79}
    assert "kernels.mode" not in keys(settled(**a100))
    short = settled(**a100, micro_batches=replace(FULL, tokens=512))
    assert keys(short)["kernels.mode"] == "off"
    others: tuple[dict[str, Any], ...] = (
        {"gpu": "NVIDIA GeForce RTX 3090", "free_gib": 23}, {"lora": {"dora": True}},
        {"model": {"quantization": "int8"}}, {"kernels": {"mode": "all"}}, {"kernels": {"require_fast": True}},
        {"config": LLAMA_8B},  # unsloth fuses all of it
        {"engine": "peft"}, {"memory": {"cuda_graphs": True}, "train": {"checkpointing": "offload"}},
    )  # fmt: skip
    for other in others:
        assert keys(settled(**given | other)).get("kernels.mode") != "off", other


def test_where_it_does_not_fit_without_layers_are_computed_again() -> None:
    choice = settled(LLAMA_8B, "NVIDIA L4", 12)
    assert choice
    assert choice.result.setup.policy != "none"
    assert choice.result.memory.comfortable_gib <= 0.9 * 12
    assert (
        settled(LLAMA_8B, "NVIDIA L4", 7) is None
    )  # the run's own default, and what plan says of it


@pytest.mark.parametrize("engine", ["unsloth", "peft"])
@pytest.mark.parametrize("free_gib", [11, 16, 23, 40, 139])
def test_micro_batches_stay_and_nothing_is_streamed(engine: str, free_gib: float) -> None:
    train = {"micro_batch": 4, "effective_batch": 16}
    choice = settled(LLAMA_8B, free_gib=free_gib, engine=engine, train=train)
    assert choice
    setup = choice.result.setup
    assert (setup.micro_batch, setup.accumulation, setup.stream_layers) == (4, 4, 0)
    asked = recipe(engine=engine, train=train)
    taken = apply(asked, choice.filled)
    assert taken.train.micro_batch == 4
    assert taken.memory.vram is None
    if taken.memory.cuda_graphs:
        assert setup.graphs
        assert taken.train.checkpointing != "unsloth"


@pytest.mark.parametrize("seq_len_tokens", [8192, 10_000, 40_000])
def test_rows_may_be_so_long_that_no_larger_micro_batch_is_tried(seq_len_tokens: int) -> None:
    """The usual one is, so that the rest is chosen as where it is stated."""
    train, model = {"effective_batch": 8}, {"seq_len_tokens": seq_len_tokens}
    full = replace(FULL, tokens=seq_len_tokens)
    left_open = settled(train=train, model=model, micro_batches=full)
    stated = settled(train=train | {"micro_batch": 2}, model=model, micro_batches=full)
    assert keys(left_open) == keys(stated)


def test_a_micro_batch_that_is_left_open_is_as_large_as_pays() -> None:
    """8B on an H200: weights are dequantized once for eight rows and not four times for two. Not where rows are padded
    to the longest of eight; nor is one chosen that the recipe states, or without the rows' lengths."""
    open_batch: dict[str, Any] = {
        "config": LLAMA_8B, "train": {"effective_batch": 8}, "memory": {"dense_layers": 0},
    }  # fmt: skip
    full = settled(**open_batch)
    assert full
    setup = full.result.setup
    assert (setup.micro_batch, setup.accumulation, setup.graphs) == (8, 1, True)
    assert full.result.memory.comfortable_gib <= 0.9 * 139
    stated = settled(**open_batch | {"train": {"effective_batch": 8, "micro_batch": 2}})
    assert stated
    assert "train.micro_batch" not in stated.settings
    # Once a step they are dequantized for any number of rows.
    once = settled(**open_batch | {"memory": {}})
    assert once
    assert once.settings["memory.dense_layers"] == 32
    assert once.result.setup.micro_batch < 8
    assert once.result.memory.comfortable_gib < 0.6 * full.result.memory.comfortable_gib
    assert full.result.speed
    assert stated.result.speed
    assert full.result.speed.tokens_per_s > 1.05 * stated.result.speed.tokens_per_s

    def real(recipe: Recipe) -> MicroBatches:
        """The benchmark's real lengths, roughly: 290 on average."""
        longest = {1: 290, 2: 420, 4: 560, 8: 720}
        return replace(FULL, tokens=longest[recipe.train.micro_batch])

    shape, there = shape_of(LLAMA_8B), Card(gpu=gpus.gpu_named("NVIDIA H200"), vram_gib=125.0)

    def again(other: Recipe) -> Prediction:
        return predict(other, shape, there)

    asked = recipe(train={"effective_batch": 8})
    padded = settle.settle(again(without_budget(asked)), again, real)
    assert padded
    assert padded.result.setup.micro_batch < 8
    closed = settle.settle(again(without_budget(asked, batches=False)), again, None)
    assert "train.micro_batch" not in keys(closed)


def test_padding_may_cost_more_than_graphs_save() -> None:
    """8B on a small GPU, which the host keeps busy anyway; a slow host's 1B is worth any padding."""
    roomy: dict[str, Any] = {"config": LLAMA_8B, "gpu": "NVIDIA A100", "free_gib": 79.0}
    for padding, chosen in ((0.0, True), (0.16, False)):
        found = settled(**roomy, micro_batches=replace(FULL, padding=padding))
        assert found
        assert found.filled[0].key == "memory.cuda_graphs"
        assert found.filled[0].value is chosen
        assert f"with {padding:.1%} padding and 3 of them to record" in found.filled[0].why
        assert ("kernels.mode" in found.settings) == chosen
    assert keys(settled(micro_batches=replace(FULL, padding=0.5)))["memory.cuda_graphs"]


def test_a_run_too_short_to_be_worth_recording_is_not() -> None:
    """What is computed to record it is beside what is trained."""
    short = MicroBatches(tokens=420, padding=0.1, count=16, rehearsed=24)
    assert short.more == 1.5
    found = settled(micro_batches=short)
    assert found
    assert found.settings["memory.cuda_graphs"] is False
    assert keys(settled(micro_batches=replace(short, count=160)))["memory.cuda_graphs"]


@pytest.mark.parametrize(
    ("sections", "config", "why"),
    [
        ({"lora": {"dropout": 0.1}}, {}, "dropout"),
        ({"data": {"sources": ["x"], "packing": True}}, {"sliding_window": 512}, "packed rows"),
        ({"data": {"sources": ["x"], "packing": True}}, {"model_type": "phi3"}, "packed rows"),
        ({"kernels": {"mode": "off"}}, {}, "kernels.mode is off"),
        ({"train": {"checkpointing": "unsloth"}}, {}, "unsloth's checkpointing"),
        ({"train": {"checkpointing": "full"}, "memory": {"stream_layers": 2}}, {}, "stream_layers"),
        ({"model": {"quantization": "int8"}}, {}, "int8"),
        ({"engine": "peft", "train": {"chunked_loss": False}}, {}, "TRL's loss"),
        ({}, {"attention_dropout": 0.1}, "attention_dropout"),
        ({}, {"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({}, {"rope_parameters": {"full": {"rope_type": "dynamic"}}}, "dynamic"),
    ],
)  # fmt: skip
def test_what_a_run_refuses_is_not_chosen(sections: Any, config: Any, why: str) -> None:
    found = settled(LLAMA_1B | config, **{"engine": "unsloth", **sections})
    assert found
    assert found.filled[0].key == "memory.cuda_graphs"
    assert found.filled[0].value is False
    assert why in found.filled[0].why
    # Ours are not put in; PEFT's stay where unsloth fuses none and the GPU would wait.
    mode = "off" if config.get("model_type") == "phi3" else None
    assert found.settings.get("kernels.mode") == mode
    # Asked for, it is as before: a run says that it goes on without.
    memory = {**sections.get("memory", {}), "cuda_graphs": True}
    asked = settled(LLAMA_1B | config, **{"engine": "unsloth", **sections, "memory": memory})
    assert "memory.cuda_graphs" not in keys(asked)
    assert keys(asked).get("kernels.mode") == mode


def test_architectures_whose_hidden_states_are_not_known_of_are_recorded_if_asked_for() -> None:
    other = LLAMA_1B | {"model_type": "granite"}
    found = settled(other, engine="unsloth")
    assert found
    assert "granite on unsloth needs it set to true" in found.filled[0].why
    asked = settled(other, engine="unsloth", memory={"cuda_graphs": True})
    assert asked
    assert asked.result.setup.graphs
    assert keys(settled(other, engine="peft"))["memory.cuda_graphs"]
    for kind in ("phi3", "gemma3_text"):
        known = settled(LLAMA_1B | {"model_type": kind}, engine="unsloth")
        assert keys(known)["memory.cuda_graphs"]
        assert keys(known)["kernels.mode"] == "all"
    windowed = settled(LLAMA_1B | {"model_type": "phi3", "sliding_window": 64}, engine="unsloth")
    assert windowed
    assert "phi3 on unsloth with a window of 64 tokens" in windowed.filled[0].why


@pytest.mark.parametrize(
    ("kind", "stays"), [("phi3", False), ("gemma3_text", False), ("llama", True)]
)
def test_layers_that_unsloth_compiles_keep_no_dense_weights(kind: str, stays: bool) -> None:
    """It compiles those of its own architectures where they are not recorded, and others' always."""
    config = GEMMA | {"model_type": kind}
    asked = settled(config, engine="unsloth")
    assert keys(asked)["memory.cuda_graphs"]
    assert keys(asked).get("memory.dense_layers") == (34 if stays else None)
    for graphs in (False, True):
        found = settled(
            config,
            engine="unsloth",
            train={"checkpointing": "offload"},
            memory={"cuda_graphs": graphs, "keep_dequantized": True},
            kernels={"mode": "all"},
        )
        assert found
        setup = found.result.setup
        assert setup.keep_dequantized is setup.recomputed_by_us is (graphs and stays)
        notes = setup.notes
        assert any("unsloth compiles layers" in note for note in notes) is not (graphs and stays)


def test_packed_rows_are_recorded_where_flash_attention_serves_them() -> None:
    """A window that is no shorter than a row, or not used, keeps it from nothing."""
    packed = {"sources": ["x"], "packing": True}
    for more in (
        {},
        {"sliding_window": 4096},
        {"sliding_window": 512, "use_sliding_window": False},
    ):
        asked = settled(
            LLAMA_1B | more, engine="unsloth", data=packed, memory={"cuda_graphs": True}
        )
        assert asked
        assert asked.result.setup.graphs
        # Not by itself on unsloth, where it has yet to be measured.
        found = settled(LLAMA_1B | more, engine="unsloth", data=packed)
        assert found
        assert "need it set to true" in found.filled[0].why
        assert not found.result.setup.graphs
        assert keys(settled(LLAMA_1B | more, engine="peft", data=packed))["memory.cuda_graphs"]


def test_what_a_model_may_say_without_being_refused() -> None:
    config = LLAMA_1B | {"attention_dropout": 0.0, "rope_scaling": {"rope_type": "llama3"}}
    assert keys(settled(config))["memory.cuda_graphs"]


def test_what_the_recipe_says_stays() -> None:
    assert "memory.cuda_graphs" not in keys(settled(memory={"cuda_graphs": False}))
    asked = keys(settled(memory={"cuda_graphs": True, "dense_layers": 0}))
    assert asked == {"kernels.mode": "all", "train.checkpointing": "none"}
    stated = settled(train={"checkpointing": "full"}, kernels={"mode": "all"})
    assert keys(stated) == {"memory.cuda_graphs": True}
    assert stated
    assert (stated.result.setup.policy, stated.result.setup.keep_layers) == ("full", 0)
    kept = settled(LLAMA_8B, "NVIDIA L4", 16, memory={"keep_layers": 2}, train={"micro_batch": 2})
    assert kept
    assert kept.result.setup.keep_layers == 2


def test_unsloths_kernels_stay_where_ours_do_not_run() -> None:
    from fastlora_kernels.layers.linear import MAX_RANK

    assert settle._MOST_RANK == MAX_RANK
    wide = keys(settled(lora={"rank": MAX_RANK + 1}))
    assert wide["memory.cuda_graphs"]
    assert "kernels.mode" not in wide


def test_a_budget_weighs_graphs_too() -> None:
    shape = shape_of(LLAMA_1B)
    there = Card(gpu=gpus.gpu_named("NVIDIA H200"), vram_gib=12.0, host_gib=100.0, whole_gib=139.0)

    def again(other: Recipe) -> Prediction:
        return predict(other, shape, there)

    now = again(recipe(train={"effective_batch": 16}, memory={"vram": "12GiB"}))
    found = settle.settle(now, again, lambda _: FULL)
    assert found
    assert found.settings["memory.cuda_graphs"]
    assert found.result.memory.comfortable_gib <= 12
    assert next(iter(found.lines())).startswith("memory.vram = 12.00 GiB: ")
    assert "memory.cuda_graphs" not in keys(settle.settle(now, again, None))  # as in the benchmark


# -- resumed -------------------------------------------------------------------------------


def manifest(**chosen: Any) -> dict[str, Any]:
    filled = [{"key": key, "value": value, "why": ""} for key, value in chosen.items()]
    return {"memory": {"filled": filled}}


CHOSEN = {"memory.cuda_graphs": True, "kernels.mode": "all", "train.checkpointing": "none"}


def test_what_rounds_otherwise_is_as_when_it_began() -> None:
    """Padding and kernels; what is kept in memory may be chosen anew."""
    began = manifest(**CHOSEN)
    now = apply(recipe(), filled_from(began, recipe()))
    assert (now.memory.cuda_graphs, now.kernels.mode) == (True, "all")
    assert now.train.checkpointing == "auto"
    told = recipe(memory={"cuda_graphs": False}, kernels={"mode": "off"})
    assert filled_from(began, told) == []
    assert filled_from({}, recipe()) == []  # begun before it was chosen: without


def test_a_budget_that_is_new_on_resume_leaves_the_micro_batch() -> None:
    """Another one would be another order of the rows."""
    asked = recipe(engine="unsloth", train={"effective_batch": 16}, memory={"vram": "40GiB"})
    there = Card(gpu=gpus.gpu_named("NVIDIA H200"), vram_gib=40.0, host_gib=100.0, whole_gib=139.0)
    shape = shape_of(LLAMA_1B)

    def again(other: Recipe) -> Prediction:
        return predict(other, shape, there)

    assert "train.micro_batch" in keys(settle.settle(again(asked), again, None))
    resumed = as_begun(asked, manifest(**{"train.checkpointing": "full"}))
    assert resumed.train.micro_batch == asked.train.micro_batch
    assert "train.micro_batch" not in keys(settle.settle(again(resumed), again, None))


def test_a_run_is_resumed_with_the_kernels_that_were_chosen(tmp_path: Path) -> None:
    asked = recipe(output={"dir": str(tmp_path)})
    began = manifest(**CHOSEN)
    ran = apply(asked, filled_from(began, asked)).model_dump(mode="json")
    with contextlib.closing(RunDir.create(tmp_path)) as run:
        run.update(status="interrupted", recipe=ran, **began)
    open_for_resume(asked).close()
    with pytest.raises(RunDirError, match=r"kernels\.mode: was 'all', now 'off'"):
        open_for_resume(recipe(output={"dir": str(tmp_path)}, kernels={"mode": "off"}))
