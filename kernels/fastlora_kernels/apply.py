"""Our op in place of the forward of a PEFT model's LoRA layers.

    attached = attach(model)
    print(attached)     # what is served, what is left to PEFT and why
    detach(model)

A served layer gets another class, and in its dict what was reported of it and the group that it runs in; an MLP of a
known form gets a subclass of its own class. Nothing else: same parameters, same state dict, so that copies, saved
adapters, merging and weights that are moved or replaced all work as before. A copy has no groups until it is attached
itself.

On a model that Unsloth loaded, its fused paths go past the forward of the LoRA layers; what is served there
are the layers that it leaves to PEFT (q and v without k, a base with bias, other architectures).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import nn

from fastlora_kernels.dispatch import read_environment
from fastlora_kernels.layers import embedding, fallback, linear
from fastlora_kernels.layers.group import group_siblings
from fastlora_kernels.layers.mlp import fuse_mlps, unfuse

Kinds = Mapping[str, int]
DETACHED: dict[type, type] = {**linear.DETACHED, **embedding.DETACHED}


@dataclass(frozen=True)
class Attached:
    """What `attach` found, in LoRA layers per kind; a kind is the last part of a name, as q_proj."""

    served: Kinds
    only_autocast: Kinds
    """Of those served: base and adapter differ in dtype, so that PEFT keeps them outside autocast."""
    left: Mapping[str, Kinds]
    """Reason -> kinds that PEFT serves."""
    by_layer: Mapping[str, str]
    """Name of a LoRA layer -> why PEFT serves it, or "" where our op does."""
    groups: Kinds = field(default_factory=dict)
    """Of those served: layers that run together where they are given the same x, as q_proj+k_proj+v_proj."""
    mlps: Kinds = field(default_factory=dict)
    """MLPs whose gated activation is ours, per class."""

    def lines(self) -> Iterator[str]:
        total = _total(self.served) + sum(_total(kinds) for kinds in self.left.values())
        yield f"fastlora serves {_total(self.served)} of {total} LoRA layers{_listed(self.served)}"
        if self.only_autocast:
            yield f"  under autocast only: {_total(self.only_autocast)}{_listed(self.only_autocast)}"
        if self.groups:
            yield f"  in groups on the same x: {_total(self.groups)}{_listed(self.groups)}"
        if self.mlps:
            yield f"  MLPs with the activation fused: {_total(self.mlps)}{_listed(self.mlps)}"
        for reason, kinds in self.left.items():
            yield f"  left to PEFT, {reason}: {_total(kinds)}{_listed(kinds)}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def attach(model: nn.Module) -> Attached:
    """Serve every LoRA layer of `model` that our op can serve; leave the others as they are.

    Served: PEFT's LoRA layers on a plain, frozen `torch.nn.Linear` or a bitsandbytes `Linear4bit` or `Linear8bitLt`,
    one active adapter of rank 256 or less, with bias and dropout if it has them; DoRA on the first two, without the
    bias; no other variant; LoRA on a plain `torch.nn.Embedding`. What can change from call to call is looked at on
    every call, and PEFT's own forward runs where it does not fit: adapters disabled, merged or switched,
    `adapter_names`, hooks, dtypes. Outside autocast, base, adapter and x must be of one dtype: there PEFT computes a
    float32 adapter in float32, and in x's bfloat16 dA and dB would be off by 0.2 %. Dropout draws other masks than
    PEFT's from the same seed. Layers that share an x run together (layers/group.py), and the gated activation of an
    MLP is fused (layers/mlp.py). Where torch.compile traces a layer, ours are ops in its graph (ops/registered.py),
    those that share an x each alone unless their caller takes them together (`layers.group.outputs_of`, and
    `trace_together`); a layer with dropout in training or an 8-bit base stands outside the graph. The loss of a
    language model and an adapter on its output layer are `attach_head`'s (layers/head.py).

    A reason in the report that can pass (a disabled adapter) holds for now and for training. Where PEFT's forward runs
    a layer in training that was reported as served, a warning says so, through the logger "fastlora_kernels", once for
    each reason (layers/fallback.py); not where torch.compile traces it. Nothing says that an adapter was put on layers
    that had none (`add_adapter` with more target modules): these are new layers of PEFT's, and to be attached as well.
    May be called again, for a new report. Not looked at are hooks that torch is given for all modules at once. What
    torch.func transforms and torch.jit traces does not go through a served layer; a backward with create_graph=True
    raises RuntimeError.

    Raises ValueError: FASTLORA_KERNELS names a backend that there is not, or not on this machine.
    """
    read_environment()
    fallback.forget()
    served: Counter[str] = Counter()
    only_autocast: Counter[str] = Counter()
    left: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_layer: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        kind = name.rpartition(".")[2] or type(layer).__name__
        home: Any = embedding if isinstance(layer, Embedding) else linear
        found = home.never(layer)
        if found is None:
            layer.__class__ = home.ATTACHED.get(type(layer), type(layer))
            found = home.parts_of(layer, training=True)
        by_layer[name] = found if isinstance(found, str) else ""
        if type(layer) in DETACHED:
            vars(layer)[fallback.REPORTED] = kind, by_layer[name]
        if isinstance(found, str):
            left[found][kind] += 1
            continue
        served[kind] += 1
        if home.mixed(found):
            only_autocast[kind] += 1
    return Attached(
        dict(served),
        dict(only_autocast),
        {why: dict(kinds) for why, kinds in left.items()},
        by_layer,
        dict(Counter(group_siblings(model))),
        dict(Counter(fuse_mlps(model))),
    )


def detach(model: nn.Module) -> None:
    """Give every layer of `model` PEFT's own forward again."""
    for layer in model.modules():
        if type(layer) in DETACHED:
            layer.__class__ = DETACHED[type(layer)]
            for ours in (linear.GROUP, fallback.REPORTED):
                vars(layer).pop(ours, None)
        unfuse(layer)


def _total(kinds: Kinds) -> int:
    return sum(kinds.values())


def _listed(kinds: Kinds) -> str:
    return f" ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if kinds else ""
