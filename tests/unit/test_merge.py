"""The streaming merge against PEFT's own, for every kind of adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import LINEAR, SIZES, peft_model, save_adapter, save_base
from safetensors.torch import load_file

from fastlora.errors import EngineError
from fastlora.export import stream
from fastlora.export.merge import merged_dtype, write_merged
from fastlora.export.plan import Plan

# PEFT warns of tied weights and of saved embeddings; both are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDS = torch.arange(1, 61).reshape(2, -1) % 128


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def base(family: str = "Llama", **config: Any) -> Path:
        key = f"{family}-{sorted(config.items())}"
        if key not in made:
            made[key] = save_base(tmp_path_factory.mktemp("base"), family, **config)
        return made[key]

    return base


UNTIED = {"tie_word_embeddings": False}
BIASED = {"attention_bias": True, "mlp_bias": True}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "rslora": ({}, {"use_rslora": True}),
    "patterns": ({}, {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 3}}),
    "dora": ({}, {"use_dora": True}),
    "bias all": (BIASED, {"bias": "all"}),
    "bias lora_only": (BIASED, {"bias": "lora_only"}),
    "lora_bias": (BIASED, {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}),
    "embedding": (UNTIED, {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding dora": (UNTIED, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "head": (UNTIED, {"target_modules": [*LINEAR, "lm_head"]}),
    "modules_to_save": (UNTIED, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms saved": ({}, {"modules_to_save": ["input_layernorm"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_that_of_peft(
    bases: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 4 * 64 * 40)  # blocks that end inside a tensor
    of_base, of_adapter = KINDS[kind]
    base = bases(**of_base)
    adapter = save_adapter(base, tmp_path / "adapter", **of_adapter)
    plan = Plan(base, adapter)
    wanted = peft_model(base, adapter).merge_and_unload().state_dict()
    moved = 0
    for name, weight in wanted.items():
        got = torch.cat([block.float() for block in plan.blocks(plan.of_parameter[name])])
        torch.testing.assert_close(got, weight, rtol=1e-5, atol=1e-6)
        moved += not torch.equal(weight, plan.weight(name, edited=False))
    assert moved >= len(set(of_adapter.get("target_modules", LINEAR)))
    assert not plan.untied


def test_conv1d_stores_inputs_first(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=64)
    for number, dora in enumerate((False, True)):
        adapter = save_adapter(
            base, tmp_path / str(number), target_modules=["c_attn", "c_fc"], use_dora=dora,
            fan_in_fan_out=True,
        )  # fmt: skip
        plan = Plan(base, adapter)
        for name, weight in peft_model(base, adapter).merge_and_unload().state_dict().items():
            torch.testing.assert_close(plan.weight(name), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "untied"),
    [
        ({}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
    ],
)
def test_tied_weights_part_when_the_adapter_parts_them(
    bases: Any, config: dict[str, Any], untied: bool, tmp_path: Path
) -> None:
    """PEFT's merge would give a change of one to both; what counts is what the adapter computes."""
    from transformers import AutoModelForCausalLM

    base = bases(tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    plan = Plan(base, adapter)
    assert plan.untied == untied
    (tmp_path / "merged").mkdir()
    write_merged(plan, tmp_path / "merged", "bfloat16", [2])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.tie_word_embeddings != untied
    adapted = peft_model(base, adapter)
    with torch.no_grad():
        wanted, got = adapted(input_ids=IDS).logits, merged.eval()(input_ids=IDS).logits
        with adapted.disable_adapter():
            effect = float((wanted - adapted(input_ids=IDS).logits).norm())
    assert float((got - wanted).norm()) < 0.03 * effect


def test_written_shards_are_the_bases_and_rounded_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path / "base", dtype="bfloat16", shard="60KB", tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "adapter")
    plan = Plan(base, adapter)
    folder = tmp_path / "merged"
    folder.mkdir()
    write_merged(plan, folder, merged_dtype(plan, None), [2, 5])
    index = "model.safetensors.index.json"
    before, after = (json.loads((place / index).read_text()) for place in (base, folder))
    assert len(set(before["weight_map"].values())) > 2
    assert after == before
    wanted = peft_model(base, adapter).merge_and_unload().state_dict()
    for file in set(after["weight_map"].values()):
        for name, got in load_file(folder / file).items():
            exact = wanted[name]
            step = torch.finfo(torch.bfloat16).eps * exact.abs()
            assert got.dtype == torch.bfloat16
            assert bool(((got.float() - exact).abs() <= step / 2 + 1e-6).all()), name
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == [2, 5]


def test_merging_in_float16_refuses_what_does_not_fit(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype="bfloat16")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    from safetensors.torch import save_file

    save_file(weights, base / "model.safetensors", {"format": "pt"})
    plan = Plan(base, save_adapter(base, tmp_path / "adapter"))
    (tmp_path / "merged").mkdir()
    with pytest.raises(EngineError, match=r"model\.norm\.weight has values of up to 9.98e\+04"):
        write_merged(plan, tmp_path / "merged", "float16", [])


def test_renamed_and_fused_weights_of_a_mixture_of_experts(tmp_path: Path) -> None:
    """transformers renames Mixtral's gate and fuses its experts at loading; the merged files keep the old names."""
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path / "base", "Mixtral", num_local_experts=4)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"],
                           modules_to_save=["gate"])  # fmt: skip
    plan = Plan(base, adapter)
    edited = [part.name for part in plan.parts.values() if part.edit]
    assert "model.layers.1.block_sparse_moe.gate.weight" in edited
    assert len(edited) == 6
    (tmp_path / "merged").mkdir()
    write_merged(plan, tmp_path / "merged", "bfloat16", [])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, got = peft_model(base, adapter)(input_ids=IDS).logits, merged(input_ids=IDS).logits
    assert float((got - wanted).norm()) < 0.03 * float(wanted.norm())
    # A change of a fused weight finds no single tensor.
    fused = save_adapter(
        base, tmp_path / "fused", target_modules=["q_proj"],
        modules_to_save=["experts"],
    )  # fmt: skip
    with pytest.raises(EngineError, match=r"experts\.\w+ is made of \d+ tensors"):
        Plan(base, fused)


def test_what_does_not_fit_is_refused(bases: Any, tmp_path: Path) -> None:
    base = bases()
    adapter = save_adapter(bases(hidden_size=32), tmp_path / "narrow")
    with pytest.raises(
        EngineError,
        match=r"(?s)B A is \(32, 96\), the base's weight \(64, 96\).*nothing was written",
    ):
        Plan(base, adapter)
    adapter = save_adapter(bases(num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(EngineError, match=r"the base has no weight model\.layers\.2"):
        Plan(base, adapter)
    good = save_adapter(base, tmp_path / "good")
    for change, said in (
        ({"init_lora_weights": "pissa"}, "rewrote the base"),
        ({"use_qalora": True}, "use_qalora = true"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ):
        config = json.loads((good / "adapter_config.json").read_text())
        (good / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(EngineError, match=said):
            Plan(base, good)
        (good / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text((base / "config.json").read_text())
    with pytest.raises(EngineError, match="must be safetensors"):
        Plan(tmp_path / "empty", good)
    gptq = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq"}
    }
    (tmp_path / "empty/config.json").write_text(json.dumps(gptq))
    with pytest.raises(EngineError, match="quantized with gptq"):
        Plan(tmp_path / "empty", good)


@pytest.mark.parametrize("width", [64, 96])
def test_a_base_that_exists_only_in_4_bits(tmp_path: Path, width: int) -> None:
    """96 inputs are one block of scales and a half."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path / "base", dtype="bfloat16", hidden_size=width, head_dim=16)
    adapter = save_adapter(base, tmp_path / "adapter")
    stored, dense = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = weight
            continue
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        stored[name] = packed
        for part, value in state.as_dict(packed=True).items():
            stored[f"{name}.{part}"] = value
        blocks = weight.float().flatten().split(64)
        scales = torch.stack([block.abs().max() for block in blocks])
        table = state.code
        nearest = [table[(block[:, None] / scale - table).abs().argmin(1)] * scale
                   for block, scale in zip(blocks, scales, strict=True)]  # fmt: skip
        dense[name] = torch.cat(nearest).reshape(weight.shape)
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))

    plan = Plan(base, adapter)
    assert plan.checkpoint.is_quantized
    for name, weight in dense.items():
        got = plan.weight(name, edited=False)
        # Double quantization of the scales costs a little.
        assert float((got - weight).norm()) < 0.02 * float(weight.norm()), name
    (tmp_path / "merged").mkdir()
    write_merged(plan, tmp_path / "merged", merged_dtype(plan, None), [])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")
    assert set(load_file(tmp_path / "merged/model.safetensors")) == {
        name for name in stored if name.count(".weight") == 1 and not name.endswith("__nf4")
    } - {name for name in stored if ".weight." in name}


def test_sizes_are_not_taken_from_the_fixture_by_chance() -> None:
    assert SIZES["hidden_size"] * SIZES["vocab_size"] * 4 > 4 * 64 * 40  # several blocks a tensor
