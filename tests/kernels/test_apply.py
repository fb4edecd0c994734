from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fastlora_kernels.layers.group
import fastlora_kernels.layers.linear
import fastlora_kernels.layers.mlp
import pytest
import torch
from fastlora_kernels import attach, detach, dispatch
from fastlora_kernels.ops.glu import glu_lora_linear
from fastlora_kernels.ops.lora_linear import folds, lora_linear, lora_linears
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

Results = dict[str, torch.Tensor]
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def lora_model(
    k: int = 24,
    n: int = 17,
    *,
    base: nn.Module | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    **config: Any,
) -> nn.ModuleDict:
    """A model of one layer, `proj`, whose B is not zero."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": base or nn.Linear(k, n, bias=bias, dtype=dtype)})
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["proj"]} | config
    inject_adapter_in_model(LoraConfig(**given), model)
    fill(model, adapter_dtype)
    return model


def fill(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Random values for every B, and `dtype` for the adapter."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        if "lora_" in name and dtype is not None:
            parameter.data = parameter.data.to(dtype)


def results(model: nn.Module, x: torch.Tensor, autocast: bool = False, **kwargs: Any) -> Results:
    """Output and every gradient, for one upstream gradient that each dtype can hold."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # dropout
    with AUTOCAST if autocast else contextlib.nullcontext():
        y = model["proj"](x, **kwargs)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).bfloat16().to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_equal(ours: Results, theirs: Results, **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        torch.testing.assert_close(
            ours[name], tensor, msg=lambda text, n=name: f"{n}: {text}", **tolerance
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each call that reached the op."""
    seen: list[torch.dtype] = []

    def spy(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.dtype)
        return lora_linear(x, *rest)

    def spies(x: torch.Tensor, projections: list[Any]) -> tuple[torch.Tensor, ...]:
        seen.extend([x.dtype] * len(projections))
        return lora_linears(x, projections)

    monkeypatch.setattr(fastlora_kernels.layers.linear, "lora_linear", spy)

    def spy_down(gate: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(rest[-1])
        return glu_lora_linear(gate, *rest)

    monkeypatch.setattr(fastlora_kernels.layers.group, "lora_linears", spies)
    monkeypatch.setattr(fastlora_kernels.layers.mlp, "glu_lora_linear", spy_down)
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("shape", "n", "r"),
    [
        ((5, 24), 17, 4),
        ((2, 3, 7), 33, 16),
        ((1, 1), 1, 1),
        ((63, 40), 9, 8),
        ((9,), 5, 2),
        ((0, 4), 3, 2),
    ],
)
def test_float32_is_pefts(
    shape: tuple[int, ...], n: int, r: int, rslora: bool, bias: bool, calls: list[torch.dtype]
) -> None:
    model = lora_model(shape[-1], n, bias=bias, r=r, use_rslora=rslora)
    x = torch.randn(shape)
    theirs = results(model, x)
    assert attach(model).served == {"proj": 1}
    assert_equal(results(model, x), theirs)
    assert calls == [torch.float32]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "adapter_dtype", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, torch.float16, False),
        (torch.bfloat16, torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, torch.float32, True),
        (torch.float32, torch.float32, torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("shape", [(257, 64), (3, 21, 40)])
def test_16_bit_errs_no_more_than_peft(
    shape: tuple[int, ...],
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    autocast: bool,
    bias: bool,
    calls: list[torch.dtype],
) -> None:
    model = lora_model(shape[-1], 50, bias=bias, r=8, dtype=dtype, adapter_dtype=adapter_dtype)
    x = torch.randn(shape).to(x_dtype)
    exact = results(copy.deepcopy(model).float(), x.float())
    theirs = results(model, x, autocast)
    attach(model)
    ours = results(model, x, autocast)
    assert len(calls) == 1
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = (
            float((found[name].float() - truth).norm() / truth.norm()) for found in (ours, theirs)
        )
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps, name


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_bias_in_the_adapter(bias: bool, autocast: bool, calls: list[torch.dtype]) -> None:
    model = lora_model(bias=bias, lora_bias=True)
    model["proj"].lora_B["default"].bias.data.normal_()
    x = torch.randn(2, 5, 24)
    exact, theirs = results(model, x), results(model, x, autocast)
    assert attach(model).served == {"proj": 1}
    ours = results(model, x, autocast)
    assert "proj.lora_B.default.bias" in ours
    assert_errs_no_more(ours, theirs, exact)
    assert len(calls) == 1


@pytest.mark.parametrize("base", ["dense", "8 bits"])
def test_dropout_drops_what_it_says_and_no_more(base: str, calls: list[torch.dtype]) -> None:
    """Rows of the identity show the mask: y - x W^T is the delta in a kept row, twice over, and 0 in another."""
    model = lora_model(k=64, lora_dropout=0.5) if base == "dense" else int8(lora_dropout=0.5)
    proj = model["proj"]
    x = torch.eye(64, requires_grad=True)
    delta = proj.get_delta_weight("default").T.detach()
    assert attach(model).served == {"proj": 1}
    y = proj(x)
    found = y - proj.base_layer(x)
    kept = (found - 2 * delta).abs().amax(dim=1) < 1e-4
    torch.testing.assert_close(found[~kept], torch.zeros_like(found[~kept]), rtol=0, atol=1e-5)
    assert 16 < int(kept.sum()) < 48
    g = torch.randn_like(y)
    dx, da = torch.autograd.grad(y, (x, proj.lora_A["default"].weight), g)
    base_dx = torch.autograd.grad(proj.base_layer(x), x, g)[0] if base == "dense" else None
    up = proj.scaling["default"] * g @ proj.lora_B["default"].weight
    torch.testing.assert_close(da, up.T @ (2.0 * kept.diag()))
    if base_dx is not None:
        inner = (dx - base_dx).diag()  # there the mask of dx is that of x
        expected = (up @ proj.lora_A["default"].weight).diag() * 2 * kept
        torch.testing.assert_close(inner, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(proj(x), y)
    model.eval()
    torch.testing.assert_close(proj(x), proj.base_layer(x) + x @ delta)
    assert len(calls) == 3


def int8(has_fp16_weights: bool = False, threshold: float = 0.0, **config: Any) -> nn.ModuleDict:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear8bitLt(64, 17, has_fp16_weights=has_fp16_weights, threshold=threshold)
    model = nn.ModuleDict({"proj": base.requires_grad_(False).to("cpu")})  # .to quantizes
    model.is_loaded_in_8bit = True
    inject_adapter_in_model(LoraConfig(**{"r": 4, "target_modules": ["proj"]} | config), model)
    fill(model)
    return model


@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("training", [False, True])
def test_8_bits_are_pefts(training: bool, threshold: float, calls: list[torch.dtype]) -> None:
    """In training bitsandbytes takes x W^T on a CPU, and else the product of 8-bit numbers, as on a GPU."""
    model = int8(threshold=threshold, lora_bias=True).train(training)
    x = torch.randn(2, 5, 64)
    theirs = results(model, x)
    assert attach(model).served == {"proj": 1}
    assert_equal(results(model, x), theirs, rtol=1e-4, atol=1e-5)
    assert calls == [torch.float32]


def assert_errs_no_more(ours: Results, theirs: Results, exact: Results) -> None:
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = (float((found[name].float() - truth).norm()) for found in (ours, theirs))
        assert error <= 2 * allowed + 1e-6 * float(truth.norm()), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_dora_is_served(bias: bool, autocast: bool) -> None:
    model = lora_model(bias=bias, use_dora=True)
    model["proj"].lora_magnitude_vector["default"].weight.data *= 1.5
    x = torch.randn(2, 5, 24)
    exact, theirs = results(model, x), results(model, x, autocast)
    assert attach(model).served == {"proj": 1}
    ours = results(model, x, autocast)
    assert ours.keys() == theirs.keys()
    assert "proj.lora_magnitude_vector.default.weight" in ours
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = (float((found[name].float() - truth).norm()) for found in (ours, theirs))
        assert error <= 2 * allowed + 1e-6 * float(truth.norm()), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("tokens", [3, 200], ids=["split", "folded"])
@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_nf4_in_float32_is_pefts(
    tokens: int,
    nested: bool,
    bias: bool,
    backend: str,
    calls: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "interpret" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton compiles for a GPU here; test_dequantize runs it there")
    monkeypatch.setenv("FASTLORA_KERNELS", backend)
    model = nf4(k=128, n=96, bias=bias, compress_statistics=nested)
    assert folds(tokens, 96, 128, 8) is (tokens == 200)
    x = torch.randn(tokens, 128)
    theirs = results(model, x)
    assert attach(model).served == {"proj": 1}
    assert_equal(results(model, x), theirs, rtol=1e-4, atol=1e-5)
    assert calls == [torch.float32]


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [3, 200], ids=["split", "folded"])
def test_nf4_under_autocast_errs_no_more_than_peft(
    tokens: int,
    x_dtype: torch.dtype,
    calls: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTLORA_KERNELS", "reference")
    model = nf4(k=128, n=96, dtype=torch.bfloat16, bias=True)
    model["proj"].base_layer.bias.data.normal_()
    x = torch.randn(tokens, 128).to(x_dtype)
    wide = copy.deepcopy(model)
    wide["proj"].base_layer.compute_dtype = torch.float32
    wide["proj"].base_layer.weight.quant_state.dtype = torch.float32
    exact = results(wide, x.float())
    theirs = results(model, x, autocast=True)
    assert attach(model).only_autocast == {"proj": 1}
    ours = results(model, x, autocast=True)
    assert calls == [torch.bfloat16]
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = (
            float((found[name].float() - truth).norm() / truth.norm()) for found in (ours, theirs)
        )
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps, name


def test_autocast_comes_and_goes(calls: list[torch.dtype]) -> None:
    """The same layer with and without autocast, one call after the other."""
    model = lora_model()
    attach(model)
    x = torch.randn(5, 24)
    for autocast in (True, False, True):
        results(model, x, autocast)
    assert calls == [torch.bfloat16, torch.float32, torch.bfloat16]


def two_adapters(**second: Any) -> nn.ModuleDict:
    model = lora_model()
    given = {"r": 2, "lora_alpha": 8, "target_modules": ["proj"]} | second
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(LoraConfig(**given), model, adapter_name="second")
    model["proj"].set_adapter("default")
    fill(model)
    return model


def both_active() -> nn.ModuleDict:
    model = two_adapters()
    model["proj"].set_adapter(["default", "second"])
    return model


def none_active() -> nn.ModuleDict:
    model = lora_model()
    model["proj"].delete_adapter("default")
    return model


def changed(change: Callable[[Any], Any], **config: Any) -> nn.ModuleDict:
    model = lora_model(bias=True, **config)
    change(model["proj"])
    return model


def nf4(
    through_peft: bool = True,
    k: int = 64,
    n: int = 17,
    dtype: torch.dtype = torch.float32,
    **given: Any,
) -> nn.ModuleDict:
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(k, n, compute_dtype=dtype, quant_type="nf4", **given)
    model = nn.ModuleDict({"proj": base.to("cpu")})  # .to quantizes
    model.is_loaded_in_4bit = through_peft  # what transformers sets, and PEFT goes by
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["proj"]), model)
    fill(model, torch.float32)
    return model


class OwnLinear(nn.Linear):
    pass


class OwnLora(Linear):  # PEFT has such for torchao, AWQ and others
    pass


def test_dora_with_dropout_is_served() -> None:
    model = lora_model(lora_dropout=0.5, use_dora=True)
    model["proj"].lora_magnitude_vector["default"].weight.data *= 1.5
    x = torch.randn(40, 24)
    theirs = results(model.eval(), x)
    assert attach(model.train()).served == {"proj": 1}
    assert_equal(results(model.eval(), x), theirs, rtol=1e-4, atol=1e-5)
    dropped = results(model.train(), x)
    assert dropped.keys() == theirs.keys()
    assert not torch.allclose(dropped["y"], theirs["y"])


LEFT: dict[str, tuple[Callable[[], nn.ModuleDict], str]] = {
    "disabled": (lambda: changed(lambda p: p.enable_adapters(False)), "adapter disabled"),
    "merged": (lambda: changed(lambda p: p.merge()), "adapter merged"),
    "two": (both_active, "2 active adapters"),
    "none": (none_active, "0 active adapters"),
    "dora, odd": (lambda: lora_model(k=23, use_dora=True), "DoRA on an odd number of inputs"),
    "dora, bias": (
        lambda: changed(
            lambda p: setattr(p.lora_B["default"], "bias", nn.Parameter(torch.ones(17))),
            use_dora=True,
        ),
        "DoRA with a bias in the adapter",
    ),
    "8 bits, kept in 16": (lambda: int8(has_fp16_weights=True), "8-bit weight not quantized"),
    "own dropout": (
        lambda: changed(lambda p: p.lora_dropout.update({"default": nn.AlphaDropout(0.5)})),
        "dropout of another kind",
    ),
    "rank": (lambda: lora_model(r=257), "rank above 256"),
    "nf4": (nf4, "4-bit weight on a CPU"),
    "nf4, an odd number of inputs": (
        lambda: nf4(k=65),
        "4-bit weight not quantized yet, or of another layout",
    ),
    "nf4 unannounced": (lambda: nf4(False), "base layer is a Linear4bit"),
    "own class": (lambda: lora_model(base=OwnLinear(24, 17)), "base layer is a OwnLinear"),
    "own lora": (
        lambda: changed(lambda p: setattr(p, "__class__", OwnLora)),
        "layer is a OwnLora",
    ),
    "conv": (lambda: lora_model(base=nn.Conv1d(24, 17, 1)), "layer is a Conv1d"),
    "bias in A": (
        lambda: changed(
            lambda p: setattr(p.lora_A["default"], "bias", nn.Parameter(torch.ones(4)))
        ),
        "bias in the adapter's A",
    ),
    "trained base": (
        lambda: changed(lambda p: p.base_layer.weight.requires_grad_()),
        "base layer is trained too",
    ),
    "trained bias": (
        lambda: changed(lambda p: p.base_layer.bias.requires_grad_()),
        "base layer is trained too",
    ),
    "hook": (
        lambda: changed(lambda p: p.lora_A["default"].register_forward_hook(lambda m, i, o: o * 2)),
        "hooks or special weights on its base or adapter",
    ),
    "replaced": (
        lambda: changed(lambda p: setattr(p, "forward", lambda x: p.base_layer(x) * 2)),
        "its forward was replaced",
    ),
    "fan_in": (lambda: changed(lambda p: setattr(p, "fan_in_fan_out", True)), "fan_in_fan_out"),
    "scaling": (
        lambda: changed(lambda p: p.scaling.update(default=torch.tensor(2.0))),
        "scaling is not a number",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_peft_is_pefts_to_the_last_bit(case: str, calls: list[torch.dtype]) -> None:
    build, reason = LEFT[case]
    model = build()
    k = model["proj"].base_layer.in_features if case != "conv" else 24
    x = torch.randn(2, k, 3) if case == "conv" else torch.randn(5, k)
    theirs = results(model, x)
    attached = attach(model)
    assert attached.served == {}
    assert attached.left == {reason: {"proj": 1}}
    assert f"left to PEFT, {reason}: 1 (1 proj)" in str(attached)
    assert_equal(results(model, x), theirs, rtol=0, atol=0)
    assert calls == []


def test_dtypes_that_differ_are_pefts_outside_autocast(calls: list[torch.dtype]) -> None:
    """There PEFT computes the adapter in float32, and in bfloat16 its gradients would lose digits."""
    model = lora_model(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    theirs = results(model, x)
    attached = attach(model)
    assert attached.only_autocast == attached.served == {"proj": 1}
    assert "under autocast only: 1 (1 proj)" in str(attached)
    assert_equal(results(model, x), theirs, rtol=0, atol=0)
    assert calls == []


def test_float64_is_left_alone_by_autocast_and_by_us(calls: list[torch.dtype]) -> None:
    model = lora_model(dtype=torch.float64, adapter_dtype=torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    theirs = results(model, x, autocast=True)
    attach(model)
    assert_equal(results(model, x, autocast=True), theirs, rtol=0, atol=0)
    assert calls == []


def test_an_adapter_for_each_row(calls: list[torch.dtype]) -> None:
    model = two_adapters()
    model.eval()
    x = torch.randn(3, 24)
    names = ["default", "second", "__base__"]
    theirs = results(model, x, adapter_names=names)
    attach(model)
    assert_equal(results(model, x, adapter_names=names), theirs, rtol=0, atol=0)
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights")
def test_state_that_changes_after_attaching(calls: list[torch.dtype]) -> None:
    """Each state against PEFT's own forward of a copy; `served` says whether the op ran."""
    plain = two_adapters(lora_bias=True)
    model = copy.deepcopy(plain)
    assert attach(model).served == {"proj": 1}
    x = torch.randn(5, 24)

    def check(served: bool, change: Callable[[Any], Any]) -> None:
        calls.clear()
        for each in (plain, model):
            change(each["proj"])
        exactly = {} if served else {"rtol": 0.0, "atol": 0.0}
        assert_equal(results(model, x), results(plain, x), **exactly)
        assert bool(calls) is served

    check(True, lambda p: None)
    check(True, lambda p: p.set_adapter("second"))
    check(False, lambda p: p.set_adapter(["default", "second"]))
    check(True, lambda p: p.set_adapter("default"))
    check(False, lambda p: p.merge())
    check(True, lambda p: p.unmerge())
    check(False, lambda p: p.enable_adapters(False))
    check(True, lambda p: p.enable_adapters(True))
    check(True, lambda p: p.scale_layer(0.5))
    check(True, lambda p: setattr(p.base_layer.weight, "data", torch.ones(17, 24)))
    check(True, lambda p: setattr(p.lora_A["default"], "weight", nn.Parameter(torch.ones(4, 24))))
    check(False, lambda p: p.base_layer.register_forward_pre_hook(lambda m, i: (i[0] * 2,)))


def test_attach_twice_copy_and_detach(calls: list[torch.dtype]) -> None:
    model = lora_model()
    names = list(model.state_dict())
    assert attach(model) == attach(model)
    assert list(model.state_dict()) == names
    assert isinstance(model["proj"], Linear)

    twin = copy.deepcopy(model)
    twin["proj"].lora_B["default"].weight.data.zero_()
    x = torch.randn(5, 24)
    torch.testing.assert_close(twin["proj"](x), twin["proj"].base_layer(x))
    assert len(calls) == 1

    detach(model)
    assert type(model["proj"]) is Linear
    assert type(twin["proj"]) is not Linear
    model["proj"](x)
    assert len(calls) == 1
    assert str(attach(nn.Linear(2, 2))) == "fastlora serves 0 of 0 LoRA layers"


@pytest.fixture
def llama() -> Callable[..., PeftModel]:
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(**config: Any) -> PeftModel:
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, use_cache=False,
            )
        )  # fmt: skip
        given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **given))

    return build


def losses(model: PeftModel, steps: int, autocast: bool = False) -> list[float]:
    # Not Adam: it makes a step of full size out of a gradient that is rounding alone.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
    model.train()
    found = []
    for _ in range(steps):
        with AUTOCAST if autocast else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_training_a_llama(llama: Callable[..., PeftModel], calls: list[torch.dtype]) -> None:
    theirs = losses(llama(), 20)
    model = llama()
    attached = attach(model)
    assert attached.left == {}
    assert attached.served == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2
    )
    assert "serves 14 of 14 LoRA layers (2 q_proj" in str(attached)
    assert losses(model, 20) == pytest.approx(theirs, rel=1e-5)
    assert theirs[-1] < theirs[0] - 0.15
    assert len(calls) == 20 * 14


def test_training_under_autocast(llama: Callable[..., PeftModel]) -> None:
    """bfloat16 has between 2 and 3 digits, and so much do the losses share."""
    model = llama()
    attach(model)
    assert losses(model, 20, autocast=True) == pytest.approx(
        losses(llama(), 20, autocast=True), rel=1e-2
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(
    llama: Callable[..., PeftModel], calls: list[torch.dtype], reentrant: bool
) -> None:
    plain, model = llama(), llama()
    attach(plain)
    attach(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert losses(model, 3) == losses(plain, 3)
    assert len(calls) == 3 * 14 * 3  # forward; forward and recomputation


def test_the_saved_adapter_is_plain_pefts(llama: Callable[..., PeftModel], tmp_path: Path) -> None:
    model = llama()
    names = list(model.state_dict())
    attach(model)
    assert list(model.state_dict()) == names
    losses(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().unload(), tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, fastlora_kernels; assert not {'torch', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    for name in fastlora_kernels.__all__:
        assert callable(getattr(fastlora_kernels, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastlora_kernels.nonsense


def test_the_environment_is_read_by_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, known = torch.device("cpu"), ("interpret", "reference")
    monkeypatch.setattr(dispatch, "wanted", cache(dispatch.wanted.__wrapped__))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("FASTLORA_KERNELS", raising=False)
    assert dispatch.choose_backend(cpu, known) == "reference"
    monkeypatch.setenv("FASTLORA_KERNELS", "interpret")
    assert dispatch.choose_backend(cpu, known) == "reference"
    attach(torch.nn.Linear(2, 2))
    assert dispatch.choose_backend(cpu, known) == "interpret"


BAD_ENVIRONMENTS = {
    "bogus": "not a backend; set it to one of triton, interpret, reference",
    "triton": "Triton needs a GPU, and this runs on cpu; set it to reference",
    "interpret": "set TRITON_INTERPRET=1 too, before Triton is imported",
}


@pytest.mark.parametrize("name", BAD_ENVIRONMENTS)
def test_attach_refuses_what_no_op_could_run_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FASTLORA_KERNELS", name)
    with pytest.raises(
        ValueError, match=f"^FASTLORA_KERNELS={name}: {BAD_ENVIRONMENTS[name]}, or unset it$"
    ):
        attach(torch.nn.Linear(2, 2))


def test_backends_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    monkeypatch.setenv("FASTLORA_KERNELS", "interpret")
    with pytest.raises(ValueError, match="Triton is not installed; pip install triton"):
        attach(torch.nn.Linear(2, 2))


def test_an_empty_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_KERNELS", "")
    attach(torch.nn.Linear(2, 2))
    assert dispatch.wanted() is None
