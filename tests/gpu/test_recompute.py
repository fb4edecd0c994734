"""Layers that are computed again on a GPU: the same bits with inputs in host memory, in less of the card's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LAYERS, HIDDEN, WIDE = 8, 512, 2048
TOKENS = 4 * 1024
MIB = 2**20


def model(attention: str = "eager", nf4: bool = False, **lora: Any) -> Any:
    """Eager attention gives the same bits each time; the other needs no mask, which no graph could record."""
    from fastlora_kernels import attach
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, use_cache=False, attn_implementation=attention,
        pad_token_id=0,
    )  # fmt: skip
    base: Any = LlamaForCausalLM(config)
    if nf4:
        in_4_bits(base)
    base = base.to("cuda", torch.bfloat16)
    peft = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", **lora)
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    attach(peft)
    return peft.train()


def in_4_bits(base: Any) -> None:
    """Its layers, once it is moved to the GPU."""
    from bitsandbytes.nn import Linear4bit

    base.is_loaded_in_4bit = True
    for module in list(base.model.layers.modules()):
        for name, linear in module.named_children():
            if type(linear) is torch.nn.Linear:
                n, k = linear.weight.shape
                quantized = Linear4bit(k, n, False, torch.bfloat16, quant_type="nf4")
                quantized.load_state_dict(linear.state_dict())
                setattr(module, name, quantized)


def ids(rows: int, length: int) -> torch.Tensor:
    return (torch.arange(rows * length, device="cuda") * 7 % 1021 + 2).view(rows, length)


def step(peft: Any, shapes: Any = ((4, 1024), (2, 640), (4, 1024))) -> dict[str, torch.Tensor]:
    """Several micro-batches, with the host far ahead of the GPU: nothing here waits for it."""
    torch.manual_seed(3)
    peft.zero_grad(set_to_none=False)  # a graph adds to those that were there when it was recorded
    losses = []
    for rows, length in shapes:
        with torch.autocast("cuda", torch.bfloat16):
            loss = peft(input_ids=ids(rows, length), labels=ids(rows, length)).loss
        loss.backward()
        losses.append(loss.detach())
    found = {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}
    return {"loss": torch.stack(losses), **found}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_bit_changes(dropout: float) -> None:
    from fastlora_kernels import recompute_layers

    peft = model(lora_dropout=dropout)
    plain = step(peft)
    assert_same(step(peft), plain)  # or nothing could be said
    for modes, offload in (
        (["layer"] * LAYERS, False),
        (["layer"] * LAYERS, True),
        (["attention"] * LAYERS, False),
        (["attention"] * LAYERS, True),
        (["layer"] * 5 + ["attention"] * 2 + ["keep"], True),
    ):
        recompute_layers(peft, modes, offload=offload)  # type: ignore[arg-type]
        for _ in range(4):
            assert_same(step(peft), plain)


@pytest.mark.parametrize("mode", ["layer", "attention"])
def test_a_matrix_of_the_repetition_is_backwards_too(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, gate's and up's three matrices of a layer are two, and the peak is higher by them at the most."""
    from fastlora_kernels import recompute_layers
    from fastlora_kernels.ops import lora_linear

    made: list[tuple[int, int]] = []
    own = lora_linear.dequantize

    def noted(weight: Any, *more: Any) -> torch.Tensor:
        made.append(weight.shape)
        return own(weight, *more)

    monkeypatch.setattr(lora_linear, "dequantize", noted)
    peft = model(nf4=True)
    plain = step(peft)
    assert_same(step(peft), plain)  # or nothing could be said
    found: list[tuple[int, float]] = []
    for dense in (False, True):
        recompute_layers(peft, [mode] * LAYERS, keep_dequantized=dense)
        for _ in range(3):
            made.clear()
            assert_same(step(peft), plain)
        found.append((made.count((WIDE, HIDDEN)), most_and_kept(peft)[0]))
    (again, less), (kept, more) = found
    assert again == 3 * 3 * 2 * LAYERS  # of three micro-batches
    assert kept == 3 * 2 * 2 * LAYERS
    gate_and_up, others = 2 * 2 * WIDE * HIDDEN, 2 * 3 * HIDDEN * HIDDEN  # q and o, k and v of half
    assert more - less <= gate_and_up + (others if mode == "layer" else 0) + MIB


@pytest.mark.parametrize("offload", [False, True])
def test_fused_attention_is_computed_once(offload: bool) -> None:
    """Its backward adds up in any order: gradients as close as a repetition's."""
    from fastlora_kernels import recompute_layers
    from fastlora_kernels.attention import OPERATORS
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += func._schema.name in OPERATORS
            return func(*args, **(kwargs or {}))

    peft = model("sdpa")
    plain, *again = (step(peft) for _ in range(4))
    recompute_layers(peft, ["attention"] * LAYERS, offload=offload)
    for _ in range(3):
        found = step(peft)
        assert torch.equal(found["loss"], plain["loss"])
        for name, theirs in plain.items():
            noise = max(float((one[name] - theirs).norm()) for one in again)
            assert float((found[name] - theirs).norm()) <= 3 * noise + 1e-3 * float(theirs.norm())
    with Counted() as counted:
        step(peft, ((4, 1024),))
    assert counted.count == LAYERS + offload


def test_copies_that_are_late_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy begins some milliseconds after the layers around it have gone on."""
    from fastlora_kernels import offload, recompute_layers

    peft = model()
    plain = step(peft)
    copy = offload.Lane._copy

    def late(lane: Any, to: Any, source: Any, *buffers: Any) -> None:
        assert lane.stream is not None
        with torch.cuda.stream(lane.stream):
            torch.cuda._sleep(10_000_000)
        copy(lane, to, source, *buffers)

    monkeypatch.setattr(offload.Lane, "_copy", late)
    for mode in ("layer", "attention"):
        recompute_layers(peft, [mode] * LAYERS, offload=True)  # type: ignore[list-item]
        for _ in range(2):
            assert_same(step(peft), plain)


def test_the_host_waits_for_nothing() -> None:
    """A model may wait by itself, as transformers does where it makes masks: ours adds no place to those."""
    from fastlora_kernels import recompute_layers

    from fastlora.train.graphs import waits

    peft = model("sdpa")
    inputs = ids(4, 1024)

    def places() -> set[str]:
        def once() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = peft(input_ids=inputs, labels=inputs, num_items_in_batch=TOKENS).loss
            loss.backward()

        for _ in range(2):
            once()
        with waits() as found:
            once()
        return set(found)

    with waits() as found:
        inputs.sum().item()
    assert found, "this test sees no waiting"
    plain = places()
    for offload in (False, True):
        recompute_layers(peft, ["layer"] * LAYERS, offload=offload)
        assert places() - plain == set()


def most_and_kept(peft: Any) -> tuple[float, float]:
    """(bytes at the peak, bytes that are there when backward begins), beyond those before the step."""
    inputs = ids(4, 1024)

    def once(between: Callable[[], None]) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = peft(input_ids=inputs, labels=inputs).loss
        between()
        loss.backward()

    once(lambda: None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept: list[int] = []
    once(lambda: kept.append(torch.cuda.memory_allocated() - before))
    return torch.cuda.max_memory_allocated() - before, kept[0]


def test_memory_is_what_the_formulas_say() -> None:
    """docs/memory.md: a layer's input h, of attention q, 2 k and h, 2 bytes each and token. (This attention is no
    operator, so that its own output is made again.)"""
    from fastlora_kernels import recompute_layers

    peft = model()
    kept: dict[str, float] = {}
    most: dict[str, float] = {}
    for name, mode, offload in (
        ("keep", "keep", False), ("attention", "attention", False), ("layer", "layer", False),
        ("offload", "layer", True),
    ):  # fmt: skip
        recompute_layers(peft, [mode] * LAYERS, offload=offload)  # type: ignore[list-item]
        most[name], kept[name] = most_and_kept(peft)
    assert most["keep"] > most["attention"] > most["layer"]
    inputs = HIDDEN * 2 * TOKENS
    given = (2 * HIDDEN + 2 * HIDDEN // 2) * 2 * TOKENS
    assert kept["attention"] - kept["layer"] == pytest.approx(LAYERS * given, rel=0.1)
    # All but the last one's.
    assert kept["layer"] - kept["offload"] == pytest.approx((LAYERS - 1) * inputs, rel=0.1)
    assert most["layer"] - most["offload"] > (LAYERS - 4) * inputs


@pytest.mark.parametrize("dense", [False, True])
def test_a_cuda_graph_records_it(dense: bool) -> None:
    from fastlora_kernels import recompute_layers

    peft = model("sdpa", nf4=dense)
    recompute_layers(peft, ["layer"] * LAYERS, offload=True, keep_dequantized=dense)
    inputs = ids(4, 1024).clone()

    def once() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = peft(input_ids=inputs, labels=inputs, num_items_in_batch=TOKENS).loss
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            peft.zero_grad(set_to_none=False)
            once()
    torch.cuda.current_stream().wait_stream(side)
    parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = once()

    def replayed(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs.copy_(rows)
        peft.zero_grad(set_to_none=False)
        graph.replay()
        return {"loss": recorded.clone()} | {name: p.grad.clone() for name, p in parameters.items()}

    def eager(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs.copy_(rows)
        peft.zero_grad(set_to_none=False)
        return {"loss": once()} | {name: p.grad.clone() for name, p in parameters.items()}

    def compare(rows: torch.Tensor) -> None:
        theirs = eager(rows)
        for name, found in replayed(rows).items():
            # The backward of this attention adds up in any order.
            error = float((found - theirs[name]).norm())
            assert error <= 0.01 * float(theirs[name].norm()), name

    for rows in (ids(4, 1024), ids(4, 1024).flip(1)):
        compare(rows)
    # Longer rows, outside of the graph, take larger buffers: its own are still there.
    step(peft, ((4, 1400),))
    compare(ids(4, 1024))
