"""memory.embedding = "host" on a GPU: the same bits, recorded or not, in less of the card's memory, and whole runs."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import SHAPE
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlora.engines import embedding
from fastlora.engines.embedding import embedding_to_host, in_host_memory
from fastlora.train.causal import right_padded
from fastlora.train.graphs import CudaRecorder, Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VOCABULARY, HIDDEN = 65_536, 512
TABLE = VOCABULARY * HIDDEN * 2
"""Bytes."""


def model() -> Any:
    from fastlora_kernels import attach
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2048, num_hidden_layers=4,
        num_attention_heads=8, use_cache=False, attn_implementation="sdpa", pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    peft: Any = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    attach(peft)
    return peft.train()


def inputs(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (2, 512), generator=draw).cuda()
    items = torch.tensor(1022, device="cuda")
    return {"input_ids": ids, "labels": ids.clone(), "num_items_in_batch": items}


@cache
def recorder() -> CudaRecorder:
    """One: cuBLAS keeps 32 MiB for each stream, and thread, that it has worked on."""
    return CudaRecorder()


def trained(peft: Any, recorded: bool) -> tuple[dict[str, torch.Tensor], int]:
    """(losses and gradients of some micro-batches, bytes allocated at the peak). Attention's plain form adds up in one
    order, and needs no mask, which no graph could record."""

    def step(given: Any) -> torch.Tensor:
        cast = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
        with cast, right_padded(peft), sdpa_kernel(SDPBackend.MATH):
            loss = peft(**given).loss
        loss.backward()
        detached: torch.Tensor = loss.detach()
        return detached

    adapter = [p for p in peft.parameters() if p.requires_grad]
    graphs = Graphs(recorder(), adapter)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the first time to record
        peft.zero_grad(set_to_none=False)
        losses = [
            graphs(step, inputs(seed)).clone() if recorded else step(inputs(seed))
            for seed in range(4)
        ]
    assert not graphs.why_not
    assert bool(graphs.replays) == recorded
    peak = torch.cuda.max_memory_allocated()
    found = {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}
    graphs.drop()
    return {"losses": torch.stack(losses), **found}, peak


@pytest.mark.parametrize("recorded", [False, True])
def test_no_bit_changes_and_its_memory_is_free(recorded: bool) -> None:
    gc.collect()
    peft = model()
    trained(peft, recorded)  # makes workspaces and gradients
    plain, _ = trained(peft, recorded)
    again, most = trained(peft, recorded)
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    del again  # so that as much is there when the peaks are taken
    weight = peft.get_input_embeddings().weight
    rows, before = weight[:100].clone(), torch.cuda.memory_allocated()
    assert embedding_to_host(peft) == ""
    assert before - torch.cuda.memory_allocated() == TABLE
    assert peft.device.type == "cuda"
    assert weight.device == rows.device
    assert torch.equal(weight[:100], rows)
    peft.to("cuda")  # as trainers do
    found, less = trained(peft, recorded)
    assert found.keys() == plain.keys()
    assert [name for name in found if not torch.equal(found[name], plain[name])] == []
    assert most - less == pytest.approx(TABLE, rel=0.05)


def test_pages_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    call = embedding._call

    def noted(function: str, *given: Any) -> None:
        call(function, *given)
        done.append(function)

    monkeypatch.setattr(embedding, "_call", noted)
    table = torch.randn(1000, 64, device="cuda").to(torch.bfloat16)
    for _ in range(3):
        found = in_host_memory(table)
        part = found[10:20]
        del found
        gc.collect()
        assert done[-1] == "cuMemHostGetDevicePointer_v2"  # a part of it is there
        assert torch.equal(part, table[10:20])
        del part
        gc.collect()
        assert done[-1] == "cuMemHostUnregister"


def test_rows_come_about_as_fast_as_copies(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3.1 8B's table, 4,096 of its rows; `plan` counts them at the rate of the bus."""
    table = torch.empty(128_256, 4096, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.randint(0, 128_256, (4096,), device="cuda")
    there = in_host_memory(table)
    rows = torch.nn.functional.embedding(ids, there)
    assert torch.equal(rows, torch.nn.functional.embedding(ids, table))
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)

    def milliseconds(call: Any) -> float:
        call()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(20):
            call()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 20

    copied = milliseconds(lambda: rows.copy_(pinned, non_blocking=True))
    read = milliseconds(lambda: torch.nn.functional.embedding(ids, there))
    here = milliseconds(lambda: torch.nn.functional.embedding(ids, table))
    with capsys.disabled():
        print(
            f"\n4,096 rows of 8B's embedding: {read:.2f} ms from host memory ({rows.nbytes / read / 1e6:.1f} GB/s), "
            f"{here:.3f} from the GPU's; a copy of as much {copied:.2f} ms"
        )
    assert read < 4 * copied


SMALLER = SHAPE | {"intermediate_size": 2048, "tie_word_embeddings": False}
RECIPE = """
engine = "{engine}"
[model]
name = "{model}"
quantization = "nf4"
seq_len_tokens = 512
[data]
sources = ["rows.jsonl"]
eval_split = 4
[train]
steps = 8
micro_batch = 2
effective_batch = 4
save_every_steps = 4
checkpointing = "offload"
[eval]
rows = 2
max_new_tokens = 4
[output]
dir = "runs"
"""


def run(folder: Path, *settings: str) -> tuple[dict[str, Any], list[float]]:
    """(manifest, losses)"""
    given = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "run", "recipe.toml", "--json", *given],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    newest = max((folder / "runs").glob("*"), key=lambda run: int(run.name))
    lines = map(json.loads, (newest / "metrics.jsonl").read_text().splitlines())
    manifest: dict[str, Any] = json.loads((newest / "manifest.json").read_text())
    return manifest, [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("graphs", ["false", "true"])
@pytest.mark.parametrize("engine", ["peft", "unsloth"])
def test_a_run(engine: str, graphs: str, tmp_path: Path) -> None:
    """With evaluations, checkpoints and answers before and after."""
    from fastlora.bench.weights import random_checkpoint
    from fastlora.recipe.schema import ModelSection

    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    section = ModelSection(name="x", quantization="nf4", dtype="bfloat16")
    checkpoint = random_checkpoint(SMALLER, section, tmp_path / "models")
    rows = [{"prompt": f"Count to {n}:", "completion": " 1 2 3" * (9 * n)} for n in range(1, 25)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(engine=engine, model=checkpoint))
    (plain, losses), (found, same) = (
        run(tmp_path, f"memory.cuda_graphs={graphs}", f"memory.embedding={place}")
        for place in ("gpu", "host")
    )
    (said,) = [note for note in found["notes"] if note.startswith("memory.embedding")]
    assert "in host memory" in said
    if graphs == "true":
        assert "stopped" not in found["cuda_graphs"], found["cuda_graphs"]
        assert found["cuda_graphs"]["replayed"] > 0
    assert same == pytest.approx(losses, rel=0.01)
    less = plain["result"]["peak_allocated_gib"] - found["result"]["peak_allocated_gib"]
    assert less == pytest.approx(32_000 * 1024 * 2 / 2**30, rel=0.15)
