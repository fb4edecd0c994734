"""A trained run exported: green, red when a weight is perturbed, and loadable without fastlora."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader

from fastlora.cli.main import cli
from fastlora.errors import GateError
from fastlora.export import gguf_write, merge
from fastlora.export.gguf_run import gguf_run
from fastlora.export.merge_run import merge_run

PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
run = sys.argv[1]
manifest = json.load(open(run + "/manifest.json"))
ids = torch.tensor([manifest["probe_ids"]])
base = AutoModelForCausalLM.from_pretrained(manifest["recipe"]["model"]["name"], dtype=torch.float32)
adapted = PeftModel.from_pretrained(base, run + "/adapter").eval()
merged = AutoModelForCausalLM.from_pretrained(run + "/merged")
assert len(AutoTokenizer.from_pretrained(run + "/merged")) == 104
with torch.no_grad():
    wanted, got = adapted(input_ids=ids).logits, merged.float()(input_ids=ids).logits
    with adapted.disable_adapter():
        effect = float((wanted - adapted(input_ids=ids).logits).norm())
assert not any(name.startswith(("fastlora", "unsloth")) for name in sys.modules)
print(json.dumps([float((got - wanted).norm()), effect]))
"""


pytestmark = pytest.mark.xdist_group("export")  # one worker makes the run


@pytest.fixture(scope="module")
def exported(make_workplace: Any) -> Any:
    made = make_workplace()
    made.run(
        "--set", "train.steps=12", "--set", "lora.dropout=0", "--set", "eval.rows=8",
        "--set", "output.merge=16bit", "--set", 'output.export=["q8_0"]',
    )  # fmt: skip
    return made


def test_merge_and_export_in_a_run_are_green(exported: Any) -> None:
    manifest = exported.manifest()
    assert manifest["status"] == "finished"
    for report in (manifest["merge"], manifest["export"]["q8_0"]):
        assert report["carried"] == pytest.approx(1, abs=0.1)
        assert report["answers"] == 8
        assert report["answers_same"] >= 7
        assert report["kl"] < 0.1 * report["kl_forgotten"]
    file = exported.path() / "gguf-q8_0" / manifest["export"]["q8_0"]["file"]
    reader = GGUFReader(file)
    chat = reader.get_field("tokenizer.chat_template").contents()
    assert chat == (exported.root / "recipes/tiny/model/chat_template.jinja").read_text()
    assert reader.get_field("tokenizer.ggml.bos_token_id").contents() == 1
    modelfile = (file.parent / "Modelfile").read_text()
    assert modelfile.startswith(f"FROM ./{file.name}\nTEMPLATE")
    assert 'PARAMETER stop "<|end|>"' in modelfile


def test_adapter_and_merged_model_load_without_fastlora(exported: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PLAIN, str(exported.path())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    error, effect = json.loads(done.stdout.splitlines()[-1])
    assert error < 0.05 * effect


def test_a_perturbed_weight_is_red_and_kept_apart(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported.opened()
    good = (run.merged / "model.safetensors").read_bytes()
    blocks = merge._blocks

    def perturbed(plan: Any, part: Any, dtype: str) -> Any:
        for block in blocks(plan, part, dtype):
            if "layers.2.mlp.up_proj" in part.name:
                block[7, 5] *= 1.03  # one weight, which no logits show
            yield block

    monkeypatch.setattr(merge, "_blocks", perturbed)
    with pytest.raises(
        GateError, match=r"1 tensors are not .*layers\.2\.mlp\.up_proj.*kept as .*merged\.diverged"
    ):
        merge_run(run)
    assert (run.path / "merged.diverged/model.safetensors").exists()
    assert (run.merged / "model.safetensors").read_bytes() == good
    data = gguf_write._data

    def turned(plan: Any, entry: Any) -> Any:
        return data(plan, entry)[::-1] if entry.name == "blk.1.attn_v.weight" else data(plan, entry)

    monkeypatch.setattr(gguf_write, "_data", lambda plan, entry: turned(plan, entry).copy())
    with pytest.raises(GateError, match=r"f16 GGUF file .*layers\.1\.self_attn\.v_proj"):
        gguf_run(run, "f16")
    assert [path.name for path in (run.path / "gguf-f16.diverged").iterdir()] == [
        "model-f16.diverged.gguf"
    ]
    assert not (run.path / "gguf-f16").exists()
    assert not list(run.path.glob(".*.[0-9]*"))


def test_an_adapter_that_was_not_merged_ends_the_command_with_3(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the process that exports, too.
    (tmp_path / "sitecustomize.py").write_text(
        "import fastlora.export.adapter as a\na.Adapter.apply = lambda self, edit, rows, start: rows.float()\n"
    )
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    done = CliRunner().invoke(cli, ["merge", str(exported.path())])
    assert done.exit_code == 3
    assert "it carries 0% of the adapter's effect" in done.output
    assert f"try again with: fastlora merge {exported.path()}" in done.output


def test_types_that_a_format_does_not_have(exported: Any) -> None:
    run = str(exported.path())
    done = CliRunner().invoke(cli, ["export", run, "--format", "16bit", "--quant", "q8_0"])
    assert done.exit_code == 2
    assert "--format 16bit has f16 and bf16" in done.output


def test_float16_is_nearer_than_bfloat16(exported: Any) -> None:
    """Where the weights are in its range; for those who ask for it."""
    run = exported.opened()
    bf16 = exported.manifest()["merge"]
    f16 = merge_run(run, "f16")
    assert (bf16["dtype"], f16["dtype"]) == ("bfloat16", "float16")
    assert f16["logit_error"] < 0.5 * bf16["logit_error"]
    assert torch.finfo(torch.float16).eps < torch.finfo(torch.bfloat16).eps
