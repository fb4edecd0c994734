"""Layers on the same x run as one op; whatever is not as it seems makes each run alone, and nothing else."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import fastlora_kernels.layers.group
import pytest
import torch
from fastlora_kernels import attach, detach
from fastlora_kernels.layers.group import MISSES
from fastlora_kernels.layers.linear import GROUP
from fastlora_kernels.ops.lora_linear import lora_linears
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

Results = dict[str, torch.Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three projections of x, of different widths, and a sum that gives each its own gradient."""

    def __init__(self, k: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        for name, n in zip(NAMES, (40, 24, 24), strict=True):
            setattr(self, name, linear(k, n))

    def forward(self, x: torch.Tensor, called: tuple[str, ...] = NAMES) -> torch.Tensor:
        ys = [getattr(self, name)(x) for name in called]
        return torch.cat([y.cos() for y in ys], dim=-1)


def attention(
    bias: bool = True,
    targets: tuple[str, ...] = NAMES,
    k: int = 32,
    four_bit: bool = False,
    eight_bit: bool = False,
    **config: Any,
) -> Any:
    torch.manual_seed(0)

    def linear(k: int, n: int) -> nn.Module:
        made: nn.Module
        if four_bit:
            made = bnb.nn.Linear4bit(k, n, bias, torch.float32, quant_type="nf4")
        elif eight_bit:
            made = bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False)
        else:
            made = nn.Linear(k, n, bias)
        return made.to(DEVICE)  # the move quantizes

    model: Any = Attention(k, linear)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = four_bit, eight_bit
    given = {"r": 8, "lora_alpha": 16, "target_modules": list(targets)} | config
    inject_adapter_in_model(LoraConfig(**given), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        if "lora_" not in name:
            parameter.requires_grad_(False)
    return model.to(DEVICE)


def results(
    model: Any, x: torch.Tensor, call: Callable[..., torch.Tensor] | None = None
) -> Results:
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = (call or model)(x)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_equal(ours: Results, theirs: Results) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each op that a group ran."""
    seen: list[int] = []

    def spy(x: torch.Tensor, projections: Any) -> tuple[torch.Tensor, ...]:
        seen.append(len(projections))
        return lora_linears(x, projections)

    monkeypatch.setattr(fastlora_kernels.layers.group, "lora_linears", spy)
    return seen


def waiting(model: Any) -> Any:
    return vars(model.q_proj)[GROUP]._waiting


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", [NAMES, ("q_proj", "v_proj")])
@pytest.mark.parametrize("shape", [(1, 32), (2, 31, 32), (63, 32)])
def test_one_op_gives_what_peft_gives(
    shape: tuple[int, ...], targets: tuple[str, ...], bias: bool, groups: list[int]
) -> None:
    model = attention(bias, targets, rank_pattern={"q_proj": 16})
    x = torch.randn(shape, device=DEVICE)
    theirs = results(model, x)
    attached = attach(model)
    assert attached.groups == {"+".join(targets): 1}
    assert f"in groups on the same x: 1 (1 {'+'.join(targets)})" in str(attached)
    assert_equal(results(model, x), theirs)
    assert groups == [len(targets)]
    assert waiting(model) is None
    detach(model)
    assert GROUP not in vars(model.q_proj)
    assert_equal(results(model, x), theirs)
    assert groups == [len(targets)]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_dora_beside_the_others(groups: list[int]) -> None:
    """The adapter of k has DoRA, which runs alone."""
    model = attention(targets=("q_proj", "v_proj"))
    inject_adapter_in_model(LoraConfig(r=4, use_dora=True, target_modules=["k_proj"]), model)
    x = torch.randn(5, 32, device=DEVICE)
    theirs = results(model, x)
    attached = attach(model)
    assert attached.served == dict.fromkeys(NAMES, 1)
    assert attached.groups == {"q_proj+v_proj": 1}
    assert_equal(results(model, x), theirs)
    assert groups == [2]


def test_dora_alone_is_no_group(groups: list[int]) -> None:
    model = attention(use_dora=True)
    attached = attach(model)
    assert attached.served == dict.fromkeys(NAMES, 1)
    assert attached.groups == {}
    assert "in groups" not in str(attached)
    model(torch.randn(5, 32, device=DEVICE))
    assert groups == []


def other_x(model: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = model.q_proj(x), model.k_proj(x * 2)
    return torch.cat([q.cos(), k.cos(), model.v_proj(x).cos()], dim=-1)


def in_place_output(model: Any, x: torch.Tensor) -> torch.Tensor:
    q = model.q_proj(x)
    q += 1
    return torch.cat([q.cos(), model.k_proj(x).cos(), model.v_proj(x).mul_(2)], dim=-1)


def change_adapter(model: Any, x: torch.Tensor) -> torch.Tensor:
    q = model.q_proj(x)
    with torch.no_grad():
        model.k_proj.lora_A["default"].weight.copy_(torch.full((8, 32), 0.1))
        model.v_proj.lora_A["default"].weight.data = torch.full((8, 32), 0.2, device=DEVICE)
    return torch.cat([q.cos(), model.k_proj(x).cos(), model.v_proj(x).cos()], dim=-1)


def disable_one(model: Any, x: torch.Tensor) -> torch.Tensor:
    q = model.q_proj(x)
    model.k_proj.enable_adapters(False)
    k = model.k_proj(x)
    model.k_proj.enable_adapters(True)
    return torch.cat([q.cos(), k.cos(), model.v_proj(x).cos()], dim=-1)


def no_grad_between(model: Any, x: torch.Tensor) -> torch.Tensor:
    q = model.q_proj(x)
    with torch.no_grad():
        k = model.k_proj(x)
    return torch.cat([q.cos(), k.cos(), model.v_proj(x).cos()], dim=-1)


def twice(model: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(x), model(x)], dim=-1)


def only_two(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x, ("q_proj", "v_proj"))  # type: ignore[no-any-return]


def one_output_unused(model: Any, x: torch.Tensor) -> torch.Tensor:
    q, _, v = (getattr(model, name)(x) for name in NAMES)
    return torch.cat([q, v], dim=-1)


@pytest.mark.parametrize(
    "call",
    [
        other_x, in_place_output, disable_one, no_grad_between, twice, only_two, one_output_unused,
    ],
)  # fmt: skip
def test_nothing_is_ever_wrong(call: Callable[..., torch.Tensor], groups: list[int]) -> None:
    plain, model = attention(), attention()
    attach(model)
    for seed in range(MISSES + 2):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        theirs = results(plain, x, lambda x: call(plain, x))
        assert_equal(results(model, x, lambda x: call(model, x)), theirs)
    assert groups


def test_an_adapter_that_is_written_to_between() -> None:
    """With gradients it is as with any weight that is written to before backward: autograd refuses."""
    plain, model = attention(), attention()
    attach(model)
    x = torch.randn(3, 32, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(change_adapter(model, x), change_adapter(plain, x))
    y = change_adapter(model, x.requires_grad_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_x_that_is_written_to_between() -> None:
    """Without gradients: with them autograd itself refuses."""
    plain, model = attention(), attention()
    attach(model)
    x = torch.randn(3, 32, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(model.q_proj(x), plain.q_proj(x))
        x += 1
        for name in ("k_proj", "v_proj"):
            torch.testing.assert_close(getattr(model, name)(x), getattr(plain, name)(x))
            x.data = torch.randn(3, 32, device=DEVICE)


def test_layers_that_never_share_end_up_alone(groups: list[int]) -> None:
    model = attention()
    attach(model)
    for _ in range(MISSES + 3):
        other_x(model, torch.randn(3, 32, device=DEVICE))
    seen = len(groups)
    other_x(model, torch.randn(3, 32, device=DEVICE))
    assert len(groups) == seen
    assert waiting(model) is None


def in_the_end_alone(call: Any, groups: list[int]) -> Any:
    """A model of which `call` gives what it gives of one that is not attached, until its layers run alone and then."""
    plain, model = attention(), attention()
    attach(model)
    for _ in range(MISSES + 2):
        x = torch.randn(3, 32, device=DEVICE)
        seen = len(groups)
        theirs = results(plain, x, lambda x: call(plain, x))
        assert_equal(results(model, x, lambda x: call(model, x)), theirs)
    assert seen
    assert len(groups) == seen
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_they_end_up_alone_between_two_repetitions(reentrant: bool, groups: list[int]) -> None:
    """A forward that is to be repeated saves what its repetition will, which is compared where it is not reentrant."""

    def twice_checkpointed(model: Any, x: torch.Tensor) -> torch.Tensor:
        ys = [
            checkpoint(other_x, model, x + n, use_reentrant=reentrant)
            for n in range(2)  # one is repeated when the other has been
        ]
        return torch.cat(ys, dim=-1)

    assert waiting(in_the_end_alone(twice_checkpointed, groups)) is None


def forward_between(model: Any, x: torch.Tensor, grad: bool) -> torch.Tensor:
    """As of a reference model that shares the layers."""
    y = checkpoint(other_x, model, x, use_reentrant=False)
    with torch.set_grad_enabled(grad):
        reference = other_x(model, x + 1)
    return y + reference  # type: ignore[no-any-return]


def back_twice(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The graph of the first is gone back through again when others have come and gone."""
    y = checkpoint(other_x, model, x, use_reentrant=False)
    y.sum().backward(retain_graph=True)
    checkpoint(other_x, model, x + 1, use_reentrant=False).sum().backward()
    return y  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: forward_between(model, x, grad=False),
        lambda model, x: forward_between(model, x, grad=True),
        back_twice,
    ],
)
def test_a_forward_that_may_be_repeated_stays_as_it_was(call: Any, groups: list[int]) -> None:
    in_the_end_alone(call, groups)


def test_other_hooks_on_what_is_saved_do_not_keep_them_together(groups: list[int]) -> None:
    model = attention()
    attach(model)
    with torch.autograd.graph.save_on_cpu():
        kept = [other_x(model, torch.randn(3, 32, device=DEVICE)) for _ in range(MISSES + 2)]
    assert len(groups) == MISSES
    assert kept


def test_what_a_repetition_leaves_goes_with_it(groups: list[int]) -> None:
    """Else it would hold all that was computed again, until the next call."""
    model = attention()
    attach(model)
    x = torch.randn(3, 32, device=DEVICE, requires_grad=True)
    checkpoint(lambda x: model.q_proj(x * 2), x, use_reentrant=False).sum().backward()
    assert groups == [3, 3]
    assert waiting(model) is None


def test_groups_that_were_are_gone() -> None:
    model = attention()
    attach(model)
    first = vars(model.k_proj)[GROUP]
    model.k_proj.enable_adapters(False)
    model.k_proj.set_adapter([])
    assert attach(model).groups == {"q_proj+v_proj": 1}
    assert GROUP not in vars(model.k_proj)
    assert vars(model.q_proj)[GROUP] is not first


def test_an_exception_between_leaves_nothing_wrong(groups: list[int]) -> None:
    model = attention()
    x = torch.randn(3, 32, device=DEVICE)
    theirs = results(model, x)
    attach(model)
    model.q_proj(x)
    assert waiting(model) is not None
    assert_equal(results(model, x), theirs)
    assert waiting(model) is None
    assert groups == [3, 3]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant: bool, dropout: float, groups: list[int]) -> None:
    """With dropout too: the recomputation has the same masks."""
    model = attention(lora_dropout=dropout)
    attach(model)
    x = torch.randn(7, 32, device=DEVICE)

    def found(call: Callable[..., torch.Tensor]) -> Results:
        torch.manual_seed(5)
        return results(model, x, call)

    plain = found(model)
    recomputed = found(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert plain.keys() == recomputed.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, recomputed[name]), name
    assert groups == [3, 3, 3]
    if dropout:
        assert not torch.equal(found(model)["y"], results(model, x)["y"])


def test_under_autocast_and_inference_mode(groups: list[int]) -> None:
    plain, model = attention(), attention()
    attach(model)
    x = torch.randn(5, 32, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.05)
    assert groups == [3]
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model(x * 1), plain(x * 1))


@pytest.mark.parametrize("tokens", [3, 90], ids=["split", "folded"])
def test_4_bits(tokens: int, backend: str, groups: list[int]) -> None:
    model = attention(k=64, four_bit=True)
    x = torch.randn(tokens, 64, device=DEVICE)
    theirs = results(model, x)
    assert attach(model).groups == {"q_proj+k_proj+v_proj": 1}
    ours = results(model, x)
    assert groups == [3]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4)


def test_8_bits(groups: list[int]) -> None:
    model = attention(k=64, four_bit=False, eight_bit=True)
    x = torch.randn(5, 64, device=DEVICE, dtype=torch.float16 if DEVICE.type == "cuda" else None)
    with torch.autocast(DEVICE.type, torch.float16, enabled=DEVICE.type == "cuda"):
        theirs = results(model, x)
        attach(model)
        ours = results(model, x)
        again = results(model, x)
    assert groups == [3, 3]
    tolerance = 2e-2 if DEVICE.type == "cuda" else 1e-4
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance)
        assert torch.equal(ours[name], again[name])


def test_copies_pickles_and_garbage() -> None:
    model = attention()
    x = torch.randn(3, 32, device=DEVICE)
    names = list(model.state_dict())
    attach(model)
    assert list(model.state_dict()) == names
    expected = model(x)
    model.q_proj(x)  # outputs that wait are not copied: they have a graph
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(twin.q_proj)[GROUP] is None
        torch.testing.assert_close(twin(x), expected)
        assert attach(twin).groups == {"q_proj+k_proj+v_proj": 1}
        torch.testing.assert_close(twin(x), expected)
    shallow = copy.copy(model.q_proj)
    torch.testing.assert_close(shallow(x), model.q_proj(x))

    gc.collect()
    gc.disable()
    gone = weakref.ref(twin.q_proj)
    del twin
    assert gone() is None  # no cycles: memory is freed at once
    gc.enable()
