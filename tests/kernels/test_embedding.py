"""The embedding's op against its equation, and the layer that it serves against PEFT's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import fastlora_kernels
import pytest
import torch
from fastlora_kernels import reference
from fastlora_kernels.layers import embedding as layers
from fastlora_kernels.ops.embedding import lora_embedding
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
Results = dict[str, torch.Tensor]


def model_of(
    v: int = 50,
    k: int = 24,
    *,
    base: nn.Module | None = None,
    dtype: Any = torch.float32,
    **config: Any,
) -> nn.ModuleDict:
    """A model of one layer, `embed`, whose A and B are not zero (PEFT begins with A at zero)."""
    torch.manual_seed(0)
    made = base or nn.Embedding(v, k, padding_idx=config.pop("padding_idx", None))
    model = nn.ModuleDict({"embed": made.to(dtype)})
    inject_adapter_in_model(
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["embed"]} | config), model
    )
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(DEVICE)


def attach(model: nn.ModuleDict) -> str | None:
    """The reason if the layer is left to PEFT."""
    attached = fastlora_kernels.attach(model)
    assert attached.served == ({} if attached.left else {"embed": 1})
    return next(iter(attached.left), None)


def results(model: nn.Module, ids: torch.Tensor, autocast: bool = False, **kwargs: Any) -> Results:
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext():
        y = model["embed"](ids, **kwargs)
    torch.manual_seed(2)
    if y.requires_grad:
        y.backward(torch.randn(y.shape).bfloat16().to(y))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    seen: list[torch.dtype] = []

    def spy(*given: Any, **named: Any) -> torch.Tensor:
        seen.append(named["dtype"])
        return lora_embedding(*given, **named)

    monkeypatch.setattr(layers, "lora_embedding", spy)
    return seen


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize(
    ("shape", "v", "k", "r"),
    [
        ((1,), 1000, 24, 8),
        ((63,), 1003, 17, 40),
        ((2, 257), 50, 64, 8),
        ((0,), 5, 4, 2),
        ((3, 1, 5), 9, 1, 1),
    ],
)
def test_float32_is_pefts(
    shape: tuple[int, ...],
    v: int,
    k: int,
    r: int,
    padding_idx: int | None,
    calls: list[torch.dtype],
) -> None:
    model = model_of(v, k, r=r, padding_idx=padding_idx)
    ids = torch.randint(v, shape, device=DEVICE)
    theirs = results(model, ids)
    assert attach(model) is None
    ours = results(model, ids)
    assert calls == [torch.float32]
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
    if padding_idx is not None and shape == (2, 257):
        assert (ids == 3).any()
        assert not ours["embed.lora_embedding_A.default"][:, 3].any()


@pytest.mark.parametrize(
    ("dtype", "adapter", "autocast"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
    ],
)
def test_16_bit_errs_no_more_than_peft(
    dtype: torch.dtype, adapter: torch.dtype, autocast: bool, calls: list[torch.dtype]
) -> None:
    model = model_of(50, 64, r=8, dtype=dtype)
    for parameter in (model["embed"].lora_embedding_A, model["embed"].lora_embedding_B):
        parameter["default"].data = parameter["default"].data.to(adapter)
    ids = torch.randint(50, (257,), device=DEVICE)
    exact = results(copy.deepcopy(model).float(), ids)
    theirs = results(model, ids, autocast)
    assert attach(model) is None
    ours = results(model, ids, autocast)
    assert calls == [torch.bfloat16 if autocast else dtype]
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = (
            float((t[name].float() - truth).norm() / truth.norm()) for t in (ours, theirs)
        )
        assert error <= 2 * allowed + EPS, (name, error, allowed)


def test_finite_differences() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    a = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 3, 1], [6, 1, 0]])
    assert torch.autograd.gradcheck(lambda a, b: lora_embedding(ids, weight, a, b, 0.5), (a, b))
    torch.testing.assert_close(
        lora_embedding(ids, weight, a, b, 0.5), reference.lora_embedding(ids, weight, a, b, 0.5)
    )


def test_the_same_twice() -> None:
    """Many tokens of few kinds, whose sums in another order would differ in their last bits."""
    model = model_of(5, 64, r=8)
    attach(model)
    ids = torch.randint(5, (4096,), device=DEVICE)
    first, second = results(model, ids), results(model, ids)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


def changed(change: Callable[[Any], Any], **config: Any) -> nn.ModuleDict:
    model = model_of(**config)
    change(model["embed"])
    return model


def two_adapters() -> nn.ModuleDict:
    model = model_of()
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(
            LoraConfig(r=2, target_modules=["embed"], init_lora_weights=False),
            model,
            adapter_name="second",
        )
    model["embed"].set_adapter(["default", "second"])
    return model.to(DEVICE)


LEFT: dict[str, tuple[Callable[[], nn.ModuleDict], str]] = {
    "disabled": (lambda: changed(lambda e: e.enable_adapters(False)), "adapter disabled"),
    "merged": (lambda: changed(lambda e: e.merge()), "adapter merged"),
    "two": (two_adapters, "2 active adapters"),
    "dora": (lambda: model_of(use_dora=True), "variant DoraEmbeddingVariant"),
    "scaled": (lambda: model_of(base=Scaled(50, 24)), "base layer is a Scaled"),
    "norm": (
        lambda: model_of(base=nn.Embedding(50, 24, max_norm=1.0)),
        "max_norm, scale_grad_by_freq or sparse",
    ),
    "trained": (
        lambda: changed(lambda e: e.base_layer.weight.requires_grad_()),
        "base layer is trained too",
    ),
    "hook": (
        lambda: changed(lambda e: e.base_layer.register_forward_hook(lambda m, i, o: o * 2)),
        "hooks or special weights on its base",
    ),
    "replaced": (
        lambda: changed(lambda e: setattr(e, "forward", lambda x: e.base_layer(x) * 2)),
        "its forward was replaced",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_peft_is_pefts_to_the_last_bit(case: str, calls: list[torch.dtype]) -> None:
    build, reason = LEFT[case]
    model = build()
    ids = torch.randint(50, (2, 9), device=DEVICE)
    theirs = results(copy.deepcopy(model), ids)  # max_norm changes the weights
    assert attach(model) == reason
    ours = results(model, ids)
    assert calls == []
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_dtypes_that_differ_are_pefts_outside_autocast(calls: list[torch.dtype]) -> None:
    model = model_of(dtype=torch.bfloat16)
    for parameter in (model["embed"].lora_embedding_A, model["embed"].lora_embedding_B):
        parameter["default"].data = parameter["default"].data.float()
    ids = torch.randint(50, (9,), device=DEVICE)
    theirs = results(model, ids)
    attach(model)
    assert torch.equal(results(model, ids)["y"], theirs["y"])
    assert calls == []


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"lora_embedding: weight \(7, 5\), lora_a \(2, 6\)"):
        lora_embedding(torch.tensor([1]), torch.ones(7, 5), torch.ones(2, 6), torch.ones(5, 2), 1.0)
