"""Figures from steps, by hand; what the ledger compares; FLOPs of a small model, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastlora.bench.assess import figures, ledger, rate, spread
from fastlora.bench.schema import Arm, ArmResult, Spread
from fastlora.bench.suites import bundled, ingredients, load_suite
from fastlora.errors import EngineError, UsageError
from fastlora.recipe.schema import MemorySection

RESULT: dict[str, Any] = {
    "step_s": [9.0, 1.0, 2.0, 4.0],
    "step_tokens": [100, 100, 200, 200],
    "step_supervised": [50, 50, 100, 100],
    "fed_tokens": 800,
    "squared_lengths": 60_000,
    "peak_allocated_gib": 1.0, "peak_reserved_gib": 1.5, "driver_gib": 2.0, "host_gib": 3.0, "digest": "aa",
    "flops": {"matmul": 1e9, "attention": 1e6, "recompute_matmul": 5e8, "recompute_attention": 5e5},
}  # fmt: skip


def test_figures_are_of_the_steps_after_warm_up() -> None:
    shown = figures(RESULT, 1, {"gemm_tflops": 0.1})
    # The steps differ in tokens, so that p50 is all of them over all the seconds.
    assert shown["tokens_per_s"] == Spread(p20=50, p50=round(500 / 7, 6), p80=100)
    assert shown["supervised_tokens_per_s"].p50 == round(250 / 7, 6)
    assert rate([100, 100, 100], [1.0, 2.0, 10.0]) == Spread(p20=10, p50=50, p80=100)
    assert shown["step_s"] == Spread(p20=1, p50=2, p80=4)
    # 500 of 600 tokens in 7 s; 5/6 of the squared lengths.
    model = (1e9 * 500 + 1e6 * 50_000) / 7 / 0.1e12
    again = (5e8 * 500 + 5e5 * 50_000) / 7 / 0.1e12
    assert shown["mfu"] == pytest.approx(model, abs=1e-4)
    assert shown["hfu"] == pytest.approx(model + again, abs=1e-4)
    assert shown["counted"]["padding_share"] == 0.25
    assert shown["host_gib"] == 3.0
    assert figures(RESULT, 1, {})["mfu"] is None


def test_spread_of_one_and_of_many() -> None:
    assert spread([3.0]) == Spread(p20=3, p50=3, p80=3)
    assert spread(list(range(10, 0, -1))) == Spread(p20=3, p50=6, p80=9)


def test_ingredients_of_an_arm_are_each_switched_alone() -> None:
    recipe = load_suite(bundled()["llama31-8b"]).recipe("x")
    names = [arm.name for arm in ingredients(Arm.parse("unsloth"), recipe, gpu=True)]
    assert names == [
        "unsloth+graphs", "unsloth+offload", "unsloth-kernels", "unsloth-loss", "unsloth-offload",
        "unsloth-checkpointing", "unsloth-optimizer",
    ]  # fmt: skip
    assert [arm.name for arm in ingredients(Arm.parse("peft-optimizer"), recipe, gpu=True)] == [
        "peft+offload-optimizer",
        "peft-checkpointing-optimizer",
    ]
    # What would change nothing is left out: the tiny suite trains with plain AdamW, a CPU keeps everything.
    tiny = load_suite(bundled()["tiny"]).recipe("x")
    assert ingredients(Arm.parse("peft"), tiny, gpu=False) == []
    dense = Arm.parse("peft+fastlora+dequantized")
    assert [arm.name for arm in ingredients(dense, tiny, gpu=True)] == [
        "peft+fastlora+offload+dequantized"
    ]
    assert ingredients(Arm.parse("peft-checkpointing"), tiny, gpu=True) == []


def test_the_ledger_pairs_each_arm_with_the_one_it_differs_from() -> None:
    def arm(name: str, speed: float | None, gib: float) -> ArmResult:
        measured = None if speed is None else Spread(p20=speed, p50=speed, p80=speed)
        status = "ok" if speed else "oom"
        return ArmResult(arm=name, status=status, tokens_per_s=measured, peak_reserved_gib=gib)

    entries = ledger(
        [arm("peft", 10, 9), arm("unsloth", 20, 5), arm("unsloth-kernels", 15, 6),
         arm("unsloth-checkpointing", None, 20), arm("peft-checkpointing-optimizer", 12, 12),
         arm("peft-optimizer", 11, 10)]
    )  # fmt: skip
    assert [(e.arm, e.base, e.tokens_per_s, e.base_tokens_per_s) for e in entries] == [
        ("unsloth-kernels", "unsloth", 15, 20),
        ("unsloth-checkpointing", "unsloth", None, 20),
        ("peft-checkpointing-optimizer", "peft-optimizer", 12, 11),
        ("peft-optimizer", "peft", 11, 10),
    ]


def test_arms_are_parsed_and_change_the_recipe() -> None:
    from fastlora.bench.suites import plan_for

    recipe = plan_for("tiny", 0.0).recipe
    arm = Arm.parse("unsloth-checkpointing-optimizer+graphs+packing")
    changed = arm.recipe(recipe)
    assert (changed.train.checkpointing, changed.train.optimizer) == ("none", "adamw")
    assert changed.data.packing
    assert arm.environment == {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}
    assert Arm.parse("unsloth-offload").recipe(recipe).train.checkpointing == "full"
    kept = Arm.parse("unsloth+stream7+attention12+keep3+offload")
    assert kept.name == "unsloth+offload+keep3+attention12+stream7"
    memory = kept.recipe(recipe).memory
    assert kept.recipe(recipe).train.checkpointing == "offload"
    assert (memory.keep_layers, memory.keep_attention_layers, memory.stream_layers) == (3, 12, 7)
    dense = Arm.parse("unsloth-kernels+fastlora+dequantized+record+offload")
    assert dense.name == "unsloth+fastlora+offload+dequantized+record-kernels"
    assert dense.recipe(recipe).memory.keep_dequantized
    for without in (
        "unsloth+dequantized",
        "unsloth+fastlora+dequantized",
        "unsloth+fastlora+dequantized+offload",  # compiled, where nothing stays
        "peft+fastlora+dequantized-checkpointing",
    ):
        with pytest.raises(
            UsageError, match=r"\+dequantized needs fastlora's kernels and checkpointing"
        ):
            Arm.parse(without)
    once = Arm.parse("peft+fastlora+dense4+record")
    assert once.recipe(recipe).memory.dense_layers == 4
    for without in ("peft+fastlora+dense4", "unsloth+dense4+record-checkpointing"):
        with pytest.raises(UsageError, match=r"add \+record and \+fastlora"):
            Arm.parse(without)
    # What an arm runs is what a budget counts.
    modes = {
        name: Arm.parse(name).recipe(recipe).kernels.mode
        for name in ("peft", "liger", "peft+fastlora", "unsloth", "unsloth+fastlora-kernels")
    }
    assert [*modes.values()] == ["off", "off", "auto", "auto", "all"]
    chunked = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"chunked_loss": True})}
    )
    assert Arm.parse("peft").recipe(chunked).train.chunked_loss is None
    larger = Arm.parse("unsloth+batch4").recipe(recipe).train
    assert (recipe.train.micro_batch, recipe.train.accumulation_steps) == (2, 2)
    assert (larger.micro_batch, larger.accumulation_steps) == (4, 1)
    assert Arm.parse("unsloth").micro_batch is None
    assert Arm.parse("unsloth+keep007+keep7") == Arm.parse("unsloth+keep7")
    assert Arm.parse("unsloth+budget").recipe(recipe, 7.5).memory.vram_gib == 7.5
    assert Arm.parse("unsloth+budget").recipe(recipe).memory.vram == "auto"
    assert Arm.parse("peft+record+fastlora").recipe(recipe).memory.cuda_graphs
    assert Arm.parse("unsloth+hostembed+keep3").name == "unsloth+keep3+hostembed"
    assert Arm.parse("peft+hostembed").recipe(recipe).memory.embedding == "host"
    assert Arm.parse("peft").recipe(recipe).memory.embedding is None
    for checkpoints in ("+offload", "-offload", "-checkpointing", "+budget"):  # unsloth's waits
        assert Arm.parse(f"unsloth+record{checkpoints}").recipe(recipe).memory.cuda_graphs
    with pytest.raises(UsageError, match=r"cannot be recorded; add \+offload .* or -checkpointing"):
        Arm.parse("unsloth-kernels+fastlora+record")
    assert Arm.parse("peft-optimizer+fastlora").name == "peft+fastlora-optimizer"
    for wrong in (
        "unsloth-offload-checkpointing",
        "unsloth+offload-offload",
        "unsloth+keep",
        "unsloth+keep1+keep2",
        "unsloth+budget3",
        "peft+stream4",
        "unsloth+keep-3",
        "peft+record",
        "unsloth+record",
        "unsloth+fastlora+record+keep4",
        "unsloth+record+offload+graphs",
        "peft-kernels",
        "peft+",
        "peft+nothing",
        "tensor",
        "",
    ):
        with pytest.raises(UsageError, match="--arms"):
            Arm.parse(wrong)


@pytest.mark.parametrize("recomputed", [0, 0.5, 1])
def test_flops_of_a_small_llama_by_hand(recomputed: float) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastlora.bench.flops import flops_per_token

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear"))
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    found = flops_per_token(model, recomputed)
    assert found["matmul"] == 4 * (3 * layer + 32 * 100)
    # A row of L tokens: L^2 / 2 pairs, 2 products of width 32, 2 FLOPs; backward is twice that.
    assert found["attention"] == 3 * (2 * 2 * 32 / 2) * 3
    assert found["recompute_matmul"] == 2 * 3 * layer * recomputed
    assert found["recompute_attention"] == 2 * 32 * 3 * recomputed


def test_flops_of_what_is_left_out_of_a_recomputation() -> None:
    import torch
    from fastlora_kernels import attach, recompute_layers
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastlora.bench.flops import flops_per_token

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear"))
    attach(model)
    ids = torch.arange(6)[None]
    mlp, down, qkvo = 3 * 32 * 48, 32 * 48, 2 * 32 * 32 + 2 * 32 * 16
    recompute_layers(model, ["layer", "attention", "keep", "layer"])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    found = flops_per_token(model, 1.0)
    assert found["recompute_matmul"] == 2 * (3 * (mlp - down) + 2 * qkvo)
    assert found["recompute_attention"] == 2 * 32 * 2  # of two layers


@pytest.mark.parametrize(("how", "kept"), [("sdpa", 2), ("eager", None)])
def test_attention_that_was_to_be_kept_and_was_not_is_said(how: str, kept: int | None) -> None:
    import torch
    from fastlora_kernels import recompute_layers
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastlora.bench.loaded import Loaded

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        attn_implementation=how,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear"))
    loaded: Any = object.__new__(Loaded)
    loaded.model, loaded.checkpointing = model, "offload"
    loaded.recipe = SimpleNamespace(memory=MemorySection(keep_attention_layers=9))
    recompute_layers(model, ["attention"] * 3, offload=True)
    ids = torch.arange(6)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    if kept:
        assert loaded.kept_attention() == kept
    else:
        with pytest.raises(EngineError, match=r"\+attention: .*computed again in every layer"):
            loaded.kept_attention()
    loaded.checkpointing = "none"
    assert loaded.kept_attention() is None
