"""What `attach` reported as served and PEFT runs after all is said, once and only while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from fastlora_kernels import attach, detach
from fastlora_kernels.layers.group import MISSES
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINEAR = ("q_proj", "k_proj", "o_proj")


class Model(nn.Module):
    """q and k on one x, and what follows one another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        for name in LINEAR:
            setattr(self, name, nn.Linear(16, 16))

    def forward(self, ids: torch.Tensor, apart: bool = False, **kwargs: Any) -> torch.Tensor:
        x = self.embed(ids, **kwargs)
        q = self.q_proj(x, **kwargs)
        k = self.k_proj(x * 2 if apart else x, **kwargs)
        y: torch.Tensor = self.o_proj(q * k, **kwargs)
        return y


def model_of(**config: Any) -> Any:
    torch.manual_seed(0)
    model = Model().to(DEVICE)
    given = {"r": 4, "target_modules": ["embed", *LINEAR]} | config
    inject_adapter_in_model(LoraConfig(**given), model)
    return model


def layers(model: Any) -> list[Any]:
    return [model.embed, *(getattr(model, name) for name in LINEAR)]


def call(model: Any, **kwargs: Any) -> None:
    model(torch.arange(10, device=DEVICE).view(2, 5), **kwargs)


def peft(kind: str, reason: str) -> str:
    return f"{kind}: PEFT's own forward runs from now on: {reason}; attach(model) reports what is served as it now is"


def merge(model: Any) -> None:
    for layer in layers(model):
        layer.merge()


def unmerge(model: Any) -> None:
    for layer in layers(model):
        layer.unmerge()


def disable(model: Any) -> None:
    for layer in layers(model):
        layer.enable_adapters(False)


def trained_base(model: Any) -> None:
    model.o_proj.base_layer.weight.requires_grad_()


def other_dtypes(model: Any) -> None:
    for name, parameter in model.o_proj.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()


def other_dtypes_of_the_embedding(model: Any) -> None:
    for name, parameter in model.embed.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()


def hook_on_dropout(model: Any) -> None:
    model.o_proj.lora_dropout["default"].register_forward_hook(lambda *_: None)


CHANGES: dict[Callable[[Any], None], str] = {
    merge: peft("embed", "adapter merged"),
    hook_on_dropout: peft("o_proj", "hooks or special weights on its base or adapter"),
    trained_base: peft("o_proj", "base layer is trained too"),
    other_dtypes: peft("o_proj", "base, adapter and x are of different dtypes outside autocast"),
    other_dtypes_of_the_embedding: peft(
        "embed", "base and adapter are of different dtypes outside autocast"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_said_once(change: Callable[[Any], None], said: Callable[[], list[str]]) -> None:
    model = model_of()
    assert attach(model).left == {}
    call(model)
    assert said() == []
    change(model)
    call(model)
    assert said() == [CHANGES[change]]
    call(model)
    assert said() == []
    attach(model)  # reports it, but for layers that autocast would bring back
    call(model)
    assert said() == ([CHANGES[change]] if "autocast" in CHANGES[change] else [])


def test_one_line_for_each_reason(said: Callable[[], list[str]]) -> None:
    model = model_of()
    attach(model)
    merge(model)
    call(model)
    unmerge(model)
    call(model)
    trained_base(model)
    call(model)
    merge(model)
    call(model)
    assert said() == [
        peft("embed", "adapter merged"),
        peft("o_proj", "base layer is trained too"),
    ]


def test_what_the_report_said_is_not_said_again(said: Callable[[], list[str]]) -> None:
    model = model_of(r=257, target_modules=["o_proj"])
    assert attach(model).left == {"rank above 256": {"o_proj": 1}}
    call(model)
    assert said() == []
    model.o_proj.merge()
    call(model)
    assert said() == [peft("o_proj", "adapter merged")]


def test_nothing_of_what_does_not_train(said: Callable[[], list[str]]) -> None:
    model = model_of()
    attach(model)
    disable(model)
    with torch.no_grad():
        model(torch.arange(4, device=DEVICE))
    call(model.eval(), apart=True)
    assert said() == []
    model.q_proj.train()
    call(model)
    assert said() == [peft("q_proj", "adapter disabled")]


def test_called_with_more_than_x(said: Callable[[], list[str]]) -> None:
    model = model_of()
    attach(model)
    names = ["default", "__base__"]
    call(model, adapter_names=names)
    assert said() == [peft("embed", "called with more than x, as adapter_names")]
    attach(model)
    model.o_proj(torch.randn(2, 16, device=DEVICE), adapter_names=names)
    assert said() == [peft("o_proj", "called with more than x, as adapter_names")]


def test_dtypes_under_autocast_and_tensors_of_other_kinds(said: Callable[[], list[str]]) -> None:
    model = model_of()
    attach(model)
    other_dtypes(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        model.q_proj(torch.randn(2, 16, device=DEVICE, dtype=torch.bfloat16))
        assert said() == []
        model.o_proj(torch.randn(2, 16, device=DEVICE))
    assert said() == [peft("o_proj", "it does not compute in autocast's dtype")]

    class Special(torch.Tensor):
        pass

    model.q_proj(torch.randn(2, 16, device=DEVICE).as_subclass(Special))
    assert said() == [peft("q_proj", f"x is a Special on {DEVICE}")]


def test_a_group_that_gives_up(said: Callable[[], list[str]]) -> None:
    model = model_of()
    attach(model)
    model.eval()
    for _ in range(MISSES + 1):
        call(model, apart=True)
    assert said() == []
    model.train()
    call(model)
    assert said() == [
        "q_proj+k_proj: these layers run one by one from now on: they were not called one after the other with the "
        "same x; attach(model) groups them anew"
    ]
    call(model)
    assert said() == []
    attach(model)
    call(model)
    assert said() == []


def test_a_forward_kept_from_before_detach(said: Callable[[], list[str]]) -> None:
    """As accelerate's hooks keep one."""
    model = model_of()
    attach(model)
    forward = model.o_proj.forward
    detach(model)
    model.o_proj.merge()
    forward(torch.randn(2, 16, device=DEVICE))
    assert said() == [peft("Linear", "adapter merged")]


@pytest.fixture
def _own_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [disable, other_dtypes, trained_base])
@pytest.mark.usefixtures("_own_dynamo")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_is_traced_stays_one_graph(
    change: Callable[[Any], None], said: Callable[[], list[str]]
) -> None:
    model = model_of()
    attach(model)
    change(model)
    ids = torch.arange(10, device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), model.eval()(ids))
    assert said() == []
