"""Layers that are computed again in backward: every gradient to the last bit, what is kept, and what is made."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from fastlora_kernels import attach, attention, keep_layers, recompute, recompute_layers
from fastlora_kernels.ops import glu, lora_linear
from fastlora_kernels.ops.four_bit import FourBit
from fastlora_kernels.recompute import Mode, Region, decoder_layers
from fastlora_kernels.unneeded import recomputing
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

HIDDEN, WIDE, RANK, LAYERS = 32, 48, 4, 4
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
MODES: dict[str, list[Mode]] = {
    "layer": ["layer"] * LAYERS,
    "attention": ["attention"] * LAYERS,
    "keep": ["keep"] * LAYERS,
    "mixed": ["layer", "layer", "attention", "keep"],
    "odd": ["keep", "layer", "attention", "layer"],
}
Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products are ten times as slow where two threads share a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(
    name: str,
    kernels: bool = True,
    own: dict[str, Any] | None = None,
    *,
    nf4: bool = False,
    **lora: Any,
) -> Any:
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**SMALL | (own or {}))
    base = getattr(transformers, f"{name}ForCausalLM")(settings)
    if nf4:
        in_4_bits(base)
    given = {"r": RANK, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **given))
    for parameter_name, parameter in peft.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    if kernels:
        attach(peft)
    return peft.train()


def in_4_bits(base: Any) -> None:
    """Its layers. On a CPU our ops serve them where FASTLORA_KERNELS says so."""
    base.is_loaded_in_4bit = True
    for module in list(base.model.layers.modules()):
        for name, linear in module.named_children():
            if type(linear) is nn.Linear:
                n, k = linear.weight.shape
                base = bnb.nn.Linear4bit(k, n, False, torch.float32, quant_type="nf4")
                base.load_state_dict(linear.state_dict())
                setattr(module, name, base.to("cpu"))  # .to quantizes


def ids(rows: int, length: int) -> torch.Tensor:
    return (torch.arange(rows * length) * 7 % 61 + 2).view(rows, length)


def results(
    peft: Any, lengths: Sequence[int] = (17, 9), autocast: bool = False, inside: bool = False
) -> Results:
    """Of so many accumulated micro-batches. The random numbers that come next are among them."""
    torch.manual_seed(3)
    peft.zero_grad()
    losses = []
    for length in lengths:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = peft(input_ids=ids(2, length), labels=ids(2, length)).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    return {"loss": torch.stack(losses), "random": torch.rand(3), **gradients}


def assert_same(ours: Results, theirs: Results) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def layers_of(peft: Any) -> Any:
    return peft.base_model.model.model.layers


# -- the same training -----------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("Llama", "eager"), ("Llama", "sdpa"), ("Qwen2", "sdpa"), ("Qwen3", "sdpa"), ("Gemma2", "eager"),
        ("Phi3", "sdpa"), ("Granite", "eager"),
    ],
)  # fmt: skip
def test_no_bit_changes(name: str, how: str, kernels: bool) -> None:
    peft = model(name, kernels, {"attn_implementation": how}, lora_dropout=0.3)
    plain = results(peft)
    assert float(plain["loss"].sum()) > 0
    for modes, offload in itertools.product(MODES.values(), (False, True)):
        recompute_layers(peft, modes, offload=offload)
        for _ in range(2):  # at first whole, then without what is not needed
            assert_same(results(peft), plain)
    keep_layers(peft)
    assert_same(results(peft), plain)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    peft = model("Llama", kernels=False)
    recompute_layers(peft, MODES["layer"])
    with pytest.raises(RuntimeError, match="has no second derivative"):
        peft(input_ids=ids(2, 5), labels=ids(2, 5)).loss.backward(create_graph=True)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast(kernels: bool, inside: bool) -> None:
    peft = model("Llama", kernels)
    plain = results(peft, autocast=True, inside=inside)
    for name in ("layer", "attention", "odd"):
        recompute_layers(peft, MODES[name])
        for _ in range(2):
            assert_same(results(peft, autocast=True, inside=inside), plain)


def test_with_dropout_in_attention_and_an_input_that_carries_a_gradient() -> None:
    peft = model("Llama", own={"attention_dropout": 0.2}, lora_dropout=0.1)
    peft.enable_input_require_grads()
    plain = results(peft)
    for name in ("layer", "odd"):
        recompute_layers(peft, MODES[name], offload=True)
        assert_same(results(peft), plain)


@pytest.mark.parametrize("trained", [0, 2])
def test_layers_without_an_adapter(trained: int) -> None:
    """The others neither get a graph nor are computed again."""
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = model("Llama", target_modules=every, layers_to_transform=[trained])
    plain = results(peft)
    assert len(plain) == 2 + 2 * len(every)
    recompute_layers(peft, MODES["layer"], offload=True)
    assert_same(results(peft), plain)
    calls: list[int] = []
    for place, layer in enumerate(layers_of(peft)):
        layer.self_attn.q_proj.register_forward_hook(lambda *_, place=place: calls.append(place))
    results(peft, lengths=(5,))
    assert calls == [0, 1, 2, 3, *reversed(range(trained, 4))]


def test_in_evaluation_and_without_gradients_nothing_is_special() -> None:
    peft = model("Llama")
    plain = peft(input_ids=ids(2, 9)).logits
    recompute_layers(peft, MODES["mixed"], offload=True)
    with torch.no_grad():
        assert torch.equal(peft(input_ids=ids(2, 9)).logits, plain)
    peft.eval()
    found = peft(input_ids=ids(2, 9)).logits
    assert torch.equal(found, plain)
    assert "Recomputed" not in names_in(found.grad_fn)
    peft.train()
    assert "Recomputed" in names_in(peft(input_ids=ids(2, 9)).logits.grad_fn)


def names_in(node: Any) -> str:
    seen, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            seen.add(one)
            waiting += [below for below, _ in one.next_functions]
    return " ".join(one.name() for one in seen)


# -- what is left out ------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Multiply-adds of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm"):
            left, right = args[-2:]
            self.count += left.shape[:-1].numel() * left.shape[-1] * right.shape[-1]
        return func(*args, **(kwargs or {}))


def products(peft: Any, tokens: int) -> int:
    with Products() as counted:
        results(peft, lengths=(tokens // 2,))
    return counted.count


DOWN = HIDDEN * (WIDE + RANK)  # of a token: W h and B S
QUERIES, KEYS = 32, 16
QKVO = (HIDDEN + RANK) * (QUERIES + 2 * KEYS) + (QUERIES + RANK) * HIDDEN


@pytest.mark.parametrize(
    ("name", "kernels", "skipped"),
    [
        ("Llama", True, True),
        ("Phi3", True, True),
        ("Granite", True, True),
        ("Gemma2", True, False),  # a norm reads the MLP's output
        ("Llama", False, False),
    ],
)
@pytest.mark.parametrize("mode", ["layer", "attention"])
def test_which_products_are_not_made_again(
    name: str, kernels: bool, skipped: bool, mode: Mode
) -> None:
    peft, tokens = model(name, kernels), 16
    kept = products(peft, tokens)
    layer = layers_of(peft)[0]
    x = torch.randn(2, tokens // 2, HIDDEN)
    positions = torch.arange(tokens // 2)[None]
    rotary = peft.base_model.model.model.rotary_emb(x, positions)
    with torch.no_grad(), Products() as forward:
        layer(x, position_embeddings=rotary, attention_mask=None)
    recompute_layers(peft, [mode] * LAYERS)
    first, then = products(peft, tokens), products(peft, tokens)
    less = tokens * (DOWN * skipped + QKVO * (mode == "attention" and kernels))
    assert then - kept == LAYERS * (forward.count - less)
    # A layer is computed once as far as its end, to see what is read.
    assert first - then == LAYERS * DOWN * tokens * skipped


class Operators(TorchDispatchMode):
    """How often attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in attention.OPERATORS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "times"), [("keep", 1), ("layer", 2), ("attention", 1)])
@pytest.mark.parametrize("offload", [False, True])
def test_attention_is_computed_once(mode: Mode, times: int, offload: bool) -> None:
    peft = model("Llama", own={"attn_implementation": "sdpa"})
    recompute_layers(peft, [mode] * LAYERS, offload=offload)
    with Operators() as counted:
        results(peft, lengths=(9,))
    # Of the last layer nothing is sent to the host.
    assert counted.count == times * LAYERS + (mode == "attention" and offload)


def test_attention_that_drops_is_computed_again() -> None:
    """Its random numbers are drawn again, as they come before those of what follows."""
    own = {"attn_implementation": "sdpa", "attention_dropout": 0.2}
    peft = model("Llama", own=own, lora_dropout=0.1)
    plain = results(peft)
    recompute_layers(peft, MODES["attention"])
    assert_same(results(peft), plain)


def test_what_is_written_to_after_it_was_kept_is_as_it_was() -> None:
    """Rotary embeddings made in place, as unsloth makes them."""
    peft = model("Llama", own={"attn_implementation": "sdpa"})
    for layer in layers_of(peft):
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, y: InPlace.apply(y))
    plain = results(peft)
    for offload in (False, True):
        recompute_layers(peft, MODES["attention"], offload=offload)
        for _ in range(2):
            assert_same(results(peft), plain)


Matrix = tuple[tuple[int, int], bool]
"""Shape, and whether an adapter is folded into it."""


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[Matrix]:
    """What our ops make of 4-bit weights, which are theirs on this CPU."""
    made: list[Matrix] = []
    own = lora_linear.dequantize

    def noted(weight: FourBit, dtype: Any, fold: Any = None, row_scale: Any = None) -> Any:
        made.append((weight.shape, fold is not None))
        return own(weight, dtype, fold, row_scale)

    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    monkeypatch.setattr(lora_linear, "dequantize", noted)
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mode", ["layer", "attention"])
def test_a_matrix_of_the_repetition_is_backwards_too(
    mode: Mode, offload: bool, dropout: float, dequantized: list[Matrix]
) -> None:
    """17 tokens a row have the adapter folded in, 9 have not; no bit of a gradient changes."""
    peft = model("Llama", nf4=True, lora_dropout=dropout)
    plain = results(peft)
    times = []
    for dense in (False, True):
        recompute_layers(peft, [mode] * LAYERS, offload=offload, keep_dequantized=dense)
        for _ in range(2):  # at first with down_proj
            dequantized.clear()
            assert_same(results(peft), plain)
        assert {folded for _, folded in dequantized} == ({False} if dropout else {True, False})
        times.append([shape for shape, _ in dequantized])
    layers = 2 * LAYERS  # of two micro-batches
    again, kept = times
    # Forward, repetition and backward; of down_proj forward and backward.
    assert again.count((WIDE, HIDDEN)) == 6 * layers  # gate and up
    assert kept.count((WIDE, HIDDEN)) == 4 * layers
    assert again.count((HIDDEN, WIDE)) == kept.count((HIDDEN, WIDE)) == 2 * layers
    # q and o. The first layer's input has no gradient, so that its q is not made in backward, nor kept for it. Where
    # attention's outputs are given there is no repetition, but in the last layer that is offloaded.
    repeated = layers if mode == "layer" else 2 * offload
    assert again.count((HIDDEN, HIDDEN)) == 2 * (2 * layers + repeated) - 2
    given = 0 if mode == "layer" else 2
    assert kept.count((HIDDEN, HIDDEN)) == 4 * layers - given


@pytest.mark.parametrize("tokens", [3, 200], ids=["split", "folded"])
def test_a_kept_matrix_goes_when_it_was_used(tokens: int, dequantized: list[Matrix]) -> None:
    """A second backward makes its own; where x has no gradient none is kept."""
    projections = []
    for _ in range(2):
        weight = bnb.nn.Params4bit(torch.randn(WIDE, HIDDEN), requires_grad=False, quant_type="nf4")
        a, b = torch.randn(RANK, HIDDEN), torch.randn(WIDE, RANK)
        given = a.requires_grad_(), b.requires_grad_()
        projections.append(lora_linear.Projection(weight.to("cpu"), None, *given, 2.0))

    def repeated(x: torch.Tensor) -> tuple[Any, torch.Tensor]:
        recomputing.keeps_dequantized = True
        try:
            gate, up = lora_linear.lora_linears(x, projections)
        finally:
            del recomputing.keeps_dequantized
        return gate.grad_fn, (gate * up).sum()

    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    inputs = [x, *(one for p in projections for one in (p.lora_a, p.lora_b))]
    node, y = repeated(x)
    references = [weakref.ref(one) for one in node.dequantized]
    assert len(dequantized) == 2
    found = torch.autograd.grad(y, inputs, retain_graph=True)
    assert node.dequantized == [None, None]
    assert [one() for one in references] == [None, None]
    assert len(dequantized) == 2
    again = torch.autograd.grad(y, inputs)
    assert len(dequantized) == 4
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    assert repeated(x.detach())[0].dequantized == [None, None]


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 2 * gradients[0]


@pytest.mark.parametrize("hook", ["", "gate_proj", "up_proj"])
def test_gate_and_up_are_written_over_where_nobody_else_has_them(
    hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    into: list[bool] = []
    make = glu._input_gradients

    def recorded(*args: Any) -> Any:
        into.append(args[-1] is not None)
        return make(*args)

    monkeypatch.setattr(glu, "_input_gradients", recorded)
    peft = model("Llama")
    if hook:
        for layer in layers_of(peft):
            layer.mlp.get_submodule(hook).register_forward_hook(lambda *_: None)
    results(peft, lengths=(5,))
    recompute_layers(peft, ["layer", "attention", "keep", "layer"])
    results(peft, lengths=(5,))
    assert into == [False] * LAYERS + [not hook, False, not hook, not hook]


def test_an_mlp_that_something_else_reads_is_made_in_full() -> None:
    """Its output goes past the residual into a second path, which saves it."""
    peft = model("Llama")
    for layer in layers_of(peft):
        plain = type(layer).forward

        def forward(x: torch.Tensor, *, layer: Any = layer, plain: Any = plain, **rest: Any) -> Any:
            y = plain(layer, x, **rest)
            z = layer.mlp(layer.post_attention_layernorm(x))
            return y + z + 0.1 * z * torch.sigmoid(z)

        layer.forward = forward
    wanted = results(peft)
    recompute_layers(peft, MODES["layer"])
    for _ in range(2):
        assert_same(results(peft), wanted)
    assert all(one._gradient_checkpointing_func.ends_with is None for one in layers_of(peft))


@pytest.mark.parametrize("where", ["layer", "mlp"])
def test_hooks_see_what_the_layer_makes(where: str) -> None:
    peft = model("Llama")
    recompute_layers(peft, MODES["layer"])
    results(peft, lengths=(5,))
    (last,) = layers_of(peft)[-1:]
    region = last._gradient_checkpointing_func
    assert region.ends_with is last.mlp
    seen: list[torch.Tensor] = []
    hook = (last if where == "layer" else last.mlp).register_forward_hook(
        lambda _, __, y: seen.append(y.detach())
    )
    results(peft, lengths=(5,))
    first, again = seen
    assert torch.equal(first, again)
    hook.remove()
    assert region.ends_with is last.mlp


# -- what is kept ----------------------------------------------------------------------------


def saved_bytes(layers: int, mode: Mode, offload: bool = False) -> int:
    """What a forward saves, each storage once, without parameters and what they are made into."""
    own = {"num_hidden_layers": layers, "attn_implementation": "sdpa"}
    peft = model("Llama", own=own)
    recompute_layers(peft, [mode] * layers, offload=offload)
    own = {p.untyped_storage().data_ptr() for p in peft.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and x.numel() >= 64:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = peft(input_ids=ids(4, 32), labels=ids(4, 32)).loss
    assert loss.requires_grad
    return sum(sizes.values())


def test_what_is_kept_of_a_layer() -> None:
    """docs/memory.md has these formulas: of a token, h or 2 i, and what is of rank r, in 4 bytes each here."""
    tokens = 4 * 32

    def of_a_layer(mode: Mode, offload: bool = False) -> float:
        more, less = saved_bytes(4, mode, offload), saved_bytes(3, mode, offload)
        return (more - less) / tokens / 4

    kept = of_a_layer("keep")
    assert of_a_layer("layer") == HIDDEN
    assert of_a_layer("layer", offload=True) == 0
    # Its input, q, k, v, attention's output and what each head's backward reads, and o's output.
    part = of_a_layer("attention")
    assert part == 2 * HIDDEN + 2 * QUERIES + 2 * KEYS + 4
    assert of_a_layer("attention", offload=True) == 0
    assert kept - part > 2 * WIDE


# -- inputs in host memory -------------------------------------------------------------------


def lane_of(peft: Any) -> Any:
    regions = [layer._gradient_checkpointing_func for layer in layers_of(peft)]
    (lanes,) = {id(one.lanes): one.lanes for one in regions if getattr(one, "lanes", None)}.values()
    (lane,) = lanes.by_device.values()
    return lane


def addresses(buffers: Sequence[torch.Tensor]) -> set[int]:
    return {buffer.data_ptr() for buffer in buffers}


def test_host_buffers_are_taken_once() -> None:
    peft = model("Llama")
    plain = {length: results(peft, (length, length)) for length in (17, 9, 30)}
    recompute_layers(peft, MODES["layer"], offload=True)
    assert_same(results(peft, (17, 17)), plain[17])
    lane = lane_of(peft)
    first = addresses(lane.free)
    assert len(first) == LAYERS - 1  # the last layer's input is needed at once
    assert_same(results(peft, (9, 9)), plain[9])
    assert_same(results(peft, (17, 17)), plain[17])
    assert addresses(lane.free) == first
    # Longer rows: larger ones in their place, and not beside them.
    assert_same(results(peft, (30, 30)), plain[30])
    assert len(lane.free) == LAYERS - 1
    assert {buffer.numel() for buffer in lane.free} == {2 * 30 * HIDDEN * 4}
    assert_same(results(peft, (17, 17)), plain[17])


def test_what_comes_back_makes_room_once_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the MLP's backward runs there is neither what the layer gave, nor q, k and o's output as they came back:
    none of them is read any more. The next layer's tensors are sent for by then, and no sooner."""
    peft = model("Llama", own={"attn_implementation": "sdpa"})
    recompute_layers(peft, ["attention"] * LAYERS, offload=True)
    results(peft)  # by now it is known what ends with an MLP
    lane = lane_of(peft)
    happened: list[tuple[str, Any]] = []
    back: list[weakref.ref[torch.Tensor]] = []
    outputs: list[weakref.ref[torch.Tensor]] = []
    send_for, edge = lane.send_for, recompute.get_gradient_edge

    def sends(parts: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = send_for(parts)
        back[:] = [weakref.ref(one) for one in found]
        happened.append(("sent for", len(found)))
        return found

    def rooted(output: torch.Tensor) -> Any:
        outputs[:] = [weakref.ref(output)]
        return edge(output)

    monkeypatch.setattr(lane, "send_for", sends)
    monkeypatch.setattr(recompute, "get_gradient_edge", rooted)
    own: list[weakref.ref[torch.Tensor]] = []

    def again(layer: int) -> Any:
        def hook(*_: Any) -> None:
            if torch.is_grad_enabled():
                own[:] = back
                happened.append(("again", layer))

        return hook

    def mlp_backward(layer: int) -> Any:
        def hook(*_: Any) -> None:
            there = [one() is not None for one in own]
            happened.append(("backward", (layer, outputs[0]() is None, there)))

        return hook

    for place, layer in enumerate(layers_of(peft)):
        layer.self_attn.register_forward_hook(again(place))
        layer.mlp.down_proj.lora_B.default.weight.register_post_accumulate_grad_hook(
            mlp_backward(place)
        )
    results(peft, lengths=(17,))
    assert [name for name, _ in happened] == ["again", "sent for", "backward"] * (LAYERS - 1) + [
        "again", "backward"
    ]  # fmt: skip
    for name, found in happened:
        if name == "backward":
            layer, output_gone, there = found
            assert output_gone
            if layer < LAYERS - 1:
                _, q, k, *attentions, o = there
                assert (q, k, o) == (False, False, False)
                assert any(attentions)
    assert happened[-1][1][0] == 0
    assert lane.coming == []


def test_what_nobody_fetches_is_not_given_to_another_before_the_copies_are_done() -> None:
    peft = model("Llama")
    recompute_layers(peft, MODES["layer"], offload=True)
    loss = peft(input_ids=ids(2, 17), labels=ids(2, 17)).loss
    lane = lane_of(peft)
    stash = lane.newest()
    stash.send_for()
    (there,) = [weakref.ref(one) for one in lane.coming]
    del stash, loss
    assert there() is not None
    lane.compute_waits()
    assert there() is None


def test_a_forward_without_backward_gives_its_memory_back() -> None:
    peft = model("Llama")
    plain = results(peft)
    recompute_layers(peft, MODES["layer"], offload=True)
    loss = peft(input_ids=ids(2, 17), labels=ids(2, 17)).loss
    lane = lane_of(peft)
    assert lane.free == []
    del loss
    assert len(lane.free) == LAYERS - 1
    assert_same(results(peft), plain)
    assert len(lane.free) == LAYERS - 1


def test_two_graphs_at_once() -> None:
    """Each has its own buffers, and what was sent for one is not taken for the other's."""
    peft = model("Llama")

    def both(order: int) -> Results:
        peft.zero_grad()
        losses = [peft(input_ids=ids(2, n), labels=ids(2, n)).loss for n in (17, 11)]
        for loss in losses[::order]:
            loss.backward()
        return {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}

    for order in (1, -1):
        keep_layers(peft)
        plain = both(order)
        recompute_layers(peft, MODES["layer"], offload=True)
        for _ in range(2):
            assert_same(both(order), plain)
        assert len(lane_of(peft).free) == 2 * (LAYERS - 1)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("where", ["forward", "recomputation", "backward"])
def test_an_exception_leaves_nothing_behind(where: str, offload: bool) -> None:
    peft = model("Llama", lora_dropout=0.2)
    plain = results(peft)
    recompute_layers(peft, MODES["layer"], offload=offload)
    assert_same(results(peft), plain)

    class OutOfMemory(RuntimeError):
        pass

    def fails(gradient: torch.Tensor) -> None:
        raise OutOfMemory

    def reached(_: Any, __: Any, y: torch.Tensor) -> None:
        if where == "backward" and torch.is_grad_enabled():
            y.register_hook(fails)
        if (where == "recomputation") == torch.is_grad_enabled():
            fails(y)

    hook = layers_of(peft)[1].self_attn.register_forward_hook(
        lambda module, given, y: reached(module, given, y[0])
    )
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            results(peft)
    hook.remove()
    assert (recomputing.ends_with, recomputing.noted) == (None, None)
    assert_same(results(peft), plain)
    if offload:
        assert len(lane_of(peft).free) == LAYERS - 1
        assert lane_of(peft).coming == []


def test_a_second_backward() -> None:
    peft = model("Llama")
    for offload in (False, True):
        recompute_layers(peft, MODES["layer"], offload=offload)
        peft.zero_grad()
        loss = peft(input_ids=ids(2, 9), labels=ids(2, 9)).loss
        loss.backward(retain_graph=True)
        first = {name: p.grad.clone() for name, p in peft.named_parameters() if p.requires_grad}
        if offload:
            with pytest.raises(RuntimeError, match="a second time"):
                loss.backward()
            continue
        loss.backward()
        assert all(
            torch.equal(p.grad, 2 * first[name])
            for name, p in peft.named_parameters()
            if p.requires_grad
        )


def test_a_gradient_that_is_asked_for() -> None:
    peft = model("Llama")
    recompute_layers(peft, MODES["layer"])
    embedded = torch.randn(2, 9, HIDDEN, requires_grad=True)
    loss = peft(inputs_embeds=embedded, labels=ids(2, 9)).loss
    with pytest.raises(RuntimeError, match=r"call backward\(\)"):
        torch.autograd.grad(loss, [embedded])


# -- layers of other kinds -------------------------------------------------------------------


class Odd(GradientCheckpointingLayer):  # type: ignore[misc]
    """Several inputs with a gradient, by place, by name and within a tuple; several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))
        self.mlp = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5))

    def forward(
        self, x: torch.Tensor, also: torch.Tensor, flag: bool, *, pair: Any, named: torch.Tensor
    ) -> Any:
        assert flag
        y = self.mlp(x * self.weight + also.sin()) + pair[0] * pair[1] + named.exp()
        return y, x.detach(), (y * 2).sum(), None


class Nested(GradientCheckpointingLayer):  # type: ignore[misc]
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        for layer in self.inner:
            y, _, total, _ = layer(x, *rest, **named)
            x = y + total
        return x, None, x.sum(), None


@pytest.mark.parametrize("offload", [False, True])
def test_several_inputs_and_outputs_and_regions_within_regions(offload: bool) -> None:
    torch.manual_seed(1)
    inner = [nn.Sequential(*[Odd() for _ in range(3)]) for _ in range(3)]
    whole = nn.Sequential(*[Nested(list(one)) for one in inner])
    given = [torch.randn(3, 5, requires_grad=True) for _ in range(5)]

    def step() -> list[torch.Tensor]:
        torch.manual_seed(2)
        x, also, left, right, named = given
        total: Any = 0
        for layer in whole:
            x, none, sums, nothing = layer(x, also, True, pair=(left, right), named=named)
            assert none is nothing is None
            total = total + sums
        parameters = [*given, *whole.parameters()]
        for parameter in parameters:
            parameter.grad = None
        total.backward()
        return [total.detach(), *(parameter.grad for parameter in parameters)]

    plain = step()
    recompute_layers(whole, ["layer"] * 3, offload=offload)
    lanes = whole[0]._gradient_checkpointing_func.lanes
    for one in inner:  # with the same buffers
        for place, layer in enumerate(one):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = Region(layer, lanes, first=place == 0)
    for _ in range(2):
        for ours, theirs in zip(step(), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_recomputed() -> None:
    peft = model("Llama")
    with pytest.raises(ValueError, match="Linear has no decoder layers"):
        recompute_layers(nn.Linear(2, 2), ["layer"])
    with pytest.raises(ValueError, match="2 modes for 4 layers"):
        recompute_layers(peft, ["layer"] * 2)
    for layer in layers_of(peft):
        layer.attention = layer.self_attn
        del layer.self_attn
    with pytest.raises(ValueError, match="layer 1 has no self_attn"):
        recompute_layers(peft, ["keep", "attention", "layer", "attention"])
    assert not any(layer.gradient_checkpointing for layer in layers_of(peft))
    peft.config.output_router_logits = True
    with pytest.raises(ValueError, match="router"):
        recompute_layers(peft, MODES["layer"])
    returns = nn.ModuleList([GradientCheckpointingLayer()])
    returns[0].forward = lambda x: {"hidden": x}
    recompute_layers(returns, ["layer"])
    with pytest.raises(TypeError, match="returns a dict"):
        returns[0](torch.ones(2, requires_grad=True))


def test_only_the_language_models_layers_are_found() -> None:
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    text = {key: value for key, value in SMALL.items() if key != "attn_implementation"}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    seeing = transformers.Gemma3ForConditionalGeneration(config)
    found = decoder_layers(seeing)
    assert [type(layer).__name__ for layer in found] == ["Gemma3DecoderLayer"] * LAYERS


# -- on a model ------------------------------------------------------------------------------


def test_undone_it_is_as_before_and_copies_are_their_own() -> None:
    peft = model("Llama", lora_dropout=0.2)
    peft.gradient_checkpointing_enable({"use_reentrant": False})
    before = [dict(vars(module)) for module in peft.modules()]
    theirs = results(peft)
    recompute_layers(peft, MODES["odd"], offload=True)
    assert list(peft.state_dict()) == list(copy.deepcopy(peft).state_dict())
    assert_same(results(peft), theirs)
    twin = copy.deepcopy(peft)
    attach(twin)  # a copy has no groups
    for mine, other in zip(layers_of(peft), layers_of(twin), strict=True):
        region = other._gradient_checkpointing_func
        if isinstance(region, Region):
            assert region.module is other
            assert region.lanes is None or (
                region.lanes is not mine._gradient_checkpointing_func.lanes
            )
    assert_same(results(twin), theirs)
    keep_layers(peft)
    assert [dict(vars(module)).keys() for module in peft.modules()] == [
        one.keys() for one in before
    ]
    assert names_in(peft(input_ids=ids(1, 5)).logits.grad_fn).count("Recomputed") == 0
    assert_same(results(peft), theirs)


def test_whoever_sets_the_flag_of_every_layer_changes_nothing() -> None:
    """As unsloth's for_training does; a layer that keeps all must not fall to another's function."""
    peft = model("Llama")
    peft.gradient_checkpointing_enable({"use_reentrant": True})
    recompute_layers(peft, MODES["mixed"])
    for module in peft.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    found = names_in(peft(input_ids=ids(1, 5)).logits.grad_fn)
    assert found.count("RecomputedBackward") == 3
    assert "CheckpointFunction" not in found


def test_attention_with_a_forward_of_its_own() -> None:
    peft = model("Llama", kernels=False)
    for layer in layers_of(peft):

        def forward(*args: Any, part: Any = layer.self_attn, **kwargs: Any) -> Any:
            y, weights = type(part).forward(part, *args, **kwargs)
            return y * 2, weights

        layer.self_attn.forward = forward
    owns = [layer.self_attn.forward for layer in layers_of(peft)]
    plain = results(peft)
    recompute_layers(peft, MODES["attention"])
    assert_same(results(peft), plain)
    assert [layer.self_attn.forward.func for layer in layers_of(peft)] == owns
    keep_layers(peft)
    assert [layer.self_attn.forward for layer in layers_of(peft)] == owns


def stream(layer: nn.Module) -> list[bool]:
    """Frozen weights are there only while the layer is computed with a graph until the gradient of its input is, or
    while it is computed without one, as unsloth's block swap has it. Gives whether they are, at each change."""
    frozen = [p for p in layer.parameters() if not p.requires_grad]
    host, there = [p.data for p in frozen], [False]

    def change(to: bool) -> None:
        for p, data in zip(frozen, host, strict=True):
            p.data = data if to else data.new_empty(0)
        there.append(to)

    def before(_: Any, args: Any) -> None:
        change(True)
        if torch.is_grad_enabled():
            args[0].register_hook(lambda _: change(False))

    change(False)
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(
        lambda *_: change(False) if not torch.is_grad_enabled() else None  # type: ignore[func-returns-value]
    )
    return there


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mode", ["layer", "attention"])
@pytest.mark.parametrize("nf4", [False, True])
def test_layers_whose_weights_come_and_go(
    mode: Mode, offload: bool, nf4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4-bit ones what the repetition makes is kept."""
    if nf4:
        monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    peft = model("Llama", kernels=False, own={"attn_implementation": "sdpa"}, nf4=nf4)
    attach(peft)
    peft.enable_input_require_grads()
    plain = results(peft)
    peft = model("Llama", kernels=False, own={"attn_implementation": "sdpa"}, nf4=nf4)
    streamed = [stream(layer) for layer in layers_of(peft)[1:]]
    served = attach(peft)  # with nothing there
    assert served.served["q_proj"] == LAYERS
    assert served.groups["q_proj+k_proj+v_proj"] == LAYERS
    peft.enable_input_require_grads()
    recompute_layers(peft, [mode] * LAYERS, offload=offload, keep_dequantized=nf4)
    for _ in range(2):
        assert_same(results(peft), plain)
    assert all(there[1:] == [False, *[True, False] * 8] for there in streamed)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_compiled_layers_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """As unsloth compiles them, one function a class. What a graph ends with is not known: all of it is made again."""
    torch._dynamo.reset()
    peft = model("Llama", own={"num_hidden_layers": 2})
    plain = results(peft, (9,))
    cls = type(layers_of(peft)[0])
    monkeypatch.setattr(cls, "forward", torch.compile(cls.forward, backend="eager"))
    recompute_layers(peft, ["layer", "attention"])
    for _ in range(2):
        found = results(peft, (9,))
        for name, tensor in plain.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert layers_of(peft)[0]._gradient_checkpointing_func.ends_with is None
    torch._dynamo.reset()
