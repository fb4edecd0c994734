"""Flash attention over packed rows on a GPU: each row's own attention, whatever stands beside it, and recorded.

Which numbers it is given is tested on a CPU (tests/unit/test_packed.py); whole runs of it are in test_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastlora.engines.base import CUMULATIVE_LENGTHS, where_they_end
from fastlora.engines.packed import has_flash_attention, keep_rows_apart
from fastlora.engines.peft import PeftEngine
from fastlora.engines.varlen import attend
from fastlora.recipe.schema import Recipe
from fastlora.train.collate import Collator
from fastlora.train.graphs import CudaRecorder, Graphs
from fastlora.train.shapes import pad

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LENGTHS = (200, 1, 511, 130, 64)
TOKENS, LONGEST = 1024, 512
HEADS = ((32, 8, 64), (8, 8, 128), (28, 4, 128), (8, 1, 256))


def draw(heads: tuple[int, int, int], seed: int) -> list[torch.Tensor]:
    """q, k, v as a model has them, and a gradient of the output."""
    torch.manual_seed(seed)
    count, fewer, size = heads
    made = [
        torch.randn(1, TOKENS, n, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (count, fewer, fewer)
    ]
    return [*made, torch.randn(1, TOKENS, count, size, device="cuda", dtype=torch.bfloat16)]


def ends_of(lengths: tuple[int, ...]) -> torch.Tensor:
    """With the padding's row behind them, and 20 of no tokens."""
    rows = (*lengths, TOKENS - sum(lengths), *(0,) * 20)
    return where_they_end(rows, LONGEST)[CUMULATIVE_LENGTHS].cuda()


def _rows() -> list[int]:
    return [*LENGTHS, TOKENS - sum(LENGTHS)]


def found(tensors: list[torch.Tensor], ends: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of q, k and v."""
    *given, gradient = tensors
    leaves = [each.detach().requires_grad_() for each in given]
    out = attend(*leaves, ends, LONGEST)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def alone(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The same of one row after the other."""
    *given, gradient = (each.to(dtype) for each in tensors)
    leaves = [each.detach().requires_grad_() for each in given]
    rows = zip(*(each.split(_rows(), dim=2) for each in leaves), strict=True)
    outs = [scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows]
    out = torch.cat(outs, dim=2).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_each_row_is_what_it_is_alone(heads: tuple[int, int, int]) -> None:
    """No further from float32 than PyTorch's attention of each row in bfloat16, and nothing waits."""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    if not has_flash_attention(
        SimpleNamespace(**dict(zip(names, heads, strict=True))), torch.bfloat16
    ):
        pytest.skip("PyTorch has none for these heads here")
    tensors, ends = draw(heads, 0), ends_of(LENGTHS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = found(tensors, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact, theirs = alone(tensors, torch.float32), alone(tensors, torch.bfloat16)
    for mine, their, want in zip(ours, theirs, exact, strict=True):
        mine_off, their_off = ((each.float() - want).norm() / want.norm() for each in (mine, their))
        assert mine_off < 1.5 * their_off + 1e-3


def test_what_stands_in_another_row_changes_no_bit() -> None:
    tensors = draw(HEADS[0], 1)
    first = found(tensors, ends_of(LENGTHS))[0]
    for each in tensors:
        view = each if each is tensors[-1] else each.transpose(1, 2)
        view[:, : LENGTHS[0]] = 9.0
    second = found(tensors, ends_of(LENGTHS))[0]
    assert torch.equal(first[:, LENGTHS[0] :], second[:, LENGTHS[0] :])
    assert not torch.equal(first[:, : LENGTHS[0]], second[:, : LENGTHS[0]])


def test_recorded_once_it_serves_other_rows() -> None:
    tensors = draw(HEADS[0], 2)
    q, k, v, gradient = tensors
    leaf = torch.nn.Parameter(q.detach().clone())

    def step(given: Any) -> torch.Tensor:
        out = attend(leaf, k, v, given["ends"], LONGEST)
        out.backward(gradient)
        return out.detach()

    graphs = Graphs(CudaRecorder(), [leaf])
    for lengths in (LENGTHS, (500, 12, 512), (1, 511) * 2, (512, 512)):
        rows = (*lengths, TOKENS - sum(lengths), *(0,) * (9 - len(lengths)))
        ends = where_they_end(rows, LONGEST)[CUMULATIVE_LENGTHS].cuda()
        if leaf.grad is not None:
            leaf.grad.zero_()
        out = graphs(step, {"ends": ends}).clone()
        want = found([leaf.detach(), k, v, gradient], ends)
        assert torch.equal(out, want[0])
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, want[1], rtol=2e-2, atol=2e-2)
    assert not graphs.why_not
    assert graphs.replays == 2


def test_what_rows_of_no_tokens_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """An 8B layer's heads, forward and backward, 4,096 tokens in rows of up to 2,048; and with a mask instead."""
    lengths, tokens = (2048, 1100, 500, 300, 100, 20, 20, 8), 4096
    torch.manual_seed(3)
    q, k, v = (
        torch.randn(1, n, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (32, 8, 8)
    )
    place = torch.arange(tokens, device="cuda")
    row = torch.searchsorted(torch.tensor(lengths, device="cuda").cumsum(0), place, right=True)
    mask = (row[:, None] == row) & (place[:, None] >= place)

    def milliseconds(step: Callable[[], torch.Tensor]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for call in range(25):
            if call == 5:
                begin.record()
            step().sum().backward()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 20

    def packed(rows: int) -> Callable[[], torch.Tensor]:
        every = (*lengths, *(0,) * (rows - len(lengths)))
        ends = where_they_end(every, 2048)[CUMULATIVE_LENGTHS].cuda()
        return lambda: attend(q, k, v, ends, 2048)

    ours = {rows: milliseconds(packed(rows)) for rows in (8, 16, 56, 136)}

    def with_a_mask() -> torch.Tensor:
        wide = [each.repeat_interleave(4, dim=1) for each in (k, v)]  # as transformers does
        return scaled_dot_product_attention(q, *wide, attn_mask=mask)

    masked = milliseconds(with_a_mask)
    with capsys.disabled():
        said = ", ".join(f"{ms:.3f} ms in {rows} rows" for rows, ms in ours.items())
        print(f"\n8 packed rows and those of no tokens: {said}; {masked:.3f} ms with a mask")
    assert ours[56] < masked


SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_losses_and_gradients_are_those_with_a_mask(kind: str, recomputed: bool) -> None:
    """As close as the mask's in bfloat16 are to the mask's in float32."""
    from fastlora_kernels import recompute_layers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, use_cache=False)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(base, lora).cuda().train()
    if recomputed:
        recompute_layers(model, ["layer", "attention"] * 2)
        model.enable_input_require_grads()
    recipe = Recipe.model_validate(
        {
            "model": {"name": "x", "seq_len_tokens": LONGEST, "dtype": "bfloat16"},
            "data": {"sources": ["x"], "packing": True},
            "output": {"dir": "x"},
        }
    )
    engine, said = PeftEngine(), list[str]()
    ids = torch.randint(3, 512, (sum(LENGTHS),)).tolist()
    rows = [{"input_ids": ids, "labels": ids, "seq_lengths": list(LENGTHS)}]

    def results(*, cast: bool) -> list[torch.Tensor]:
        model.zero_grad()
        batch = {name: tensor.cuda() for name, tensor in Collator(0, engine)(rows).items()}
        if engine.longest_packed:
            batch = pad(batch, TOKENS, 0, rows=16, longest=LONGEST)
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    exact, masked = results(cast=False), results(cast=True)
    keep_rows_apart(model, engine, recipe, said.append)
    assert said == []
    assert engine.longest_packed
    ours = results(cast=True)
    for mine, their, want in zip(ours, masked, exact, strict=True):
        mine_off, their_off = ((each.float() - want).norm() / want.norm() for each in (mine, their))
        assert mine_off < 1.5 * their_off + 5e-3
