"""Which kernel runs each LoRA layer: what a run chooses, says, refuses and leaves behind."""

from __future__ import annotations

import functools
import io
import json
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
)

from fastlora.engines import engaged
from fastlora.engines.engaged import Plan, engage, lines
from fastlora.engines.unsloth import fused_layers, why_not_fused
from fastlora.errors import EngineError
from fastlora.recipe.load import load_recipe
from fastlora.train.session import Request, dry_run, train_run

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# What unsloth puts on a model, by its own names; the tests below never run them.
def apply_lora_qkv(self: Any, x: Any, inplace: bool = True) -> None: ...
def original_apply_qkv(self: Any, x: Any) -> None: ...
def apply_lora_o(self: Any, x: Any) -> None: ...
def original_apply_o(self: Any, x: Any) -> None: ...
def apply_lora_mlp_swiglu(self: Any, x: Any, inplace: bool = True) -> None: ...


def qwen2(dtype: torch.dtype = torch.bfloat16, **lora: Any) -> PeftModel:
    """Two layers, with biases on q, k and v as the architecture has them."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    given = {"r": 4, "target_modules": list(ALL)} | lora
    base = Qwen2ForCausalLM(config).to(dtype)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **given))


def layers(model: PeftModel) -> Iterator[nn.Module]:
    return iter(model.base_model.model.model.layers)


def without_biases(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
    return model


def fuse(model: PeftModel, qkv: bool = True) -> PeftModel:
    """As unsloth does on its own: the unfused functions at loading, the fused ones where they fit."""
    for layer in layers(model):
        layer.self_attn.apply_qkv = apply_lora_qkv if qkv else original_apply_qkv
        layer.self_attn.apply_o = apply_lora_o
        layer.mlp.forward = types.MethodType(apply_lora_mlp_swiglu, layer.mlp)
    return model


def test_qwen2_whose_q_k_and_v_unsloth_counts_as_patched() -> None:
    off = list(lines(engage(fuse(qwen2(), qkv=False), "unsloth", Plan(False, "ours are off"))))
    assert off == [
        "kernels: unsloth fused 8 (o_proj 2, gate_proj 2, up_proj 2, down_proj 2)",
        "kernels: PEFT 6 (q_proj 2, k_proj 2, v_proj 2; unsloth leaves them: bias on q_proj, k_proj, v_proj; "
        "ours are off)",
    ]
    model = fuse(qwen2(), qkv=False)
    rows = engage(model, "unsloth", Plan(ours=True))
    assert {(row.kind, row.count) for row in rows if row.kernel == "fastlora"} == {
        ("q_proj", 2), ("k_proj", 2), ("v_proj", 2),
    }  # fmt: skip
    assert not [row for row in rows if row.kernel == "PEFT"]
    assert all("bias on q_proj, k_proj, v_proj" in r.reason for r in rows if r.kernel == "fastlora")
    assert fused_layers(model) == {
        f"base_model.model.model.layers.{number}.{name}"
        for number in (0, 1)
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_layers_are_counted_one_by_one() -> None:
    """One decoder layer that unsloth did not fuse, and one whose MLP is tiled, does not lend its kind's name."""
    model = fuse(without_biases(qwen2()))
    first, second = layers(model)
    first.self_attn.apply_qkv = original_apply_qkv
    del second.mlp.forward
    second.mlp._unsloth_forward = types.MethodType(
        functools.partial(apply_lora_mlp_swiglu, inplace=False), second.mlp
    )
    rows = engage(model, "unsloth", Plan(False, "off"))
    counts = {(row.kind, row.kernel): row.count for row in rows}
    assert counts == {
        **{(kind, "unsloth fused"): 2 for kind in ALL[3:]},
        **{(kind, "unsloth fused"): 1 for kind in ALL[:3]},
        **{(kind, "PEFT"): 1 for kind in ALL[:3]},
    }
    second.mlp._unsloth_forward = type(second.mlp).forward  # what unsloth puts back
    assert len(fused_layers(model)) == 14 - 3 - 3


def test_mode_all_takes_unsloths_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_out(model: PeftModel) -> int:
        for layer in layers(model):
            layer.self_attn.apply_qkv, layer.self_attn.apply_o = (
                original_apply_qkv,
                original_apply_o,
            )
            del layer.mlp.forward
        return 6

    monkeypatch.setattr(engaged, "without_fused_lora", take_out)
    model = fuse(without_biases(qwen2()))
    rows = engage(model, "unsloth", Plan(ours=True, unsloths=False))
    assert {(row.kind, row.count, row.kernel) for row in rows} == {
        (kind, 2, "fastlora") for kind in ALL
    }
    assert all("their fused kernels were taken out" in row.reason for row in rows)


Built = Callable[[], PeftModel]
WHY: dict[str, tuple[Built, str, str]] = {
    "bias": (qwen2, "q_proj", "bias on q_proj, k_proj, v_proj"),
    "k missing": (
        lambda: qwen2(target_modules=["q_proj", "v_proj"]),
        "q_proj",
        "no adapter on k_proj",
    ),
    "gate missing": (
        lambda: qwen2(target_modules=["up_proj", "down_proj"]),
        "up_proj",
        "no adapter on gate_proj",
    ),
    "dora": (lambda: qwen2(use_dora=True), "o_proj", "DoRA"),
    "trained biases": (lambda: qwen2(bias="lora_only"), "o_proj", "lora.bias = lora_only"),
    "float32": (lambda: qwen2(torch.float32), "o_proj", "float32 base"),
    "dropout": (
        lambda: qwen2(lora_dropout=0.1),
        "o_proj",
        "dropout, with UNSLOTH_FUSED_LORA_DROPOUT=0",
    ),
    "output layer": (
        lambda: qwen2(target_modules=["lm_head"]),
        "lm_head",
        "it has no kernel for them",
    ),
    "unknown": (qwen2, "o_proj", "it installed no kernel on them"),
}


@pytest.mark.parametrize("case", WHY)
def test_why_unsloth_did_not_fuse(case: str) -> None:
    build, kind, reason = WHY[case]
    model = build()
    (name, *_) = [name for name, _ in model.named_modules() if name.endswith(kind)]
    assert why_not_fused(model, name) == reason
    model.config.model_type = "phi3"
    assert why_not_fused(model, name) == "model type phi3"


def request(workplace: Any, *settings: str, resume: bool = False) -> Request:
    return Request(load_recipe(workplace.recipe, settings), str(workplace.recipe), settings, resume)


def trained(workplace: Any, *settings: str) -> dict[str, Any]:
    settings = ("lora.dropout=0.0", *settings)
    return train_run(request(workplace, *settings), Console(quiet=True))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    def choose(name: str | None) -> None:
        if name is None:
            monkeypatch.delenv("FASTLORA_KERNELS", raising=False)
        else:
            monkeypatch.setenv("FASTLORA_KERNELS", name)

    choose(None)
    return choose


def kernels(manifest: dict[str, Any]) -> set[tuple[str, str]]:
    return {(row["kernel"], row["reason"]) for row in manifest["kernels"]}


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU does")


@cpu_only
def test_modes_on_a_cpu(workplace: Any, backend: Callable[[str | None], None]) -> None:
    step = "train.steps=1"
    idle = "fastlora's kernels need a GPU"
    assert kernels(trained(workplace, step)) == {("PEFT", idle)}
    assert kernels(trained(workplace, step, "kernels.mode=all")) == {
        ("fastlora", "their reference in PyTorch, on a CPU")
    }
    backend("reference")
    manifest = trained(workplace, step)
    assert kernels(manifest) == {("fastlora", "FASTLORA_KERNELS=reference")}
    assert [(row["kind"], row["count"]) for row in manifest["kernels"]] == [(k, 4) for k in ALL]
    assert (
        "kernels: fastlora 28 (q_proj 4, k_proj 4, v_proj 4, o_proj 4, gate_proj 4, up_proj 4, down_proj 4; "
        "FASTLORA_KERNELS=reference)" in manifest["notes"]
    )
    assert kernels(trained(workplace, step, "model.dtype=float16")) == {
        ("PEFT", "float16 on a CPU, which is trained without autocast")
    }


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("its", "runs"),
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
def test_a_base_that_was_quantized_for_another_dtype_than_the_runs(
    its: str,
    runs: str,
    workplace: Any,
    backend: Callable[[str | None], None],
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PEFT's forward runs it, whatever `attach` says: a run in float32 has no autocast, and under another the base
    does not follow."""
    backend("reference")
    folder = tmp_path / "nf4"
    shutil.copytree(tiny_model, folder)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, its)
    )
    AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.bfloat16, quantization_config=quantized, device_map={"": "cpu"}
    ).save_pretrained(folder)
    model = ("model.quantization=nf4", f"model.name={folder}", f"model.dtype={runs}")
    manifest = trained(workplace, "train.steps=1", *model)
    served = not [record for record in caplog.records if record.name == "fastlora_kernels"]
    assert served is (its == runs)
    if served:
        assert kernels(manifest) == {("fastlora", "FASTLORA_KERNELS=reference")}
        return
    reason = f"its checkpoint computes in {its}, the run in {runs}"
    assert kernels(manifest) == {("PEFT", reason)}
    with pytest.raises(EngineError, match=f"{reason}; set model.dtype to its"):
        trained(workplace, "kernels.require_fast=true", *model)


@pytest.mark.parametrize("mode", ["auto", "all", "off"])
def test_our_ops_are_in_the_graph_where_the_manifest_says_so(
    workplace: Any,
    backend: Callable[[str | None], None],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    compute_loss = Trainer.compute_loss

    def spy(*given: Any, **named: Any) -> Any:
        loss = compute_loss(*given, **named)
        if loss.grad_fn is not None:
            seen.append(sum("fastlora_kernels" in str(module) for module in functions(loss)))
        return loss

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    backend("reference")
    manifest = trained(
        workplace, "train.steps=1", f"kernels.mode={mode}", "train.checkpointing=none"
    )
    (kernel,) = {kernel for kernel, _ in kernels(manifest)}
    assert kernel == ("PEFT" if mode == "off" else "fastlora")
    assert len(seen) == 2
    assert all(count == 0 if mode == "off" else count > 0 for count in seen)


def functions(loss: torch.Tensor) -> Iterator[str]:
    """Where the autograd.Functions behind `loss` were written."""
    waiting, known = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if written := getattr(node, "_forward_cls", None):
            yield written.__module__
        waiting += [before for before, _ in node.next_functions]


def test_require_fast_refuses_before_the_first_step(
    workplace: Any, backend: Callable[[str | None], None]
) -> None:
    backend("reference")
    settings = ("kernels.require_fast=true", "lora.rank=257")
    with pytest.raises(EngineError) as refused:
        train_run(request(workplace, *settings), Console(quiet=True))
    assert str(refused.value) == (
        "kernels.require_fast: PEFT's plain layer runs 28 LoRA layers (q_proj 4, k_proj 4, v_proj 4, o_proj 4, "
        "gate_proj 4, up_proj 4, down_proj 4): rank above 256; set lora.rank to 256 or less, "
        "or set kernels.require_fast = false"
    )
    manifest = workplace.manifest()
    assert manifest["status"] == "failed"
    assert any("kernels: PEFT 28" in note for note in manifest["notes"])
    assert not (workplace.path() / "metrics.jsonl").exists()
    with pytest.raises(EngineError, match="rank above 256; set lora"):
        dry_run(request(workplace, *settings), Console(quiet=True))
    assert trained(workplace, "kernels.require_fast=true", "train.steps=1")["status"] == "finished"


def test_every_reason_for_a_slow_layer_is_named_with_its_remedy(
    backend: Callable[[str | None], None], tmp_path: Path
) -> None:
    backend("reference")
    model = qwen2(torch.float32, target_modules=[*ALL, "embed_tokens"])
    model.get_input_embeddings().base_layer.max_norm = 1.0
    for layer in layers(model):
        layer.self_attn.o_proj.base_layer.weight.requires_grad_()

    class Loads:
        name = "peft"

        def load(self, *_: Any) -> PeftModel:
            return model

    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[model]\nname = "m"\n[data]\nsources = ["x.jsonl"]\n[kernels]\nrequire_fast = true\n[output]\ndir = "runs"\n'
    )
    said: list[str] = []
    with pytest.raises(EngineError) as refused:
        engaged.load_model(Loads(), load_recipe(recipe), said.append)
    slow = str(refused.value).splitlines()
    assert len(slow) == 2
    assert "1 LoRA layers (embed_tokens 1)" in slow[0]
    assert "leave embed_tokens out of lora.target_modules" in slow[0]
    assert '2 LoRA layers (o_proj 2): base layer is trained too; set lora.bias = "none"' in slow[1]
    assert slow[1].endswith(", or set kernels.require_fast = false")
    assert len(said) == 3


def test_what_a_resumed_run_engages_is_its_own(
    workplace: Any, backend: Callable[[str | None], None]
) -> None:
    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    settings = ("lora.dropout=0.0", "train.steps=4")
    with pytest.raises(RuntimeError, match="stop"):
        train_run(request(workplace, *settings), Console(quiet=True), stop)
    said = io.StringIO()
    backend("reference")
    manifest = train_run(request(workplace, *settings, resume=True), Console(file=said, width=300))
    assert "kernels: fastlora 28" in said.getvalue()
    (resumed,) = manifest["resumed"]
    assert kernels(resumed) == {("fastlora", "FASTLORA_KERNELS=reference")}
    assert kernels(manifest) != kernels(resumed)


def test_a_dry_run_goes_to_the_first_step_and_leaves_nothing(workplace: Any) -> None:
    def files() -> set[Path]:
        return set(workplace.folder.rglob("*"))

    before = files()
    strict = ("--set", "kernels.require_fast=true", "--set", "lora.dora=true")
    on = {"FASTLORA_KERNELS": "reference"}
    out, err = workplace.run("--dry-run", "--json", *strict, **on)
    document = json.loads(out)
    assert document["engine"] == "peft"
    assert [(row["kind"], row["kernel"]) for row in document["kernels"]] == [
        (kind, "fastlora") for kind in ALL
    ]
    assert "16 steps of 8 sequences, 2 epochs" in err
    assert "kernels: fastlora 28" in err
    _, err = workplace.run("--dry-run", *strict, "--set", "lora.rank=257", expect=1, **on)
    assert "kernels.require_fast: PEFT's plain layer runs 28" in err
    _, err = workplace.run("--dry-run", "--set", f"output.dir={workplace.recipe}/x", expect=1)
    assert "a run cannot be made here" in err
    assert files() == before


def test_200_steps_with_and_without(workplace: Any, backend: Callable[[str | None], None]) -> None:
    """The same losses, and adapters that plain PEFT takes alike."""
    settings = (
        "train.steps=200", "train.lr=2e-4", "train.micro_batch=4", "train.effective_batch=4",
        "train.eval_every_steps=1000", "train.save_every_steps=1000",
    )  # fmt: skip
    backend("reference")
    assert kernels(trained(workplace, *settings)) == {("fastlora", "FASTLORA_KERNELS=reference")}
    assert kernels(trained(workplace, *settings, "kernels.mode=off")) == {
        ("PEFT", 'kernels.mode = "off"')
    }
    ours, theirs = (
        [value for _, which, value in workplace.losses(number) if which == "loss"]
        for number in (1, 2)
    )
    assert len(ours) == 200
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert sum(theirs[-20:]) < 0.5 * sum(theirs[:20])

    saved, plain = (
        load_file(workplace.path(number) / "adapter/adapter_model.safetensors") for number in (1, 2)
    )
    described = [{k: (v.shape, v.dtype) for k, v in found.items()} for found in (saved, plain)]
    assert described[0] == described[1]
    name = workplace.manifest()["recipe"]["model"]["name"]
    ids = torch.tensor([workplace.manifest()["probe_ids"]])
    logits = []
    for number in (1, 2):
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, workplace.path(number) / "adapter").eval()
        with torch.no_grad():
            logits.append(adapted(input_ids=ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
