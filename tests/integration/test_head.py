"""Runs with an adapter on the output layer and the embedding, and the loss in chunks, from recipe to merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastlora.export.gguf_run import gguf_run
from fastlora.export.load import load_run
from fastlora.export.merge_run import merge_run


@pytest.fixture
def untied(workplace: Any, tmp_path: Path) -> str:
    """The tiny model with an output layer of its own."""
    from transformers import AutoConfig, AutoTokenizer

    tiny = workplace.root / "recipes/tiny/model"
    config = AutoConfig.from_pretrained(tiny, tie_word_embeddings=False)
    base = AutoModelForCausalLM.from_pretrained(tiny, config=config)
    base.lm_head.weight.data = base.model.embed_tokens.weight.data.clone()
    base.save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "untied")
    return f"model.name={tmp_path}/untied"


@pytest.fixture(params=["tied", "untied"])
def model(request: Any, workplace: Any) -> str:
    """The tiny model as it is, and with an output layer of its own."""
    if request.param == "untied":
        return str(request.getfixturevalue("untied"))
    return f"model.name={workplace.root}/recipes/tiny/model"


BOTH = 'lora.target_modules=["q_proj", "embed_tokens", "lm_head"]'
# Of adapters on tied layers, which it merges otherwise than fastlora.
peft_warns = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


@peft_warns
def test_adapters_on_head_and_embedding_train_and_merge(workplace: Any, model: str) -> None:
    from peft import PeftModel

    workplace.run(
        "--set", model, "--set", BOTH, "--set", "lora.dropout=0", "--set", "train.keep_best=true",
    )  # fmt: skip
    manifest = workplace.manifest()
    assert merge_run(workplace.opened())["carried"] == pytest.approx(1, abs=0.05)
    assert not any("holds all logits" in note for note in manifest["notes"])
    losses = [value for _, which, value in workplace.losses() if which == "loss"]
    assert losses[-1] < losses[0]
    saved = load_file(workplace.path() / "adapter/adapter_model.safetensors")
    trained = [name for name, tensor in saved.items() if "B" in name and tensor.any()]
    assert any("lm_head.lora_B" in name for name in trained)
    assert any("embed_tokens.lora_embedding_B" in name for name in trained)
    # Both of them begin at zero in one of their two halves; and no frozen weight lies beside them.
    assert saved["base_model.model.model.embed_tokens.lora_embedding_A"].any()
    assert all("lora_" in name for name in saved)

    base = AutoModelForCausalLM.from_pretrained(model.partition("=")[2], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(workplace.path() / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(workplace.path() / "merged", dtype=torch.float32)
    assert type(merged).__name__ == "LlamaForCausalLM"
    ids = torch.tensor([manifest["probe_ids"]])
    with torch.no_grad():
        wanted, got = adapted(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
        with adapted.disable_adapter():
            effect = float((wanted - adapted(input_ids=ids).logits).norm())
    assert float((got - wanted).norm()) < 0.1 * effect


def test_the_loss_in_chunks_is_the_loss(workplace: Any, untied: str) -> None:
    """Every logged loss, gradient norm and held-out loss, with dropout in the layers."""
    for chunked in ("true", "false"):
        workplace.run(
            "--set", untied, "--set", f"train.chunked_loss={chunked}", "--set", "train.epochs=1"
        )  # fmt: skip
    ours, plain = workplace.losses(1), workplace.losses(2)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in plain]
    assert [entry[2] for entry in ours] == pytest.approx([entry[2] for entry in plain], rel=1e-3)
    assert ours != plain  # another order of sums: it was not the same code
    assert not any("chunked_loss" in note for note in workplace.manifest(1)["notes"])


def test_where_our_loss_does_not_serve_the_adapter_trains_all_the_same(
    workplace: Any, untied: str
) -> None:
    """The recipe's dropout, which is on the head too."""
    workplace.run("--set", untied, "--set", BOTH)
    notes = workplace.manifest()["notes"]
    assert any("holds all logits" in note and "dropout" in note for note in notes)
    losses = [value for _, which, value in workplace.losses() if which == "loss"]
    assert losses[-1] < losses[0]


HEAD = ("--set", 'lora.target_modules=["q_proj", "lm_head"]')


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_leaves_the_other_as_it_was(
    workplace: Any, target: str
) -> None:
    """In the run, where the adapter is asked, and in what is made of it."""
    _, err = workplace.run("--set", f'lora.target_modules=["q_proj", "{target}"]')
    assert f"the adapter changes {target} alone" in " ".join(err.split())
    assert "UserWarning" not in err
    run = workplace.opened()
    tuned = load_run(run)
    ids = torch.tensor([run.manifest["probe_ids"]])
    with torch.no_grad(), tuned.speaking("tuned") as model:
        wanted = model(input_ids=ids).logits
    gguf, merged = gguf_run(run, "f16"), merge_run(run)
    assert "the export holds both" in "".join(gguf["notes"] + merged["notes"])
    assert gguf["carried"] == pytest.approx(1, abs=0.05)
    saved = load_file(run.merged / "model.safetensors")
    base = load_file(workplace.root / "recipes/tiny/model/model.safetensors")
    shared = base["model.embed_tokens.weight"]
    parts = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    changed = {name for name, key in parts.items() if not torch.equal(saved[key], shared)}
    assert changed == {target}
    again = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=0.05, atol=0.05)


def said_of_the_loss(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("loss: ")]


def test_a_dry_run_says_whose_loss_and_require_fast_refuses_all_logits(
    workplace: Any, untied: str
) -> None:
    """Before the questions are asked, in both."""
    settings = ("--set", untied, *HEAD, "--set", "train.steps=1", "--set", "eval.rows=2",
                "--set", 'eval.metrics=["exact_match"]')  # fmt: skip
    strict = ("--set", "kernels.require_fast=true")
    on = {"FASTLORA_KERNELS": "reference"}
    for more, reason, mend in (
        (
            ("--set", "lora.dropout=0.1"),
            "lm_head: dropout in training",
            "set lora.dropout = 0, or ",
        ),
        (
            ("--set", "lora.dropout=0", "--set", "lora.dora=true"),
            "lm_head: DoRA",
            "set lora.dora = false, or ",
        ),
    ):
        _, dry = workplace.run(*settings, *more, "--dry-run", **on)
        assert said_of_the_loss(dry) == [
            f"loss: it holds all logits, because of an adapter ({reason})"
        ]
        for how in (("--dry-run",), ()):
            _, err = workplace.run(*settings, *more, *strict, *how, expect=1, **on)
            assert "kernels: fastlora 5" in err
            assert (
                f"error: kernels.require_fast: the loss would hold all logits ({reason}); {mend}"
                "set train.chunked_loss = false if it may, or set kernels.require_fast = false"
            ) in " ".join(err.split())
            assert "answers before training" not in err
    wanted = ("--set", "lora.dropout=0.1", "--set", "train.chunked_loss=false")
    _, dry = workplace.run(*settings, *wanted, *strict, "--dry-run", **on)
    assert "it holds all logits" in dry

    free = ("--set", "lora.dropout=0", *strict)
    _, dry = workplace.run(*settings, *free, "--dry-run", **on)
    _, err = workplace.run(*settings, *free, **on)
    assert said_of_the_loss(dry) == said_of_the_loss(err) == ["loss: fastlora, without the logits"]
    assert err.index("loss: fastlora") < err.index("answers before training")


@pytest.mark.slow
def test_resumed_with_both_it_is_the_run_that_was_not_interrupted(
    workplace: Any, model: str
) -> None:
    """Checkpoints hold the adapter of both without the frozen weights beside it."""
    arguments = ("--set", model, "--set", BOTH, "--set", "lora.dropout=0")
    workplace.interrupt("SIGINT", 6, *arguments, expect=130)
    workplace.run(*arguments, "--resume")
    workplace.run(*arguments)
    assert workplace.losses(1) == workplace.losses(2)
