"""Whole runs on a CPU: early stopping, the best checkpoint, packing, NF4, and the embedded default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.engines.peft import PeftEngine
from fastlora.export.merge_run import merge_run
from fastlora.recipe.load import load_recipe
from fastlora.rundir.store import RunDir


def eval_losses(workplace: object, number: int = 1) -> dict[int, float]:
    return {step: value for step, which, value in workplace.losses(number) if which == "eval_loss"}


def test_early_stopping_and_the_best_checkpoint(workplace: object) -> None:
    # A rate this high makes the held-out loss rise after its first falls.
    workplace.run(
        "--set", "train.lr=0.02", "--set", "train.epochs=40", "--set", "train.scheduler=constant",
        "--set", "train.early_stopping_patience=2", "--set", "train.keep_best=true",
        "--set", "train.keep_checkpoints=1", "--set", "train.eval_every_steps=2",
    )  # fmt: skip
    losses = eval_losses(workplace)
    best = min(losses, key=lambda step: losses[step])
    manifest = workplace.manifest()
    assert manifest["check"]["rows"]["looked_at_closely"] == 80
    assert "check: 80 rows: 0 with errors" in manifest["notes"]
    assert manifest["result"]["steps"] == best + 4 < 320
    assert manifest["result"]["best_step"] == best
    from safetensors.torch import load_file

    kept = workplace.path() / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"
    chosen, saved = (
        load_file(workplace.path() / "adapter/adapter_model.safetensors"),
        load_file(kept),
    )
    assert chosen.keys() == saved.keys()
    assert all(torch.equal(chosen[name], saved[name]) for name in chosen)


def test_the_last_step_is_logged_evaluated_and_saved_whatever_the_cadence(
    workplace: object,
) -> None:
    workplace.run(
        "--set",
        "train.steps=5",
        "--set",
        "train.eval_every_steps=3",
        "--set",
        "train.save_every_steps=100",
        "--set",
        "train.log_every_steps=100",
    )
    assert list(eval_losses(workplace)) == [3, 5]
    assert [step for step, which, _ in workplace.losses() if which == "loss"] == [1, 3, 5]
    assert (workplace.path() / "checkpoints" / "checkpoint-5" / "COMPLETE").exists()


def test_packed_rows_do_not_see_each_other(workplace: object) -> None:
    """One step over all rows: packed and padded, the same loss and gradient norm."""
    one_step = [
        "--set",
        "train.steps=1",
        "--set",
        "lora.dropout=0.0",
        "--set",
        "train.effective_batch=64",
    ]
    workplace.run(*one_step, "--set", "train.micro_batch=64")
    workplace.run(*one_step, "--set", "data.packing=true", "--set", "train.micro_batch=64")
    padded, packed = workplace.losses(1), workplace.losses(2)
    assert workplace.manifest(2)["data"]["train"]["sequences"] < 40
    for (_, which, left), (_, _, right) in zip(padded[:2], packed[:2], strict=True):
        assert right == pytest.approx(left, rel=1e-4), which


def test_every_micro_batch_trains_in_training_mode(
    workplace: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient checkpointing and dropout are off in a module that is not, and nothing would say so."""
    from rich.console import Console
    from transformers import Trainer

    from fastlora.recipe.load import load_recipe
    from fastlora.train.session import Request, train_run

    seen = []
    compute_loss = Trainer.compute_loss

    def spy(self: Trainer, model: torch.nn.Module, *rest: object, **named: object) -> object:
        seen.append({module.training for module in model.modules()})
        return compute_loss(self, model, *rest, **named)

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    settings = ["train.steps=4", "train.eval_every_steps=2"]
    request = Request(load_recipe(workplace.recipe, settings), str(workplace.recipe), settings)
    train_run(request, Console(quiet=True))
    # 2 micro-batches a step; the 16 held-out rows are 4 batches.
    assert seen == 2 * (4 * [{True}] + 4 * [{False}])


def test_unknown_target_modules_are_refused_before_the_model_loads(workplace: object) -> None:
    """Beside a good one PEFT ignores them: part of the adapter would be missing, and nothing say so."""
    targets = 'lora.target_modules=["q_proj", "v_prj", "mlp.down_proj", "experts"]'
    for mode in ((), ("--dry-run",)):
        _, err = workplace.run("--set", targets, *mode, expect=1)
        assert "the model has no v_prj; did you mean v_proj?" in err
        assert "the model has no experts; It has" in err.replace("; it", "; It")
        assert "has no q_proj" not in err
        assert "has no mlp.down_proj" not in err
        assert not workplace.path().exists()


def test_nf4_on_a_cpu(workplace: object) -> None:
    workplace.run(
        "--set",
        "model.quantization=nf4",
        "--set",
        "lora.dropout=0.0",
    )
    losses = [value for _, which, value in workplace.losses() if which == "loss"]
    assert losses[-1] < 0.8 * losses[0]
    manifest = workplace.manifest()
    assert manifest["recipe"]["model"]["quantization"] == "nf4"
    assert merge_run(workplace.opened())["carried"] == pytest.approx(1, abs=0.05)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(workplace.path() / "merged")
    assert merged.dtype == torch.bfloat16


def test_nf4_on_a_cpu_trains_as_before_once_it_answered(workplace: Any) -> None:
    settings = ["model.quantization=nf4", "lora.dropout=0.0"]
    model = PeftEngine().load(load_recipe(workplace.recipe, settings), print)
    ids = torch.arange(12)[None]

    def gradients() -> list[torch.Tensor]:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        found = [one.grad.clone() for one in model.parameters() if one.grad is not None]
        model.zero_grad()
        return found

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert any(gradient.any() for gradient in before)
    torch.testing.assert_close(after, before)


def test_a_loss_that_is_not_finite_ends_the_run(workplace: object) -> None:
    """However rarely it is logged; and its state is not kept, since a resume would go on from it."""
    _, err = workplace.run(
        "--set", "train.lr=1e30", "--set", "train.warmup_fraction=0.0",
        "--set", "train.log_every_steps=100", "--set", "train.save_every_steps=3",
        "--set", "train.eval_every_steps=100", expect=1,
    )  # fmt: skip
    assert "the loss is not finite at step 3" in err
    assert workplace.manifest()["status"] == "failed"
    assert RunDir(workplace.path()).complete_checkpoints() == []


def test_dry_run_shows_and_counts_and_trains_nothing(workplace: object) -> None:
    out, err = workplace.run("--dry-run", "--json")
    document = json.loads(out)
    assert (document["steps"], document["effective_batch"]) == (16, 8)
    assert document["data"]["train"]["rows"] == 64
    pieces = document["preview"]
    assert [piece["supervised"] for piece in pieces] == [False, True]
    assert pieces[0]["text"].startswith("<|bos|><|user|>Cipher: ")
    assert pieces[1]["text"].endswith("<|end|>")
    assert "The first training row" in err
    assert not (workplace.folder / "runs").exists()


def test_the_embedded_default(workplace: object) -> None:
    """`fastlora run tiny`, at its full length: it learns what the base cannot do."""
    workplace.recipe = "tiny"
    out, _ = workplace.run("--json", "--set", f"output.dir={workplace.folder}/runs", new=True)
    manifest = json.loads(out)
    answers = manifest["answers"]
    assert answers["rows"] == answers["expected"] == 200
    assert answers["before"]["exact_match"] <= 0.01
    assert answers["after"]["exact_match"] > 0.9
    assert manifest["merge"]["answers_same"] == 200
    assert manifest["result"]["last_loss"] < 0.1 < manifest["result"]["first_loss"]
    for part in (
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "loss.png",
        "metrics.jsonl",
    ):
        assert (workplace.path() / part).stat().st_size > 0
    assert manifest["versions"]["torch"]
    assert manifest["data"]["sources"][0]["fingerprint"].startswith("sha256:")


def test_the_adapter_loads_in_plain_peft(workplace: object) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    workplace.run()
    base = AutoModelForCausalLM.from_pretrained(workplace.manifest()["recipe"]["model"]["name"])
    adapted = PeftModel.from_pretrained(base, workplace.path() / "adapter").eval()
    ids = torch.tensor([workplace.manifest()["probe_ids"]])
    with torch.no_grad():
        with adapted.disable_adapter():
            before = adapted(input_ids=ids).logits
        after = adapted(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1
    config = json.loads((workplace.path() / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["peft_type"]) == (4, "LORA")
    assert Path(config["base_model_name_or_path"]).is_dir()
