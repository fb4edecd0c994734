"""Real captures: losses and gradients of replays are those of the calls, and how much faster they are.

What captures stand on is tested on a CPU (tests/unit/test_graphs.py, tests/integration/test_graphs.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.train.causal import right_padded
from fastlora.train.graphs import CudaRecorder, Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Many small layers: what Python takes long for.
SHAPE = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
ROWS, LENGTHS = 2, (256, 512, 384)


def model_of(checkpointing: str, kernels: bool) -> Any:
    """bfloat16, its adapter in float32 and away from its start."""
    from fastlora_kernels import attach, attach_head, recompute_layers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {name: value for name, value in SHAPE.items() if name != "model_type"}
    config = AutoConfig.for_model("llama", **settings, use_cache=False)
    base = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model: Any = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear")).cuda().train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    if kernels:
        attach(model)
        assert attach_head(model) is None
    if checkpointing != "none":
        layers = SHAPE["num_hidden_layers"]
        mode = "attention" if checkpointing.startswith("attention") else "layer"
        recompute_layers(model, [mode] * layers, offload=checkpointing.endswith("offload"))
        model.enable_input_require_grads()
    return model


def inputs(length: int, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 32_000, (ROWS, length), generator=draw)
    attention, labels = torch.ones_like(ids), ids.clone()
    labels[:, : length // 4] = labels[1, -20 - seed :] = -100
    attention[1, -20 - seed :] = 0
    given = {"input_ids": ids, "labels": labels, "attention_mask": attention}
    given["num_items_in_batch"] = torch.tensor(300 + seed)
    return {name: tensor.cuda() for name, tensor in given.items()}


def step_of(model: Any, kernels: bool) -> Callable[[Any], torch.Tensor]:
    def step(given: Any) -> torch.Tensor:
        more = {"most_labels": given["input_ids"].numel()} if kernels else {}
        cast = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
        with cast, right_padded(model):
            loss = model(**given, **more).loss
        loss.backward()
        detached: torch.Tensor = loss.detach()
        return detached

    return step


def seconds(step: Callable[[int], Any], times: int = 20) -> float:
    for call in range(3):
        step(call)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for call in range(times):
        step(call)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    "checkpointing", ["none", "full", "offload", "attention", "attention offload"]
)
def test_losses_and_gradients_of_replays(
    checkpointing: str, kernels: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit where a call's own repetition is; else within twice what a repetition differs by."""
    model = model_of(checkpointing, kernels)
    step = step_of(model, kernels)
    trained = [p for p in model.parameters() if p.requires_grad]
    graphs = Graphs(CudaRecorder(), trained)

    def found(call: Callable[[Any], torch.Tensor]) -> list[torch.Tensor]:
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.zero_()
        losses = [call(inputs(length, seed)) for seed, length in enumerate(LENGTHS * 2)]
        return [*losses, *(p.grad.clone() for p in trained)]

    def replay(given: Any) -> torch.Tensor:
        return graphs(step, given)

    for _ in range(2):
        found(replay)
    assert not graphs.why_not
    assert graphs.recorded == len(LENGTHS)
    before = graphs.replays
    replayed = found(replay)
    assert graphs.replays == before + 2 * len(LENGTHS)
    eager, again = found(step), found(step)
    for one, two, three in zip(replayed, eager, again, strict=True):
        noise = float((two - three).abs().max())
        assert float((one - two).abs().max()) <= 2 * noise + 1e-7 * float(two.abs().max())
    assert all(float(p.grad.norm()) > 0 for p in trained)

    batches = [inputs(LENGTHS[0], seed) for seed in range(4)]
    torch.cuda.reset_peak_memory_stats()
    plain_s = seconds(lambda call: step(batches[call % 4]))
    replay_s = seconds(lambda call: graphs(step, batches[call % 4]))
    with capsys.disabled():
        print(
            f"\ncheckpointing {checkpointing}, kernels {kernels}: {1000 * plain_s:.1f} ms as calls, "
            f"{1000 * replay_s:.1f} ms as replays ({plain_s / replay_s:.2f}x); "
            f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved with {graphs.recorded} graphs"
        )
    assert replay_s < plain_s


def test_dropped_their_memory_is_free() -> None:
    model = model_of("none", kernels=True)
    step = step_of(model, kernels=True)
    graphs = Graphs(CudaRecorder(), [p for p in model.parameters() if p.requires_grad])
    step(inputs(512, 0))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for call in range(4):
        graphs(step, inputs(512, call))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    assert held > before
    assert graphs.drop() == 1
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + 0.2 * (held - before) + 2**26
    for call in range(4):
        graphs(step, inputs(512, call))
    assert graphs.recorded == 1


def test_who_waits_is_named_and_what_fails_to_be_recorded_does_no_harm() -> None:
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))

    def waiting(given: Any) -> torch.Tensor:
        loss = (weight * given["x"]).sum()
        loss.backward()
        return loss.detach().abs() if float(loss.detach()) > 0 else loss.detach()

    def failing(given: Any) -> torch.Tensor:
        loss = (weight * given["x"]).sum()
        loss.backward()
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return loss.detach()

    for function, why in ((waiting, "gpu/test_graphs.py:"), (failing, "Error: ")):
        graphs = Graphs(CudaRecorder(), [weight])
        weight.grad = None
        for call in range(1, 6):
            given = {"x": torch.full((4,), float(call), device="cuda")}
            assert float(graphs(function, given)) == 4 * call
        assert why in graphs.why_not
        assert weight.grad is not None
        assert weight.grad.tolist() == [15.0] * 4


RECIPE = """
engine = "peft"
[model]
name = "{model}"
quantization = "nf4"
seq_len_tokens = 1024
[data]
sources = ["rows.jsonl"]
eval_split = 8
[train]
steps = 30
micro_batch = 2
effective_batch = 4
optimizer = "adamw"
lr = 1e-4
eval_every_steps = 20
checkpointing = "full"
[eval]
rows = 0
[output]
dir = "runs"
"""


def trained(folder: Path, *settings: str) -> dict[str, Any]:
    """The manifest of a run, with the losses of its steps."""
    from fastlora.bench.weights import random_checkpoint
    from fastlora.recipe.schema import ModelSection

    section = ModelSection(name="x", quantization="nf4", dtype="bfloat16")
    model = random_checkpoint(SHAPE, section, folder / "models")
    rows = [{"prompt": f"Count to {n}:", "completion": " 1 2 3" * (9 * n)} for n in range(1, 41)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model))
    given = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "run", str(recipe), "--json", *given],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    newest = max((folder / "runs").glob("*"), key=lambda run: int(run.name))
    manifest: dict[str, Any] = json.loads((newest / "manifest.json").read_text())
    lines = (newest / "metrics.jsonl").read_text().splitlines()
    logged = [entry for entry in map(json.loads, lines) if "loss" in entry]
    manifest["losses"] = [entry["loss"] for entry in logged]
    manifest["grad_norms"] = [entry["grad_norm"] for entry in logged]
    return manifest


UNSLOTH = (
    "engine=unsloth", "train.micro_batch=2", "train.effective_batch=16", "train.steps=12",
    "train.log_every_steps=1", "train.lr=2e-4", "train.warmup_fraction=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def as_unsloth_does(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    folder = tmp_path_factory.mktemp("unsloth")
    plain = (*UNSLOTH, "memory.cuda_graphs=false", "train.checkpointing=unsloth")
    return {mode: trained(folder, *plain, f"kernels.mode={mode}") for mode in ("auto", "all")}


@pytest.mark.parametrize(
    "settings",
    [
        ("kernels.mode=all", "memory.cuda_graphs=false", "train.checkpointing=none"),
        ("kernels.mode=auto", "memory.cuda_graphs=true", "train.checkpointing=none"),
        ("kernels.mode=all", "memory.cuda_graphs=true", "train.checkpointing=none"),
        ("kernels.mode=all", "memory.cuda_graphs=true", "train.checkpointing=offload"),
        (
            "kernels.mode=all", "memory.cuda_graphs=true", "train.checkpointing=offload",
            "memory.keep_attention_layers=12",
        ),
        (
            "kernels.mode=all", "memory.cuda_graphs=false", "train.checkpointing=offload",
            "memory.keep_attention_layers=12", "memory.stream_layers=8",
        ),
    ],
    ids=["kept", "its kernels, recorded", "recorded", "offloaded", "attention", "streamed"],
)  # fmt: skip
def test_on_unsloth_every_step_is_the_same_training(
    settings: tuple[str, ...], as_unsloth_does: dict[str, Any], tmp_path: Path
) -> None:
    """Losses alone would not tell: Adam takes a gradient of any scale for the same. With unsloth's own kernels the
    first updates lose more to rounding (docs/log.md, 2026-11-28), so that each run is held to one with its kernels."""
    found = trained(tmp_path, *UNSLOTH, *settings)
    if "memory.cuda_graphs=true" in settings:
        assert "stopped" not in found["cuda_graphs"], found["cuda_graphs"]
        assert found["cuda_graphs"]["replayed"] == found["cuda_graphs"]["of"]
    like = as_unsloth_does["all" if "kernels.mode=all" in settings else "auto"]
    # Unsloth's kernels add the adapter's share to a y that is rounded already. What that leaves of the first updates
    # (docs/log.md, 2026-11-28) hangs on the last bits, and those of its compiled layers are not those of the recorded
    # ones, which are not compiled. Once, on an H200, the third of the twelve losses was off by 1.3 %.
    its_own = "kernels.mode=auto" in settings
    assert found["losses"] == pytest.approx(like["losses"], rel=0.02 if its_own else 0.01)
    assert found["grad_norms"] == pytest.approx(like["grad_norms"], rel=0.05)
    assert found["losses"] == pytest.approx(as_unsloth_does["auto"]["losses"], rel=0.05)


def test_by_default_a_small_model_is_recorded_and_computes_nothing_again(tmp_path: Path) -> None:
    """Which waits for the host otherwise."""
    plain = trained(tmp_path, "memory.cuda_graphs=false")
    default = trained(tmp_path, "train.checkpointing=auto")
    chosen = {one["key"]: one["value"] for one in default["memory"]["filled"]}
    assert chosen["memory.cuda_graphs"] is True
    assert chosen["train.checkpointing"] == "none"
    assert "stopped" not in default["cuda_graphs"]
    assert default["cuda_graphs"]["replayed"] > default["cuda_graphs"]["of"] / 2
    assert default["losses"] == pytest.approx(plain["losses"], rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("data.packing=true",),
        ("data.packing=true", "train.checkpointing=offload", "memory.keep_attention_layers=12"),
        ("data.packing=true", "train.checkpointing=offload", "engine=unsloth"),
        ("data.packing=true", "train.checkpointing=none", "engine=unsloth"),
        ("train.checkpointing=none",),
        ("train.checkpointing=offload",),
        ("memory.keep_layers=4", "memory.keep_attention_layers=4"),
        ("train.checkpointing=offload", "memory.keep_attention_layers=12"),
        ("model.dtype=float16",),
    ],
    ids=[
        "checkpointed",
        "packed",
        "packed, attention",
        "packed, unsloth, offload",
        "packed, unsloth, not checkpointed",
        "not checkpointed",
        "offload",
        "in between",
        "attention",
        "float16",
    ],
)
def test_a_run_of_replays(
    settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "engine=unsloth" in settings and find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    plain, replayed = (
        trained(tmp_path, *settings, f"memory.cuda_graphs={graphs}") for graphs in ("false", "true")
    )
    found = replayed["cuda_graphs"]
    assert "stopped" not in found, found
    assert found["replayed"] > found["of"] / 2
    if "data.packing=true" in settings:
        assert found["rows"] > 0
        assert not any("keeps rows apart" in note for note in replayed["notes"])
    assert replayed["result"]["tokens"] == plain["result"]["tokens"]
    assert replayed["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert replayed["result"]["eval_losses"] == pytest.approx(
        plain["result"]["eval_losses"], rel=0.02
    )
    with capsys.disabled():
        speeds, peaks = (
            [run["result"][key] for run in (plain, replayed)]
            for key in ("tokens_per_s_median", "peak_reserved_gib")
        )
        print(
            f"\n{' '.join(settings)}: {speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s "
            f"({speeds[1] / speeds[0]:.2f}x), {peaks[0]:.2f} and {peaks[1]:.2f} GiB; {found}"
        )
