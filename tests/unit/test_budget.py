"""What memory.vram chooses, and the memory of layers that are kept, kept in part and streamed."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import LLAMA_8B, card, predicted, recipe

from fastlora.engines import kept
from fastlora.engines.peft import PeftEngine
from fastlora.engines.unsloth import UnslothEngine
from fastlora.errors import RecipeError
from fastlora.plan import working
from fastlora.plan.advise import with_settings
from fastlora.plan.budget import Choice, choose
from fastlora.plan.memory import SPARE
from fastlora.plan.predict import Card, Prediction, predict
from fastlora.plan.setup import memory_problems
from fastlora.plan.shape import shape_of
from fastlora.plan.speed import dequantized, flops
from fastlora.recipe.advice import apply
from fastlora.recipe.schema import Recipe

SMALL = LLAMA_8B | {"num_hidden_layers": 6}
OPEN: dict[str, Any] = {"train": {"effective_batch": 16}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))


def chosen(
    vram_gib: float, config: Any = LLAMA_8B, host_gib: float | None = None, **sections: Any
) -> Choice | None:
    shape, there = shape_of(config), card(vram_gib, host_gib)

    def again(other: Recipe) -> Prediction:
        return predict(other, shape, there)

    given = {**OPEN, **sections}
    budget = {"vram": f"{vram_gib}GiB", **given.get("memory", {})}
    return choose(again(recipe(**given | {"memory": budget})), again)


def rate(found: Prediction) -> float:
    assert found.speed
    return found.speed.tokens_per_s


@settings(max_examples=25, deadline=None)
@given(st.floats(5, 60), st.sampled_from(["unsloth", "peft"]), st.sampled_from(["auto", "all"]))
def test_it_fits_and_more_memory_is_never_slower(vram: float, engine: str, kernels: str) -> None:
    sections = {"engine": engine, "kernels": {"mode": kernels}}
    less, more = chosen(vram, **sections), chosen(vram + 2, **sections)
    if less is None:
        return
    assert more
    for one, size in ((less, vram), (more, vram + 2)):
        assert one.result.memory.comfortable_gib <= size
        setup = one.result.setup
        assert setup.micro_batch * setup.accumulation == 16
    # Streaming is the last resort, also where its larger micro-batches are predicted to be the faster ones.
    if not less.result.setup.stream_layers:
        assert rate(more.result) >= 0.99 * rate(less.result)
    if less.plainest.memory.comfortable_gib <= vram:
        assert rate(less.result) >= 0.99 * rate(less.plainest)


@pytest.mark.parametrize("vram", [2.9, 3.3, 4.5, 6, 9, 30])
@pytest.mark.parametrize("engine", ["unsloth", "peft"])
def test_nothing_that_fits_is_faster(vram: float, engine: str) -> None:
    """Every value of every key, where the search takes only some."""
    shape, there = shape_of(SMALL), card(vram)
    now = recipe(**OPEN, engine=engine)
    policies = ["none", "full", "offload", *(["unsloth"] if engine == "unsloth" else [])]
    best = 0.0
    for micro, policy, place in product((1, 2, 4, 8), policies, ("gpu", "host")):
        ours = policy in ("full", "offload")
        for whole in range(7):
            for parts, dense in product(range(7 - whole if ours else 1), {False, ours}):
                settings = {
                    "train.micro_batch": micro, "train.checkpointing": policy,
                    "memory.keep_layers": whole, "memory.keep_attention_layers": parts,
                    "memory.keep_dequantized": dense, "memory.embedding": place,
                }  # fmt: skip
                found = predict(with_settings(now, settings), shape, there)
                if found.verdict == "fits":
                    best = max(best, rate(found))
    choice = chosen(vram, SMALL, engine=engine)
    if best:
        assert choice
        assert rate(choice.result) >= 0.99 * best
        assert choice.result.setup.stream_layers == 0
    else:
        assert choice is None or choice.result.setup.stream_layers > 0


def test_what_the_recipe_says_stays() -> None:
    train = {"effective_batch": 16, "micro_batch": 2, "checkpointing": "full"}
    memory = {"keep_attention_layers": 3, "embedding": "gpu"}
    choice = chosen(16, engine="unsloth", train=train, memory=memory)
    assert choice
    assert set(choice.settings) == {"memory.keep_layers"}
    setup = choice.result.setup
    assert (setup.micro_batch, setup.policy, setup.keep_attention_layers) == (2, "full", 3)
    assert setup.keep_layers == choice.settings["memory.keep_layers"] > 0


ASKED: tuple[dict[str, Any], ...] = (
    {}, {"keep_layers": 2}, {"keep_layers": 100}, {"keep_attention_layers": 2}, {"stream_layers": 3},
    {"stream_layers": 100}, {"stream_layers": 2, "keep_layers": 1, "keep_attention_layers": 9},
    {"embedding": "host"},
)  # fmt: skip
TRAINED: tuple[dict[str, Any], ...] = (
    {}, {"accumulation": 4}, {"effective_batch": 6, "micro_batch": 3}, {"checkpointing": "none"},
    {"checkpointing": "full"}, {"checkpointing": "offload", "accumulation": 2, "micro_batch": 4},
)  # fmt: skip


@pytest.mark.parametrize("engine", ["unsloth", "peft"])
@pytest.mark.parametrize("layers", [1, 6])
def test_whatever_is_chosen_can_be_run(engine: str, layers: int) -> None:
    """The recipe that comes of it is valid, the engine does not refuse it, and it is planned as it was chosen."""
    here = UnslothEngine() if engine == "unsloth" else PeftEngine()
    shape, chose = shape_of(SMALL | {"num_hidden_layers": layers}), 0
    for vram, memory, train, base in product((2.8, 3.4, 5, 30), ASKED, TRAINED, ("nf4", "int8")):
        there = card(vram)

        def again(other: Recipe, there: Card = there) -> Prediction:
            return predict(other, shape, there)

        asked = recipe(engine=engine, memory=memory, train=train, model={"quantization": base})
        refused = list(memory_problems(asked, engine, _policy(asked), streams=engine == "unsloth"))
        if refused:
            with pytest.raises(RecipeError):
                again(asked)
            continue
        choice = choose(again(asked), again)
        if choice is None:
            continue
        chose += 1
        taken = apply(asked, choice.filled)
        assert list(kept.memory_problems(taken, here)) == []
        assert replace(again(taken).setup, notes=()) == replace(choice.result.setup, notes=())
        setup, before = choice.result.setup, again(asked).setup
        assert setup.tokens * setup.accumulation == before.tokens * before.accumulation
        assert setup.stream_layers < layers
        beside_whole = max(setup.stream_layers, setup.keep_attention_layers)
        assert setup.keep_layers + beside_whole <= layers
        assert choice.plainest.setup.keep_layers == choice.plainest.setup.stream_layers == 0
    assert chose > 50


def _policy(asked: Recipe) -> str:
    default = "unsloth" if asked.engine == "unsloth" else "full"
    return default if asked.train.checkpointing == "auto" else asked.train.checkpointing


def test_a_great_batch_takes_no_longer() -> None:
    began = time.perf_counter()
    assert chosen(12, SMALL, train={"effective_batch": 2 * 500_000_003})
    assert time.perf_counter() - began < 10


def test_micro_batches_by_default_are_chosen_too() -> None:
    """Resumed under another budget, they are to stay."""
    memory = {"vram": "30GiB"}
    choice = chosen(30, SMALL, engine="unsloth", train={"accumulation": 1}, memory=memory)
    assert choice
    assert choice.settings["train.micro_batch"] == choice.result.setup.micro_batch == 2


def test_layers_are_streamed_only_where_nothing_else_fits() -> None:
    roomy, tight = chosen(8.5, engine="unsloth"), chosen(6.0, engine="unsloth")
    assert roomy
    assert tight
    assert roomy.result.setup.stream_layers == 0
    streamed = tight.settings["memory.stream_layers"]
    fewer = with_settings(tight.result.recipe, {**tight.settings, "memory.stream_layers": streamed - 1})  # fmt: skip
    assert predict(fewer, tight.result.shape, tight.result.card).verdict != "fits"
    assert chosen(6.0, engine="peft") is None
    assert chosen(6.0, engine="unsloth", memory={"stream_layers": 0}) is None
    assert chosen(6.0, engine="unsloth", host_gib=6) is None  # no room for them there
    assert chosen(2.0, engine="unsloth") is None


def test_of_choices_as_fast_the_one_that_streams_fewest() -> None:
    train = {"micro_batch": 2, "accumulation": 4, "checkpointing": "full"}
    free = chosen(6.0, engine="unsloth", train=train)
    assert free
    fewest = {}
    for keep in (0, 32):  # attention's activations take the room of other layers' weights
        one = chosen(6.0, engine="unsloth", train=train, memory={"keep_attention_layers": keep})
        assert one
        assert rate(one.result) == pytest.approx(rate(free.result), rel=0.01)
        fewest[keep] = one.result.setup.stream_layers
    assert fewest[32] > fewest[0] + 5
    assert free.result.setup.stream_layers == fewest[0]


TABLE = 128256 * 4096 * 2
"""Bytes of 8B's input embedding."""


def test_the_embedding_goes_to_the_host_where_it_is_worth_it() -> None:
    recorded = {"cuda_graphs": True}
    tight, without = (chosen(8, memory=recorded | more, **ALL) for more in ({}, {"embedding": "gpu"}))  # fmt: skip
    assert tight
    assert without
    assert tight.settings["memory.embedding"] == "host"
    assert rate(tight.result) > 1.01 * rate(without.result)
    assert "0.98 GiB" in next(one.why for one in tight.filled if one.key == "memory.embedding")
    for roomy in (chosen(40, memory=recorded, **ALL), chosen(40, engine="peft")):
        assert roomy
        assert "memory.embedding" not in roomy.settings
    # Before any layer, since less of it crosses the bus.
    streamed, more = (chosen(6, engine="unsloth", memory=m) for m in ({}, {"embedding": "gpu"}))
    assert streamed
    assert more
    assert streamed.result.setup.host_embedding
    assert 0 < streamed.result.setup.stream_layers < more.result.setup.stream_layers - 7
    # It needs room there, and no other use of the table.
    asked = {"train": {"checkpointing": "full", "effective_batch": 16}, "engine": "peft"}
    for host_gib, goes in ((9.3, True), (8.9, False)):
        choice = chosen(8, host_gib=host_gib, **asked)
        assert choice
        assert choice.result.setup.host_embedding == goes
    adapted = {"target_modules": ["q_proj", "embed_tokens"]}
    for config, lora in ((LLAMA_8B | {"tie_word_embeddings": True}, {}), (LLAMA_8B, adapted)):
        choice = chosen(8, config, lora=lora, **asked)
        assert choice
        assert "memory.embedding" not in choice.settings


def test_an_embedding_in_host_memory() -> None:
    """What it takes: its bytes there, none here, and the rows of each token over the bus."""
    for engine, graphs in product(("unsloth", "peft"), (False, True)):
        sections = {"engine": engine, "train": {"checkpointing": "offload"}}
        gpu, host = (
            predicted(memory={"embedding": place, "cuda_graphs": graphs}, **sections)
            for place in ("gpu", "host")
        )
        for moment, terms in gpu.memory.moments.items():
            less = sum(one.bytes for one in terms) - sum(
                one.bytes for one in host.memory.moments[moment]
            )
            # unsloth sizes chunks of its loss by what is free.
            assert less == pytest.approx(TABLE, rel=0.001 if graphs or engine == "peft" else 0.1)
        pinned = {one.name: one.bytes for one in host.memory.host}
        assert pinned["pinned embedding"] == TABLE
        assert host.memory.host_gib - gpu.memory.host_gib == pytest.approx(TABLE / 2**30)
        assert gpu.speed
        assert host.speed
        assert host.speed.gpu_s - gpu.speed.gpu_s == pytest.approx(4096 * 4096 * 2 / 60e9, rel=0.3)
        assert host.speed.waits_s == gpu.speed.waits_s
        assert host.document()["setup"]["embedding"] == "host"
    tied = predicted(config=LLAMA_8B | {"tie_word_embeddings": True}, memory={"embedding": "host"})
    assert not tied.setup.host_embedding
    assert any("stays on the GPU (it is the output" in note for note in tied.setup.notes)


def test_the_embedding_is_on_the_gpu_before_it_goes() -> None:
    """Short rows take so little that loading takes more: what must be there then counts."""
    short = {"model": {"seq_len_tokens": 64}, "train": {"micro_batch": 1}, "engine": "peft"}
    gpu, host = (predicted(memory={"embedding": place}, **short) for place in ("gpu", "host"))
    assert host.memory.loading > host.memory.reserved_gib * 2**30
    comfortable = (1 + SPARE) * host.memory.needed_gib
    assert host.memory.comfortable_gib == comfortable < gpu.memory.comfortable_gib
    loading = host.memory.needed_gib - host.memory.context / 2**30
    # Without gradients and the optimizer's state.
    assert loading == pytest.approx(gpu.memory.always_gib, rel=0.05)
    assert gpu.memory.loading == 0


def test_the_host_may_be_what_does_not_suffice() -> None:
    """Inputs of layers are not offloaded into memory that is not there."""
    long = {
        "engine": "unsloth",
        "model": {"seq_len_tokens": 32768},
        "train": {"effective_batch": 2},
    }
    choice = chosen(40, **long)
    little = chosen(40, host_gib=9, **long)
    assert choice
    assert little
    assert little.result.memory.host_gib <= 9 < choice.result.memory.host_gib or (
        choice.result.setup.policy in ("none", "full")
    )


def test_kept_layers_are_gone_before_others_are_computed_again() -> None:
    def peak(**memory: int) -> dict[str, float]:
        train = {"checkpointing": "full", "micro_batch": 8, "effective_batch": 8}
        moments = predicted(engine="unsloth", train=train, memory=memory).memory.moments
        return {name: sum(one.bytes for one in terms) for name, terms in moments.items()}

    bare, two = peak(), peak(keep_layers=2)
    assert two["backward of a layer"] < bare["backward of a layer"] + 2.1 * (two["loss"] - bare["loss"])  # fmt: skip
    one = peak(keep_layers=1)
    # The last layer's own, its input among it, which would have been made again for its backward.
    assert bare["backward of a layer"] == pytest.approx(one["backward of a layer"])
    parts = peak(keep_attention_layers=32)
    assert bare["loss"] < parts["loss"] < peak(keep_layers=32)["loss"]


def test_streamed_layers_keep_their_attention_where_the_host_has_room() -> None:
    """70B in 20 GiB, 4,096 tokens: 285 MB of a layer beside its 0.44 GB of weights, both hidden behind its products."""
    large = LLAMA_8B | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }  # fmt: skip

    def kept(host_gib: float) -> int:
        train = {"effective_batch": 16, "micro_batch": 2}
        choice = chosen(20, large, host_gib=host_gib, train=train, **ALL)
        assert choice
        setup = choice.result.setup
        assert setup.stream_layers > 0
        assert choice.result.memory.host_gib <= host_gib
        return setup.keep_attention_layers

    assert kept(256) == 80
    assert kept(48) == 0


def test_kept_layers_are_still_there_when_a_streamed_one_behind_them_is_computed_again() -> None:
    """unsloth streams the last layer before any other."""

    def needs(whole: int) -> float:
        asked = {"stream_layers": 8, "keep_layers": whole}
        train = {"checkpointing": "full", "micro_batch": 8, "effective_batch": 8}
        found = predicted(engine="unsloth", train=train, memory=asked)
        saves = working.layer_saves(found.shape, found.setup)
        again = working.again_layers(found.shape, found.setup)
        inputs = again * working.input_bytes(found.shape, found.setup)
        terms = found.memory.moments["backward of a layer"]
        return sum(one.bytes for one in terms) - inputs - whole * saves

    assert needs(4) == pytest.approx(needs(0), rel=0.001)


@pytest.mark.parametrize(
    ("policy", "kept", "staged", "stays", "coming", "on_host"),
    [
        ("unsloth", 0, 2, 0, 0, 32), ("unsloth", 32, 0, 0, 0, 0), ("offload", 0, 0, 1, 1, 31),
        ("offload", 30, 0, 1, 1, 1), ("offload", 31, 0, 1, 0, 0), ("offload", 32, 0, 0, 0, 0),
    ],
)  # fmt: skip
def test_copies_of_inputs_are_as_many_as_there_are_layers_for(
    policy: str, kept: int, staged: int, stays: int, coming: int, on_host: int
) -> None:
    """In inputs of a layer; fastlora leaves the last one's where it is."""
    train = {"checkpointing": policy}
    found = predicted(engine="unsloth", train=train, memory={"keep_layers": kept})
    one = found.setup.tokens * 4096 * 2
    assert working.staging_bytes(found.shape, found.setup) == staged * one
    assert working.stays_bytes(found.shape, found.setup) == stays * one
    assert working.coming_bytes(found.shape, found.setup) == coming * one
    assert working.host_kept_bytes(found.shape, found.setup) == on_host * one
    pinned = [term.bytes for term in found.memory.host if term.name == "pinned checkpoints"]
    assert pinned == ([on_host * one] if on_host else [])


def test_the_memory_of_recorded_micro_batches_stays() -> None:
    def planned(graphs: bool, **sections: Any) -> Prediction:
        asked = {"keep_layers": 4, "cuda_graphs": graphs}
        return predicted(train={"checkpointing": "offload", "micro_batch": 1}, memory=asked, **sections)  # fmt: skip

    without, recorded = (planned(graphs, engine="peft") for graphs in (False, True))
    assert recorded.speed
    assert recorded.speed.host_s == 0
    moments = without.memory.moments
    steps = recorded.memory.moments["optimizer step"]
    work = steps[-2].bytes
    assert [one.name for one in steps[-2:]] == ["optimizer's work", "CUDA graphs' memory"]
    assert sum(one.bytes for one in steps) - work == sum(
        one.bytes for one in moments[without.memory.peak]
    )
    for moment in ("loss", "backward of a layer"):
        assert recorded.memory.moments[moment] == moments[moment]  # type: ignore[index]
    assert planned(True, engine="unsloth").setup.loss == "fastlora"
    packed = planned(True, engine="unsloth", data={"sources": ["x"], "packing": True})
    assert packed.setup.graphs


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": "unsloth"},  # by unsloth's checkpointing
        {"engine": "unsloth", "train": {"checkpointing": "full"}, "memory": {"stream_layers": 2}},
        {"engine": "unsloth", "train": {"checkpointing": "full"}, "kernels": {"mode": "off"}},
        {"engine": "peft", "kernels": {"mode": "off"}},  # by TRL's loss
        {"engine": "peft", "lora": {"dropout": 0.1}},
    ],
)  # fmt: skip
def test_graphs_that_a_run_refuses_are_not_planned_with(sections: dict[str, Any]) -> None:
    asked = sections | {"memory": {**sections.get("memory", {}), "cuda_graphs": True}}
    found = predicted(**asked)
    assert not found.setup.graphs
    assert found.memory == predicted(**sections).memory
    assert any("a run would go on without them" in note for note in found.setup.notes)


def test_dequantizing_is_paid_for_each_micro_batch() -> None:
    """So that few short rows in one are slow for each token."""
    short = {"seq_len_tokens": 200}
    for quantization in ("nf4", "none"):
        one, eight = (
            predicted(
                engine="peft",
                model=short | {"quantization": quantization},
                train={"micro_batch": rows, "effective_batch": 8},
            )
            for rows in (1, 8)
        )
        assert one.speed
        assert eight.speed
        share = one.speed.gpu_s / eight.speed.gpu_s
        assert share > 0.2 if quantization == "nf4" else share == pytest.approx(1 / 8)


def test_a_choice_says_what_and_why() -> None:
    choice = chosen(12, engine="unsloth", memory={"vram": "12GiB"})
    assert choice
    lines = list(choice.lines())
    assert lines[0].startswith("memory.vram = 12.00 GiB: ")
    assert len(lines) == 1 + len(choice.filled)
    document = json.loads(json.dumps(choice.document()))
    assert document["budget_gib"] == 12
    assert document["comfortable_gib"] <= 12
    assert document["tokens_per_s"] >= document["plainest"]["tokens_per_s"]
    assert [one["key"] for one in document["filled"]] == list(choice.settings)


def test_down_proj_is_made_again_where_a_norm_reads_it() -> None:
    def backward(config: Any, **more: Any) -> float:
        shape = shape_of(config)
        sections = {"engine": "peft", "train": {"checkpointing": "full"}, **more}
        return flops(shape, predicted(config=config, **sections).setup)[1]

    gemma = LLAMA_8B | {"model_type": "gemma2"}
    down = 2 * 2 * 2048 * 32 * 4096 * 14336  # of a micro-batch of 2 x 2,048
    plain = {"kernels": {"mode": "off"}}
    assert backward(LLAMA_8B, **plain) - backward(LLAMA_8B) == pytest.approx(down)
    assert backward(gemma, **plain) == backward(gemma)


ALL: dict[str, Any] = {"engine": "unsloth", "kernels": {"mode": "all"}}
LAYER = 2 * 4096 * 218_103_808
"""Of 8B's products, for 2 x 2,048 tokens."""


def keeping(layers: int, policy: str = "full", **sections: Any) -> Prediction:
    asked = {"keep_attention_layers": layers, **sections.pop("memory", {})}
    return predicted(train={"checkpointing": policy}, memory=asked, **sections)


@pytest.mark.parametrize(
    ("sections", "kept", "products"),
    [
        ({"engine": "peft"}, 151_519_232, 2 * 4096 * 2 * 4096 * 14336),  # all but gate and up
        (ALL, 151_519_232, 2 * 4096 * 3 * 4096 * 14336),  # compiled, so that down_proj is made
        ({"engine": "unsloth"}, 4096 * (2 * 8192 + 128), LAYER),
        ({"engine": "peft", "kernels": {"mode": "off"}}, 4096 * (2 * 8192 + 128), LAYER),
    ],
)  # fmt: skip
def test_a_layer_that_keeps_its_attention(sections: Any, kept: int, products: int) -> None:
    """As its kernels: (2 h + 2 q + 2 k) b and 4 bytes a head for each token, or h and q; the MLP's products, or all."""
    bare, one = keeping(0, **sections), keeping(1, **sections)
    assert working.attention_bytes(one.shape, one.setup) == kept
    loss = [sum(t.bytes for t in found.memory.moments["loss"]) for found in (bare, one)]
    assert loss[1] - loss[0] == kept - 4096 * 4096 * 2  # beside its input
    again = flops(bare.shape, keeping(32, **sections).setup)[1]
    none = flops(bare.shape, keeping(0, memory={"keep_layers": 32}, **sections).setup)[1]
    assert again - none == pytest.approx(32 * products)


def test_gemmas_norm_has_down_proj_made_again_there_too() -> None:
    gemma = LLAMA_8B | {"model_type": "gemma2"}
    more = [
        flops(shape_of(config), keeping(32, config=config, engine="peft").setup)[1]
        for config in (LLAMA_8B, gemma)
    ]
    assert more[1] - more[0] == pytest.approx(32 * 2 * 4096 * 4096 * 14336)


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 30, 32])
def test_kept_attention_waits_in_host_memory(layers: int) -> None:
    """Of all but the last, of which the input stays alone; one is on its way while another is read."""
    found = keeping(layers, "offload", **ALL)
    one, given = working.attention_bytes(found.shape, found.setup), 4096 * 4096 * 2
    on_host = [one] * (layers - 1) + [given] * (31 - max(0, layers - 1))
    assert working.host_kept_bytes(found.shape, found.setup) == sum(on_host)
    assert working.coming_bytes(found.shape, found.setup) == on_host[0]
    assert working.stays_bytes(found.shape, found.setup) == given
    before, back = (found.memory.moments[moment] for moment in ("loss", "backward of a layer"))
    sizes = {term.name: term.bytes for term in before}
    assert "attention's activations" not in sizes
    assert sizes["checkpoints"] == given
    there = {term.name: term.bytes for term in back}
    assert there["copies"] == on_host[0]
    # Of the layer itself: its input, or that, attention's output with its log-sum-exp, and v.
    own = {"checkpoints": given, "attention's activations": 2 * given + given // 4 + 4096 * 32 * 4}
    assert [there[name] for name in own if name in there] in ([own[name]] for name in own)


def test_gate_and_up_are_written_over_where_they_were_made_again() -> None:
    """The gradient of down_proj's input is beside them, and theirs only where layers are kept, compiled or DoRA's."""

    def work(config: Any = LLAMA_8B, **sections: Any) -> float:
        asked = {"train": {"checkpointing": "full"}, "memory": {"cuda_graphs": True}, **ALL}
        found = predicted(config=config, **{**asked, **sections})
        terms = found.memory.moments["backward of a layer"]
        (one,) = [term.bytes for term in terms if term.name == "a layer's work"]
        return one / 4096 / 2

    h, i = 4096, 14336
    assert work() == work(engine="peft") == h + i
    for sections in (
        {"train": {"checkpointing": "none"}}, {"memory": {"cuda_graphs": False}}, {"lora": {"dora": True}},
    ):  # fmt: skip
        assert work(**sections) == h + 3 * i


def test_pinned_memory_comes_in_powers_of_two() -> None:
    """Rows of 1,500 tokens: an input of 23.4 MiB takes 32, keys and values 8 for 5.9, the log-sum-exp 0.5 for 0.4."""
    found = keeping(32, "offload", model={"seq_len_tokens": 1500}, **ALL)
    assert found.setup.tokens == 3000
    mib = 2**20
    assert working.host_kept_bytes(found.shape, found.setup) == 31 * (
        4 * 32 * mib + 2 * 8 * mib + mib // 2
    )


def test_dequantized_weights_stay_for_backward() -> None:
    """8B: gate's and up's 235 MB, of q, k, v and o 84 more, for one of the three times that they are dequantized."""

    def found(attention: int, dense: bool, **more: Any) -> Prediction:
        memory = {"cuda_graphs": True, "keep_dequantized": dense}
        return keeping(attention, **ALL | {"memory": memory} | more)

    def peak(one: Prediction) -> float:
        return sum(term.bytes for term in one.memory.moments["backward of a layer"])

    gate_up, others = 2 * 4096 * 14336, 2 * 4096 * 4096 + 2 * 4096 * 1024
    for attention, weights in ((32, gate_up), (0, gate_up + others)):
        without, kept = found(attention, False), found(attention, True)
        assert peak(kept) - peak(without) == 2 * weights
        assert without.speed
        assert kept.speed
        assert 0.01 < 1 - kept.speed.gpu_s / without.speed.gpu_s < 0.04
    for unused, why in (
        ({"engine": "peft", "kernels": {"mode": "off"}}, "fastlora's kernels run no layer"),
        ({"policy": "none"}, "no layer is computed again"),
        ({"memory": {"keep_dequantized": True}}, "unsloth compiles layers"),  # not recorded
    ):
        nothing = found(0, True, **unused).setup
        assert working.dequantized_kept(kept.shape, nothing) == (0, 0)
        assert not nothing.keep_dequantized
        (note,) = (one for one in nothing.notes if one.startswith("memory.keep_dequantized"))
        assert why in note
    for refused in ({"model": {"quantization": "none"}}, {"lora": {"dora": True}}):
        with pytest.raises(RecipeError, match=r"memory\.keep_dequantized: .*leave it out"):
            found(0, True, **refused)


def test_weights_that_are_dequantized_once_a_step() -> None:
    """8B: 2 bytes of each that an adapter is on, all the time; of all passes one for a step of four micro-batches."""

    def found(layers: int, **more: Any) -> Prediction:
        memory = {"cuda_graphs": True, "dense_layers": layers}
        train = {"checkpointing": "none", "accumulation": 4}
        return predicted(**{**ALL, "train": train, "memory": memory} | more)

    weights = 218_103_808
    without, some, whole = found(0), found(8), found(100)
    assert whole.setup.dense_layers == 32
    for one in (some, whole):
        for moment, terms in one.memory.moments.items():
            more = sum(t.bytes for t in terms) - sum(
                t.bytes for t in without.memory.moments[moment]
            )
            assert more == 2 * one.setup.dense_layers * weights, moment
        assert dequantized(one.shape, one.setup) == (
            (32 - one.setup.dense_layers * 3 / 4) * weights, (32 - one.setup.dense_layers) * weights,
        )  # fmt: skip
    assert without.speed
    assert some.speed
    assert whole.speed
    assert 0.08 < 1 - whole.speed.gpu_s / without.speed.gpu_s < 0.12  # an H100
    assert without.speed.gpu_s > some.speed.gpu_s > whole.speed.gpu_s
    assert whole.document()["setup"]["dense_layers"] == 32
    adapters = found(32, lora={"target_modules": ["q_proj", "v_proj"]})
    assert sum(t.bytes for t in adapters.memory.moments["loss"] if t.name == "dense weights") == (
        2 * 32 * (4096 * 4096 + 4096 * 1024)
    )
    for unused in (
        {"kernels": {"mode": "off"}},
        {"kernels": {"mode": "auto"}},  # unsloth's own
        {"memory": {"dense_layers": 8}},  # not recorded
        {"train": {"checkpointing": "unsloth"}},  # refused by it
    ):
        nothing = found(8, **unused).setup
        assert nothing.dense_layers == 0
        assert any(one.startswith("memory.dense_layers: it does nothing") for one in nothing.notes)
    with pytest.raises(RecipeError, match=r"memory\.dense_layers: DoRA's"):
        found(8, lora={"dora": True})


def test_they_are_kept_where_there_is_room() -> None:
    def settings(vram_gib: float, **memory: Any) -> dict[str, Any]:
        train = {"effective_batch": 16, "micro_batch": 2, "checkpointing": "offload"}
        given = {"keep_layers": 0, "cuda_graphs": True, "embedding": "gpu", **memory}
        choice = chosen(vram_gib, host_gib=64, train=train, memory=given, **ALL)
        assert choice
        assert all(one.why for one in choice.filled)
        return choice.settings

    key = "memory.keep_dequantized"
    assert settings(9)[key] is True
    assert key not in settings(7.8)  # attention's outputs, in host memory, save more
    assert key not in settings(9, keep_dequantized=False)
    assert key not in settings(9, keep_dequantized=True)  # it says so itself


def test_copies_that_take_longer_than_a_layer_are_waited_for() -> None:
    """8B: a layer's 151 MB at 60 GB/s are hidden behind its forward of more than 3 ms; at 25 they are not."""

    def waits(host_gb_s: float) -> float:
        there = card(79.2)
        assert there.gpu
        slow = replace(there, gpu=replace(there.gpu, host_gb_s=host_gb_s))
        asked = {"keep_attention_layers": 32, "cuda_graphs": True}
        now = recipe(train={"checkpointing": "offload"}, memory=asked, **ALL)
        found = predict(now, shape_of(LLAMA_8B), slow)
        assert found.speed
        assert (found.speed.waits_s > 0) == (found.speed.bound_by == "copies")
        return found.speed.waits_s

    assert waits(60) == 0
    forward = 0.1515 / 25 - waits(25) / 31
    assert 0.003 < forward < 0.0045


def test_attention_is_kept_where_its_copies_pay() -> None:
    def kept(host_gb_s: float) -> int:
        there = card(9.5, host_gib=64)
        assert there.gpu
        there = replace(there, gpu=replace(there.gpu, host_gb_s=host_gb_s))
        train = {"effective_batch": 16, "micro_batch": 2, "checkpointing": "offload"}
        shape = shape_of(LLAMA_8B)
        now = recipe(train=train, memory={"keep_layers": 0, "cuda_graphs": True}, **ALL)
        choice = choose(predict(now, shape, there), lambda other: predict(other, shape, there))
        assert choice
        return choice.result.setup.keep_attention_layers

    assert kept(60) == 32
    assert kept(10) == 0  # 15 ms for what 6 ms compute again
