"""MLPs of transformers' models, with our activation in them, against PEFT's own: loss and every gradient."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from fastlora_kernels import attach, detach
from fastlora_kernels.layers.mlp import FusedMlp, activation_of
from peft import LoraConfig, get_peft_model
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
MODELS = {
    "Llama": {"mlp_bias": True}, "Qwen2": {}, "Qwen3": {}, "Gemma": {}, "Gemma2": {}, "Gemma3": {}, "Mistral": {},
    "Phi3": {}, "Olmo2": {}, "SmolLM3": {}, "Granite": {}, "Glm4": {},
}  # fmt: skip
Results = dict[str, torch.Tensor]


def model(name: str, own: dict[str, Any] | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    text = "Text" if name == "Gemma3" else ""
    settings = getattr(transformers, f"{name}{text}Config")(**SMALL | MODELS[name] | (own or {}))
    base = getattr(transformers, f"{name}ForCausalLM")(settings)
    for parameter in base.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **given))
    for parameter_name, parameter in peft.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return peft.to(DEVICE)


def results(model: Any, autocast: bool = False) -> Results:
    model.zero_grad()
    ids = torch.arange(2, 36, device=DEVICE).view(2, 17)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def mlps(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedMlp)]


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_pefts(name: str) -> None:
    peft = model(name)
    theirs = results(peft)
    attached = attach(peft)
    assert attached.left == {}
    assert attached.mlps == {f"{name}MLP": 1}
    assert "q_proj+k_proj+v_proj" in attached.groups or name == "Phi3"
    assert f"MLPs with the activation fused: 1 (1 {name}MLP)" in str(attached)
    ours = results(peft)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        error = float((ours[key] - tensor).norm())
        assert error <= 3e-5 * float(tensor.norm()) + 1e-7, key
    assert attach(peft) == attached
    detach(peft)
    assert mlps(peft) == []
    assert torch.equal(results(peft)["loss"], theirs["loss"])


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Phi3"])
def test_under_autocast_it_errs_no_more(name: str) -> None:
    peft = model(name)
    exact, theirs = results(peft), results(peft, autocast=True)
    attach(peft)
    ours = results(peft, autocast=True)

    def error(found: Results) -> float:
        """All gradients together: of a single one, luck decides."""
        return sum(float((found[key] - exact[key]).norm()) ** 2 for key in exact) ** 0.5

    assert ours.keys() == exact.keys()
    assert error(ours) <= 2 * error(theirs) + 1e-6


@pytest.mark.parametrize(
    ("config", "fused_down"),
    [
        ({"target_modules": ["gate_proj", "up_proj"]}, False),
        ({"target_modules": ["down_proj"]}, True),
        ({"target_modules": ["up_proj", "down_proj"], "use_dora": True}, False),
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["down_proj"], "lora_bias": True}, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*merging LoRA weights")
def test_some_of_its_layers(
    config: dict[str, Any], fused_down: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastlora_kernels.layers.mlp as module

    calls = []
    op = module.glu_lora_linear
    monkeypatch.setattr(module, "glu_lora_linear", lambda *given: calls.append(1) or op(*given))
    peft = model("Llama", **config)
    theirs = results(peft)
    attach(peft)
    ours = results(peft)
    assert bool(calls) is fused_down
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-6)


def test_checkpointing_with_dropout_changes_no_bit() -> None:
    peft = model("Llama", lora_dropout=0.5)
    attach(peft)
    peft.train()
    torch.manual_seed(3)
    plain = results(peft)
    for reentrant in (False, True):
        peft.gradient_checkpointing_enable({"use_reentrant": reentrant})
        peft.enable_input_require_grads()
        torch.manual_seed(3)
        again = results(peft)
        assert plain.keys() == again.keys()
        for key, tensor in plain.items():
            assert torch.equal(tensor, again[key]), key


def test_copies_and_pickles() -> None:
    peft = model("Llama")
    names = list(peft.state_dict())
    attach(peft)
    (mlp,) = mlps(peft)
    assert list(peft.state_dict()) == names
    x = torch.randn(3, 32, device=DEVICE)
    for twin in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert type(twin).__name__ == "LlamaMLP"
        assert isinstance(twin, FusedMlp)
        assert type(twin).__bases__ == type(mlp).__bases__
        torch.testing.assert_close(twin(x=x), mlp(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_inside_a_compiled_model() -> None:
    """What stands around our layers may be compiled; they run as they are."""
    peft = model("Llama")
    attach(peft)
    plain = results(peft)
    step = torch.compile(lambda ids: peft(input_ids=ids, labels=ids).loss, backend="eager")
    peft.zero_grad()
    ids = torch.arange(2, 36, device=DEVICE).view(2, 17)
    loss = step(ids)
    loss.backward()
    torch.testing.assert_close(loss.detach(), plain["loss"])
    for name, parameter in peft.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name])


class Other(nn.Module):
    """Not of a known form: the activation is on the other factor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down_proj, self.act_fn = nn.Linear(6, 4), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down_proj = self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))
        return down_proj  # noqa: RET504


class Same(Other):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the known form."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Decorated(Other):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _work(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


COMPILED, DISABLED = torch.compile(_work, backend="eager"), torch.compiler.disable(_work)


class AsUnslothWritesIt(Other):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return COMPILED(self, x=x)


class OfTwice(Other):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return COMPILED(self, x * 2)


class OfDisabled(Other):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return DISABLED(self, x)  # type: ignore[no-any-return]


class Doubled:
    """As accelerate puts what offloads a layer around it: in the place of its forward."""

    def __init__(self, layer: nn.Module) -> None:
        self.theirs, layer.forward = layer.forward, self  # type: ignore[method-assign]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.theirs(x)  # type: ignore[no-any-return]


def doubled_gradient(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda _layer, gs, _: (2 * gs[0],))


@pytest.mark.parametrize("put_on", [Doubled, doubled_gradient])
@pytest.mark.parametrize("on", ["down_proj", "act_fn"])
def test_what_is_put_on_a_layer_later_is_not_gone_past(put_on: Any, on: str) -> None:
    plain, ours = model("Llama"), model("Llama")
    before = results(plain)
    attach(ours)
    for peft in (plain, ours):
        put_on(getattr(peft.base_model.model.model.layers[0].mlp, on))
    theirs = results(plain)
    name = next(name for name in theirs if "gate_proj.lora_A" in name)
    assert not torch.allclose(theirs[name], before[name], rtol=1e-2)
    for _ in range(2):
        found = results(ours)
        for key, tensor in theirs.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)
        attach(ours)


def work(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Calling(transformers.models.llama.modeling_llama.LlamaMLP):  # type: ignore[misc]
    """As unsloth's, whose forward only calls a function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return work(self, x)


def test_a_function_that_a_forward_calls_and_that_is_another_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "LlamaMLP", Calling)
    assert attach(model("Llama")).mlps == {"Calling": 1}
    monkeypatch.setitem(globals(), "work", lambda self, x: 2 * self.down_proj(x[..., :48]))
    assert attach(model("Llama")).mlps == {}


def test_a_class_that_gets_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then there are models of it that are attached, and new ones."""
    first = model("Llama")
    assert attach(first).mlps

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    expected = results(model("Llama"))
    for peft in (first, model("Llama")):
        assert attach(peft).mlps == {}
        torch.testing.assert_close(results(peft)["loss"], expected["loss"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_other_forms_are_left_alone() -> None:
    forms = {Other: 0, Decorated: 0, OfTwice: 0, OfDisabled: 0, Same: 1, AsUnslothWritesIt: 1}
    for cls, fused in forms.items():
        mlp = cls()
        x = torch.randn(3, 4)
        expected = mlp(x)
        assert sum(attach(nn.Sequential(mlp)).mlps.values()) == fused
        torch.testing.assert_close(mlp(x), expected)
    replaced = Same()
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert attach(nn.Sequential(replaced)).mlps == {}
    unknown = Same()
    unknown.act_fn = nn.Tanh()
    assert attach(nn.Sequential(unknown)).mlps == {}


def test_an_activation_that_changes_later() -> None:
    mlp = Same()
    x = torch.randn(3, 4)
    attach(nn.Sequential(mlp))
    mlp.act_fn = nn.Tanh()
    torch.testing.assert_close(mlp(x), mlp.down_proj(mlp.gate_proj(x).tanh() * mlp.up_proj(x)))


@pytest.mark.parametrize(
    "name", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"]
)
def test_activations_are_what_they_are_taken_for(name: str) -> None:
    act = transformers.activations.ACT2FN[name]
    found = activation_of(act)
    x = torch.linspace(-6, 6, 101)
    if found == "silu":
        expected = nn.functional.silu(x)
    else:
        assert found in ("gelu", "gelu_tanh")
        expected = nn.functional.gelu(x, approximate="tanh" if found == "gelu_tanh" else "none")
    torch.testing.assert_close(act(x), expected)


def test_other_activations() -> None:
    assert activation_of(nn.GELU()) == "gelu"
    assert activation_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    for name in ("relu", "quick_gelu", "gelu_10"):
        assert activation_of(transformers.activations.ACT2FN[name]) is None
    hooked = nn.SiLU()
    hooked.register_forward_hook(lambda module, given, y: y * 2)
    assert activation_of(hooked) is None
    assert activation_of(None) is None
