"""The gated MLP of a model, with our activation in it, and the one of down_proj with it where that is served.

An MLP is taken only if the source of its class's forward, or of the function that this does nothing but call, is one
of the forms below, statement by statement; then it gets a subclass of its own class, with the same name and a forward
of ours. gate_proj and up_proj (or gate_up_proj) are called as they are: they may be LoRA layers, served or not, or
plain.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch
from torch import nn

from fastlora_kernels.layers.common import hooked
from fastlora_kernels.layers.group import outputs_of
from fastlora_kernels.layers.linear import (
    DETACHED,
    AttachedLinear4bit,
    compute_dtype,
    parts_of,
)
from fastlora_kernels.layers.source import function_in, worker
from fastlora_kernels.ops import registered
from fastlora_kernels.ops.glu import Activation, Recomputed, glu, glu_lora_linear
from fastlora_kernels.unneeded import recomputing

GATED = """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
"""
GATED_IN_ONE_LINE = """
def forward(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
"""
GATE_UP = """
def forward(self, hidden_states):
    up_states = self.gate_up_proj(hidden_states)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)
"""


class FusedMlp:
    """What a fused MLP is besides its own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class that can be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *state = reduced
        ours, theirs = type(self).__bases__
        return _new, (ours, theirs), *state


class GatedMlp(FusedMlp):
    """With gate_proj and up_proj."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., K)."""
        gate, up = outputs_of((self.gate_proj, self.up_proj), x)
        return _down(self, self.act_fn, gate, up)


class GateUpMlp(FusedMlp):
    """With both in one projection, gate first."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states (..., K) -> (..., K)."""
        both = self.gate_up_proj(hidden_states)
        return _down(self, self.activation_fn, both, None)  # type: ignore[no-any-return]


def _form(function: ast.FunctionDef | None) -> str:
    """A function's statements and the names of its arguments; "" for None."""
    if function is None:
        return ""
    function.name = "forward"  # whatever unsloth calls it
    return ast.dump(function)


FORMS = {
    _form(function_in(source)): ours
    for source, ours in (
        (GATED, GatedMlp),
        (GATED_IN_ONE_LINE, GatedMlp),
        (GATE_UP, GateUpMlp),
    )
}


@functools.cache
def _fused(ours: type, theirs: type) -> type:
    """One for each class, for whoever compares classes."""
    return type(theirs.__name__, (ours, theirs), {"__module__": theirs.__module__})


def _new(ours: type, theirs: type) -> Any:
    fused: Any = _fused(ours, theirs)
    return fused.__new__(fused)


def fuse_mlps(model: nn.Module) -> list[str]:
    """Fuse every MLP of a known form in `model`. Returns the name of each one's class."""
    found = []
    # Not for good: a class may get another forward, or that call another function.
    form_of = functools.cache(lambda cls: FORMS.get(_form(worker(cls.forward, as_given=True))))
    for module in model.modules():
        unfuse(module)
        if "down_proj" not in module._modules or "forward" in vars(module):
            continue
        cls: Any = type(module)
        ours = form_of(cls)
        act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if ours is not None and activation_of(act) is not None:
            module.__class__ = _fused(ours, cls)
            found.append(cls.__name__)
    return found


def unfuse(module: nn.Module) -> None:
    """Give an MLP its own forward again."""
    if isinstance(module, FusedMlp):
        module.__class__ = type(module).__bases__[1]


def activation_of(module: Any) -> Activation | None:
    """Which function a module of torch or transformers is; None if it is none of ours, or more than it."""
    if not isinstance(module, nn.Module) or hooked(module):
        return None
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get((type(module).__module__, type(module).__name__))


ACTIVATIONS: dict[tuple[str, str], Activation] = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
}


def _down(mlp: Any, act: Any, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """down_proj(act(gate) up), or with up None, of the halves of gate.

    Where torch.compile traces it, by the ops of ops/registered.py, as far as they go (see layers/linear.py).
    """
    compiling = torch.compiler.is_compiling()
    down, activation = mlp.down_proj, activation_of(act)
    if activation is None or not _ours(gate, up):
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        return down(act(gate) * up)  # type: ignore[no-any-return]
    if type(down) in DETACHED and not hooked(down):
        parts = parts_of(down)
        if not isinstance(parts, str) and parts.magnitude is None:
            dtype = compute_dtype(parts, gate)
            projection = parts.projection()
            if dtype is not None and (
                not compiling or registered.serves(parts.weight, parts.dropout)
            ):
                if compiling:
                    y = registered.glu_lora_linear(gate, up, activation, projection, dtype)
                else:
                    how = Recomputed(recomputing.ends_with is mlp, _spent(mlp))
                    y = glu_lora_linear(gate, up, activation, projection, dtype, how)
                    recomputing.note(mlp, y)
                return y.to(gate.dtype) if type(down) is AttachedLinear4bit else y
    return down((registered.glu if compiling else glu)(gate, up, activation))  # type: ignore[no-any-return]


def _spent(mlp: Any) -> bool:
    """Whether down_proj's backward is the last that reads gate and up. No layer saves its own output."""
    made_by = [mlp._modules.get(name) for name in ("gate_proj", "up_proj", "gate_up_proj")]
    return recomputing.inside and not any(one is not None and hooked(one) for one in made_by)


def _ours(gate: torch.Tensor, up: torch.Tensor | None) -> bool:
    """Whether these are plain tensors of one dtype, in floating point of up to 32 bits."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if type(gate) is not torch.Tensor or gate.dtype not in dtypes:
        return False
    if gate.device.type not in ("cpu", "cuda"):
        return False
    return up is None or (
        type(up) is torch.Tensor and up.dtype == gate.dtype and up.shape == gate.shape
    )
