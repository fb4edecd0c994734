"""Our layers inside a decoder layer that is compiled, as unsloth compiles it: one region per class, no fullgraph.

A graph break there would cost what compiling gains, and a failure puts the layer back to eager, with a line in
the log that nobody reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from bitsandbytes.nn import Params4bit
from fastlora_kernels import attach
from fastlora_kernels.layers.group import drop_waiting, outputs_of, trace_together
from fastlora_kernels.layers.linear import GROUP
from fastlora_kernels.ops import registered
from fastlora_kernels.ops.lora_linear import Projection, lora_linears
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from scripts import script
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# Dynamo looks at the .grad of what it finds.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = registered.OPS
Calls = script("host").Calls
TOLERANCE = 1e-5 if DEVICE == "cpu" else 1e-4


@pytest.fixture(autouse=True)
def _own_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTLORA_KERNELS", "triton" if DEVICE == "cuda" else "reference")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(folder: Path, nf4: bool, **lora: Any) -> PeftModel:
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": DEVICE},
        quantization_config=quantized if nf4 else None,
    )
    base.config.use_cache = False
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **lora)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.train()
    return model


def step(
    model: PeftModel, length: int = 40, half: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and every gradient; `half`: in bfloat16, by autocast."""
    ids = torch.randint(100, (2, length), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def compile_layers(monkeypatch: pytest.MonkeyPatch, backend: str = "aot_eager") -> None:
    compiled = torch.compile(LlamaDecoderLayer.forward, fullgraph=False, backend=backend)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", compiled)


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert found[name].dtype == exact.dtype, name
        assert float(exact.norm()) > 0, name
        error = float((found[name] - exact).norm())
        assert error <= tolerance * float(exact.norm()), name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_one_graph_for_all_layers(
    tiny_model: Path, nf4: bool, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tiny_model, nf4, use_dora=dora)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert attach(model).left == {}
    trace_together(model)
    loss, gradients = step(model)
    compile_layers(monkeypatch)
    for _ in range(2):
        again, found = step(model)
    assert dict(counters["graph_break"]) == {}
    # Without gradients and, when a layer is run again, with; each for all four layers.
    assert counters["stats"]["unique_graphs"] == 2
    assert again == pytest.approx(loss, rel=TOLERANCE)
    assert_same(found, gradients)
    groups = [vars(layer)[GROUP] for layer in model.modules() if GROUP in vars(layer)]
    assert bool(groups) is not dora
    assert all(group._traced is None for group in groups)  # nothing is kept behind a graph


def test_layers_at_hand_together_are_one_op(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gate and up, whose MLP is ours, q, k and v, which their attention calls one after the other, and what a caller
    takes together."""
    model = tiny(tiny_model, nf4=False)
    assert attach(model).left == {}
    trace_together(model)
    loss, gradients = step(model)
    forwards: list[int] = []
    original = registered.lora_linears

    def counted(x: torch.Tensor, projections: Any) -> Any:
        forwards.append(len(projections))
        return original(x, projections)

    monkeypatch.setattr(registered, "lora_linears", counted)
    compile_layers(monkeypatch)
    again, found = step(model)
    assert sorted(set(forwards)) == [1, 2, 3]  # o alone; gate and up; q, k and v
    assert again == pytest.approx(loss, rel=TOLERANCE)
    assert_same(found, gradients)
    assert dict(counters["graph_break"]) == {}

    attention = model.base_model.model.model.layers[0].self_attn
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    x = torch.randn(2, 5, layers[0].in_features, device=DEVICE)
    expected = [layer(x) for layer in layers]
    forwards.clear()
    together = torch.compile(lambda x: outputs_of(layers, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(together(x), expected)
    assert forwards == [3]


class Attention(nn.Module):
    def __init__(self, at_k: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(8, 8))
        self.at_k = at_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x)
        k = self.at_k(self.k_proj(x))
        v = self.v_proj(x)
        return q + k + v


def attention(together: bool, at_k: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Attention(at_k))
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    inject_adapter_in_model(config, model)
    assert attach(model.to(DEVICE)).groups == {"q_proj+k_proj+v_proj": 1}
    if together:
        trace_together(model)
    return model


def work(self: Any, x: torch.Tensor) -> torch.Tensor:
    q = self.q_proj(x)
    k = self.k_proj(x)
    v = self.v_proj(x)
    return q + k + v  # type: ignore[no-any-return]


class Calling(Attention):
    """As unsloth's, whose forward only calls a function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return work(self, x)


def test_a_function_that_a_forward_calls_and_that_is_another_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "Attention", Calling)
    first = attention(together=True)
    assert len(vars(first[0].q_proj)[GROUP]._in_order) == 3
    monkeypatch.setitem(globals(), "work", lambda self, x: self.q_proj(x) + self.k_proj(x.add_(1)))
    second = attention(together=True)
    assert vars(second[0].q_proj)[GROUP]._in_order == []


def test_checkpointing_inside_of_what_is_compiled() -> None:
    """No state of ours stands in its way, unless it is asked for."""
    model, x = attention(together=False), torch.randn(3, 8, device=DEVICE)
    step = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(step(x), model(x))


def test_a_hooked_layer_is_called_when_it_is_its_turn() -> None:
    model, x = attention(together=True), torch.randn(3, 8, device=DEVICE)
    model[0].k_proj.register_forward_pre_hook(lambda layer, args: (args[0].mul_(2),))
    with torch.no_grad():
        wanted = model(x.clone())
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x.clone()), wanted)


def test_outputs_of_a_forward_that_broke_off_are_let_go() -> None:
    @torch.compiler.disable
    def breaks(y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in between")

    model = attention(together=True, at_k=breaks)
    with pytest.raises(RuntimeError, match="in between"):
        torch.compile(model, backend="aot_eager")(torch.randn(3, 8, device=DEVICE))
    group = vars(model[0].q_proj)[GROUP]
    assert group._traced is not None
    drop_waiting(model)
    assert group._traced is None


def test_other_lengths_and_autocast(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that torch.compile then takes as symbols; a base and adapters that autocast casts, gradients not."""
    model = tiny(tiny_model, nf4=False)
    model.enable_input_require_grads()
    attach(model)
    lengths = (40, 24, 33)
    expected = [step(model, length, half=True) for length in lengths]
    compile_layers(monkeypatch)
    for length, (loss, gradients) in zip(lengths, expected, strict=True):
        again, found = step(model, length, half=True)
        assert again == pytest.approx(loss, rel=2e-2)
        assert_same(found, gradients, 2e-2)
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 2  # for the first length, and for any


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_nothing_dense_is_saved(
    tiny_model: Path, dora: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes of a 4-bit weight are, at no cost; the matrix that they stand for would be a whole layer in 16 bits."""
    if backend == "inductor" and (dora or (DEVICE == "cpu" and shutil.which("g++") is None)):
        pytest.skip("one is enough, and that needs a C++ compiler")
    model = tiny(tiny_model, nf4=True, use_dora=dora)
    attach(model)
    loss, gradients = step(model, 37)
    compile_layers(monkeypatch, backend)
    bases = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    sizes = {base.in_features * base.out_features for base in bases}
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        again, found = step(model, 37)
    assert dict(counters["graph_break"]) == {}
    wide = [tensor for tensor in saved if tensor.is_floating_point()]
    assert not [tuple(tensor.shape) for tensor in wide if tensor.numel() in sizes]
    codes = {tensor.numel() * 2 for tensor in saved if tensor.dtype == torch.uint8}
    assert sizes <= codes
    assert again == pytest.approx(loss, rel=TOLERANCE)
    assert_same(found, gradients)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_stands_outside_the_graph(
    tiny_model: Path, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tiny_model, nf4=False, lora_dropout=0.5, use_dora=dora)
    attach(model)
    compile_layers(monkeypatch)
    _, first = step(model)
    _, second = step(model)
    assert counters["graph_break"]
    name = next(name for name in first if "down_proj.lora_A" in name)
    assert float(first[name].norm()) > 0
    assert not torch.equal(first[name], second[name])  # another mask


WEIGHTS = ["dense", "4bit", "nested"]


def frozen(kind: str) -> tuple[list[torch.Tensor], list[int]]:
    """A weight (16, 64) as the ops take it."""
    dense = torch.randn(16, 64, device=DEVICE)
    if kind == "dense":
        return registered.taken_apart(dense)
    weight = Params4bit(
        dense, requires_grad=False, quant_type="nf4", compress_statistics=kind == "nested"
    )
    return registered.taken_apart(weight.to(DEVICE))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def check(op: Any, *args: Any) -> None:
    """What torch finds wrong with an op is raised: its schema, its fake, its gradient, other sizes; and with the ops
    that it is made of."""
    torch.library.opcheck(op.default, args)
    with Calls() as called:
        found = op(*args)
        ys = found if isinstance(found, list) else [found]
        torch.autograd.backward(ys, [torch.randn_like(y) for y in ys])
    assert [func._opname.removeprefix(op.__name__) for func, _ in called.calls] == [
        "_forward",
        "_backward",
    ]
    for func, given in called.calls:
        torch.library.opcheck(func, tree_map_only(torch.Tensor, torch.Tensor.detach, given))


def test_lora_linears_are_an_op() -> None:
    """On three bases, with and without biases, with two scalings; by themselves and against what runs in eager."""
    x, g = random(2, 5, 64), [torch.randn(2, 5, 16, device=DEVICE) for _ in WEIGHTS]
    parts = [frozen(kind) for kind in WEIGHTS]
    tensors = [tensor for some, _ in parts for tensor in some]
    layouts = []  # whether there is a bias and a beta, how many tensors and numbers, numbers
    for n, (some, layout) in enumerate(parts):
        layouts += [n == 0, n == 1, len(some), len(layout), *layout]
    matrices = [matrix for _ in WEIGHTS for matrix in (random(4, 64), random(16, 4))]
    biases = [torch.randn(16, device=DEVICE), None, None]
    betas, scalings = [None, random(16), None], [2.0, 0.5, 2.0]
    check(OPS.lora_linears, x, tensors, layouts, biases[:1], matrices, betas[1:2], scalings)
    some = [matrices[0], *(one.detach() for one in matrices[1:])]
    given = x.detach(), tensors, layouts, biases[:1], some, [betas[1].detach()], scalings
    check(OPS.lora_linears, *given)
    none = [one.detach() for one in matrices]
    check(OPS.lora_linears, x, tensors, layouts, biases[:1], none, [betas[1].detach()], scalings)
    given = zip(parts, biases, matrices[::2], matrices[1::2], scalings, betas, strict=True)
    projections = [
        Projection(registered.put_together(*one), bias, a, b, scaling, beta)
        for one, bias, a, b, scaling, beta in given
    ]
    trained = [x, *matrices, betas[1]]
    ys, expected = registered.lora_linears(x, projections), lora_linears(x, projections)
    torch.testing.assert_close(ys, list(expected))
    torch.testing.assert_close(
        torch.autograd.grad(ys, trained, g), torch.autograd.grad(expected, trained, g)
    )


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("biased", [False, True])
def test_dora_linear_is_an_op(kind: str, biased: bool) -> None:
    x, a, b, m = random(2, 5, 64), random(4, 64), random(16, 4), random(16)
    weight, bias = frozen(kind), torch.randn(16, device=DEVICE) if biased else None
    check(OPS.dora_linear, x, *weight, bias, a, b, m, 2.0)
    for only in range(4):
        given = [one if i == only else one.detach() for i, one in enumerate((x, a, b, m))]
        check(OPS.dora_linear, given[0], *weight, bias, *given[1:], 2.0)


@pytest.mark.parametrize("halves", [False, True])
def test_glu_is_an_op(halves: bool) -> None:
    gate, up = (random(2, 5, 64), None) if halves else (random(2, 5, 32), random(2, 5, 32))
    check(OPS.glu, gate, up, "silu")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("halves", [False, True])
def test_glu_lora_linear_is_an_op(kind: str, halves: bool) -> None:
    gate, up = (random(2, 5, 128), None) if halves else (random(2, 5, 64), random(2, 5, 64))
    a, b, weight = random(4, 64), random(16, 4), frozen(kind)
    given = "gelu", torch.float32, *weight, None, a, b, None, 2.0
    check(OPS.glu_lora_linear, gate, up, *given)
    check(OPS.glu_lora_linear, gate.detach(), None if up is None else up.detach(), *given)
    for only in range(4):
        some = [
            one if i == only or one is None else one.detach()
            for i, one in enumerate((gate, up, a, b))
        ]
        if some[only] is not None:
            more = *weight, None, *some[2:], None, 2.0
            check(OPS.glu_lora_linear, *some[:2], "gelu", torch.float32, *more)


def test_a_second_derivative_raises() -> None:
    x, a, b = random(3, 64), random(4, 64), random(16, 4)
    y = registered.lora_linear(x, Projection(torch.randn(16, 64, device=DEVICE), None, a, b, 2.0))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
