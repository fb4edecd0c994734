"""LoRA and DoRA on linear layers: one, several that read the same x, or those of a gated MLP."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opbench import Case, Setting, Work


class Module(NamedTuple):
    op: str
    model: str
    layers: dict[str, tuple[int, int]]
    """Name -> inputs, outputs. gate_proj, up_proj and down_proj, with `act`; else all read x."""
    bare: tuple[str, ...] = ()
    """Those without an adapter."""
    bias: bool = False
    dora: bool = False
    act: str = ""
    """silu or gelu_tanh, of a gated MLP."""

    @property
    def shape(self) -> str:
        (inputs, outputs), *rest = self.layers.values()
        if self.act:
            return f"{inputs}x{outputs}x{inputs}"
        return f"{inputs}x" + "+".join(str(n) for n in (outputs, *(n for _, n in rest)))

    def case(self, group: str, base: str) -> Case:
        arms, work = partial(module_arms, self, base), partial(module_work, self, base)
        return Case(group, self.op, self.model, self.shape, base, arms, work)


class Projections(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


class Qkv(nn.Module):
    """As an attention calls them, so that they are found to share x where torch.compile traces it too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q, k, v


class Mlp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return,operator]


def drawn(*shape: int, std: float, setting: Setting, generator: Any) -> Tensor:
    """Normal. By a generator of its own: a capture that breaks off leaves the GPU's default one unusable."""
    empty = torch.empty(*shape, dtype=setting.dtype, device=setting.device)
    return empty.normal_(std=std, generator=generator)


def linear_base(
    k: int, n: int, base: str, setting: Setting, generator: Any, bias: bool = False
) -> nn.Module:
    """Frozen. Made on the device: on the host drawing a large one takes seconds."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = drawn(n, k, std=k**-0.5, setting=setting, generator=generator)
    like: dict[str, Any] = {"bias": bias, "device": "meta"}
    if base == "nf4":
        linear = Linear4bit(k, n, compute_dtype=setting.dtype, quant_type="nf4", **like)
        linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=linear).to(
            setting.device
        )  # which quantizes, scales too
    else:
        linear = nn.Linear(k, n, **like)
        linear.weight = nn.Parameter(weight)
    if bias:
        linear.bias = nn.Parameter(drawn(n, std=0.1, setting=setting, generator=generator))
    return linear.requires_grad_(False)  # type: ignore[no-any-return]


def with_adapters(
    model: Any, targets: list[str], base: str, setting: Setting, generator: Any, dora: bool = False
) -> dict[str, Tensor]:
    """Into `model`, in float32, with a B that is not zero, as in the midst of training. The trained parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = setting.rank
    model.is_loaded_in_4bit = base == "nf4"  # set by transformers, asked for by PEFT
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=targets)
    inject_adapter_in_model(config, model)
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for name, parameter in trained.items():
        parameter.data = parameter.data.float()
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1 / rank**0.5, generator=generator)
    return trained


def dense_weight(linear: Any, dtype: torch.dtype) -> Tensor:
    """W (N, K) in `dtype`; NF4 dequantized in at most float32."""
    weight: Tensor = linear.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32 if dtype == torch.float64 else dtype
        weight = dequantize_4bit(weight.data, quant_state=state)
    return weight.to(dtype)


def module_arms(module: Module, base: str, setting: Setting) -> dict[str, Any]:
    """A Case's arms. All share every weight."""
    from fastlora_kernels import attach
    from fastlora_kernels.layers.group import trace_together

    tokens, _, dtype, device, seed, *_ = setting
    torch.manual_seed(seed)  # PEFT draws A on the host
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(drawn, std=1.0, setting=setting, generator=generator)
    model: Any = Mlp() if module.act else Qkv() if "q_proj" in module.layers else Projections()
    for name, (k, n) in module.layers.items():
        model.add_module(name, linear_base(k, n, base, setting, generator, module.bias))
    if module.act:
        model.act_fn = nn.SiLU() if module.act == "silu" else nn.GELU(approximate="tanh")
    targets = [name for name in module.layers if name not in module.bare]
    trained = with_adapters(model, targets, base, setting, generator, module.dora)
    (inputs, _), *_ = module.layers.values()
    x = random(tokens, inputs).requires_grad_()
    gs = [random(tokens, n) for _, n in module.layers.values()]
    upstream = gs[-1:] if module.act else gs
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    left = list(attach(twin).left)
    if setting.compiled:
        trace_together(twin)
    ready, ready_twin = setting.ready(model), setting.ready(twin)

    def found(ys: Any, inputs: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        ys = ys if isinstance(ys, tuple) else (ys,)
        gradients = torch.autograd.grad(ys, inputs, [g.to(dtype) for g in upstream])
        outputs = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return outputs | dict(zip(("dx", *trained), gradients, strict=True))

    def step(model: Any) -> dict[str, Tensor]:
        with setting.autocast():
            ys = model(x)
        return found(ys, [x, *trained.values()], dtype)

    def plain(name: str) -> Any:
        layer = getattr(model, name)
        return layer if name in module.bare else layer.base_layer

    def truth() -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        x_, *rest = (p.detach().to(wide).requires_grad_() for p in (x, *trained.values()))
        adapters = dict(zip(trained, rest, strict=True))

        def linear(name: str, x: Tensor) -> Tensor:
            weight, bias = dense_weight(plain(name), wide), plain(name).bias
            y = x @ weight.T
            if name in targets:
                a, b = (adapters[f"{name}.lora_{letter}.default.weight"] for letter in "AB")
                scaling = getattr(model, name).scaling["default"]
                y = y + scaling * (x @ a.T) @ b.T
                if module.dora:
                    magnitude = adapters[f"{name}.lora_magnitude_vector.default.weight"]
                    norm = torch.linalg.vector_norm((weight + scaling * b @ a).detach(), dim=1)
                    y = y * (magnitude / norm)
            return y if bias is None else y + bias.to(wide)

        if module.act:
            gate, up = linear("gate_proj", x_), linear("up_proj", x_)
            return found(linear("down_proj", model.act_fn(gate) * up), [x_, *rest], wide)
        return found(tuple(linear(name, x_) for name in module.layers), [x_, *rest], wide)

    h = random(tokens, module.layers["gate_proj"][1]) if module.act else x.detach()

    def floor() -> None:
        for name, g in zip(module.layers, gs, strict=True):
            given = h if name == "down_proj" else x.detach()
            _ = given @ dense_weight(plain(name), dtype).T
            _ = g @ dense_weight(plain(name), dtype)

    arms = {"truth": truth, "floor": floor, "peft": lambda: step(ready)}
    return arms | ({"left": left[0]} if left else {"ours": lambda: step(ready_twin)})


def linear_work(k: int, n: int, base: str, setting: Setting) -> Work:
    """x W^T and g W are the floor; then x A^T, (x A^T) B^T, g B, (g B) A, dA and dB. Forward reads x, W, A, B and
    writes y; backward reads g, x, W, A, B and writes dx, dA, dB. A and B are float32."""
    tokens, rank, dtype, *_ = setting
    floor = 4 * tokens * k * n
    adapter = rank * (k + n)
    nf4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # code, scale of 64, and scale of 256 scales
    weight = k * n * (nf4 if base == "nf4" else dtype.itemsize)
    moved = tokens * (3 * k + 2 * n) * dtype.itemsize + 2 * weight + 3 * 4 * adapter
    return Work(floor + 6 * tokens * adapter, floor, round(moved))


def module_work(module: Module, base: str, setting: Setting) -> Work:
    """The sum over its layers; but x that several read is read, and its gradient written, once for all."""
    works = [
        linear_work(k, n, base, setting._replace(rank=0) if name in module.bare else setting)
        for name, (k, n) in module.layers.items()
    ]
    flops, floor_flops, moved = (sum(numbers) for numbers in zip(*works, strict=True))
    if not module.act:
        (k, _), *_ = module.layers.values()
        moved -= (len(works) - 1) * 3 * setting.tokens * k * setting.dtype.itemsize
    return Work(flops, floor_flops, moved)
