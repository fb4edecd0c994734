"""Runs that keep more or less of their layers for backward are the same run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlora_kernels.recompute import Recomputed
from ooms import Ooms
from rich.console import Console
from safetensors.torch import load_file

from fastlora.recipe.load import load_recipe
from fastlora.train.session import Request, train_run

SETTINGS = (
    "train.steps=3", "train.micro_batch=2", "train.effective_batch=4", "train.eval_every_steps=2",
    "lora.dropout=0.1", "train.save_every_steps=50",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two that wait for each other on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gone_through(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed again, in order."""
    seen: list[str] = []
    backward = Recomputed.backward

    def counted(ctx: Any, *gradients: Any) -> Any:
        region = ctx.region
        where = "host" if ctx.stash is not None else "kept"
        seen.append(f"{'attention' if region.attention else 'layer'} {where}")
        return backward(ctx, *gradients)

    monkeypatch.setattr(Recomputed, "backward", staticmethod(counted))
    return seen


def run(workplace: Any, *settings: str) -> tuple[dict[str, Any], str]:
    settings = (*SETTINGS, *settings)
    request = Request(load_recipe(workplace.recipe, settings), str(workplace.recipe), settings)
    said = io.StringIO()
    return train_run(request, Console(file=said, width=2000)), said.getvalue()


def adapter(manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(manifest["path"]) / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("kernels", ["off", "all"])
def test_the_run_is_the_same(workplace: Any, gone_through: list[str], kernels: str) -> None:
    mode = f"kernels.mode={kernels}"
    plain, _ = run(workplace, mode, "train.checkpointing=none")
    assert gone_through == []
    layers = _layers(plain)
    assert layers > 2
    mixed = (
        "train.checkpointing=offload",
        "memory.keep_layers=1",
        "memory.keep_attention_layers=2",
    )
    for settings, expected in (
        (("train.checkpointing=full",), ["layer kept"] * layers),
        # Of those that are computed again the last keeps its input, on the device.
        (mixed, ["layer kept", "attention host", *["layer host"] * (layers - 3)]),
    ):
        gone_through.clear()
        other, _ = run(workplace, mode, *settings)
        # Two micro-batches a step; the same after an evaluation as before it.
        assert gone_through == expected * 6
        for name, tensor in adapter(plain).items():
            assert torch.equal(tensor, adapter(other)[name]), name
        assert other["result"]["eval_losses"] == plain["result"]["eval_losses"]


def _layers(manifest: dict[str, Any]) -> int:
    return len({name.split(".layers.")[1].split(".")[0] for name in adapter(manifest)})


def test_what_was_kept_is_given_up_where_memory_runs_out(
    workplace: Any, gone_through: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.micro_batch=1", "train.effective_batch=1", "train.checkpointing=offload")
    plain, _ = run(workplace, *settings)
    layers = _layers(plain)
    gone_through.clear()
    with monkeypatch.context() as patch:
        Ooms(patch, {2: ["backward"]}, effective_batch=1)
        tight, said = run(workplace, *settings, "memory.keep_layers=40")
    assert f"memory.keep_layers: {layers}, since the model has no more" in said
    assert 'train.checkpointing = "offload" and nothing kept by [memory] from now on' in said
    assert tight["oom"][-1]["checkpointing"] == "offload"
    assert len(gone_through) == 2 * layers  # of steps 2 and 3
    for name, tensor in adapter(plain).items():
        assert torch.equal(tensor, adapter(tight)[name]), name
