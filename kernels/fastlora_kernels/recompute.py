"""What decoder layers compute again in backward instead of keeping it, layer by layer.

    modes = ["layer"] * 28 + ["attention"] * 2 + ["keep"] * 2
    recompute_layers(model, modes, offload=True)
    keep_layers(model)          # undone

keep       nothing is computed again
attention  the layer, but for attention and the products around it, whose outputs are kept (attention.py)
layer      the whole layer, of which its input is kept

With `keep_dequantized` the matrices that a layer's repetition makes of 4-bit weights stay until its backward has used
them, which then dequantizes none of these: 2 bytes a weight, of one layer at a time (8B: 235 MB of gate and up, 84 of
q, k, v, o).

With `offload` what the latter two keep is in host memory (offload.py), but for the last such layer's input, which
backward needs at once. So of that layer nothing else is kept.

For any model of transformers whose decoder layers are GradientCheckpointingLayers, with PEFT or without; kernels go on
before (`attach`), since an MLP that is recomputed is not one that can be fused. Loss and gradients are those of plain
training to the last bit, dropout included. The last product of a region, down_proj's, is left out where our op makes it
and nothing reads it (unneeded.py).

A region is one autograd function: forward runs without a graph, backward makes it from the inputs and goes through it.
So `torch.autograd.grad` is not possible, nor are outputs other than a tensor or a tuple, nor losses that a model takes
from inside of its layers, as a router's. An exception leaves nothing behind but gradients of some parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from transformers.modeling_layers import GradientCheckpointingLayer

from fastlora_kernels import replay
from fastlora_kernels.attention import OPERATORS, Attention, Give, Keep
from fastlora_kernels.first_order import first_order
from fastlora_kernels.layers.linear import DETACHED
from fastlora_kernels.offload import Lanes, Stash
from fastlora_kernels.ops.lora_linear import LoraLinears
from fastlora_kernels.unneeded import mlp_at_the_end, recomputing

Mode = Literal["keep", "attention", "layer"]
Call = Callable[..., Any]
BEFORE = "_fastlora_recompute"
"""Where a layer's dict has what it had before."""


def recompute_layers(
    model: nn.Module,
    modes: Sequence[Mode],
    *,
    offload: bool = False,
    keep_dequantized: bool = False,
) -> None:
    """Let the decoder layers of `model` recompute as `modes` says, one for each, while they are in training mode.

    `offload`, `keep_dequantized`: see above.
    Raises ValueError: the model has no such layers, or not so many; one has no attention whose outputs could be kept; a
    loss is taken from inside of its layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers that can be recomputed: none is a GradientCheckpointingLayer"
        )
    if len(modes) != len(layers):
        raise ValueError(f"{len(modes)} modes for {len(layers)} layers")
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError(
            "output_router_logits: a loss of the router's would get no gradient through layers that are recomputed"
        )
    if without := [
        place
        for place, (layer, mode) in enumerate(zip(layers, modes, strict=True))
        if mode == "attention" and not isinstance(layer._modules.get("self_attn"), nn.Module)
    ]:
        raise ValueError(f"layer {without[0]} has no self_attn whose outputs could be kept")
    keep_layers(model)
    lanes = Lanes() if offload else None
    again = [place for place, mode in enumerate(modes) if mode != "keep"]
    for place, (layer, mode) in enumerate(zip(layers, modes, strict=True)):
        vars(layer)[BEFORE] = _Before(layer.gradient_checkpointing, vars(layer).get(_FUNCTION))
        # Layers that keep all have a function as well: who sets the flag of every layer then changes nothing.
        function: Call = _plainly
        if mode != "keep":
            to = lanes if place != again[-1] else None
            attention = mode == "attention" and (to is not None or not offload)
            function = Region(
                layer,
                to,
                first=place == again[0],
                attention=attention,
                keep_dequantized=keep_dequantized,
                ahead=lanes,
            )
        if mode == "attention":
            part = layer.self_attn
            part.forward = Attention(part, vars(part).get("forward"))
        setattr(layer, _FUNCTION, function)
        layer.gradient_checkpointing = True


def keep_layers(model: nn.Module) -> None:
    """Undo recompute_layers, if it was called."""
    module: Any
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Attention):
            _set(module, "forward", module.forward.own)
        before = vars(module).pop(BEFORE, None)
        if before is not None:
            module.gradient_checkpointing = before.flag
            _set(module, _FUNCTION, before.function)


class Spared(NamedTuple):
    """What the recomputation of a layer leaves out."""

    linear: list[nn.Module]
    attention: bool


def spared(layer: Any) -> Spared | None:
    """What the last backward did not compute again of `layer`, by what it was given: attention may be by an operator
    that is not kept, or by another one than in forward. None if nothing of it is computed again by us."""
    region = vars(layer).get(_FUNCTION)
    if not isinstance(region, Region):
        return None
    linear = []
    if LoraLinears.__name__ in region.given:
        linear = [part for part in layer.self_attn.modules() if type(part) in DETACHED]
    if region.ends_with is not None:
        linear.append(region.ends_with.down_proj)
    return Spared(linear, not OPERATORS.isdisjoint(region.given))


def decoder_layers(model: nn.Module) -> list[Any]:
    """Those that can be recomputed, in order; of a model that also sees or hears, its language model's."""
    root: Any = model
    for name in ("get_base_model", "get_decoder"):
        root = getattr(root, name)() if hasattr(root, name) else root
    found: list[Any] = []
    inside: set[int] = set()
    for module in root.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    return found


_FUNCTION = "_gradient_checkpointing_func"  # what transformers calls, where the flag is set


class _Before(NamedTuple):
    """What a layer had."""

    flag: bool
    function: Any


def _set(module: Any, name: str, value: Any) -> None:
    """None: it had none of its own."""
    if value is None:
        vars(module).pop(name, None)
    else:
        setattr(module, name, value)


def _plainly(function: Call, *args: Any) -> Any:
    return function(*args)


class Region:
    """A part of a model that backward computes again. `attention`: but for the outputs of an Attention in it;
    `keep_dequantized`: without dequantizing its weights once more."""

    def __init__(
        self,
        module: nn.Module,
        lanes: Lanes | None = None,
        *,
        first: bool = False,
        attention: bool = False,
        keep_dequantized: bool = False,
        ahead: Lanes | None = None,
    ) -> None:
        self.module, self.lanes, self.first = module, lanes, first
        self.attention, self.keep_dequantized = attention, keep_dequantized
        self.ahead = ahead
        """Where what backward wants after it waits, if its own does not."""
        self.random = False
        """Its last forward drew random numbers."""
        self.given: frozenset[str] = frozenset()
        """Operators of its attention that its last backward did not compute again."""
        self._decided = False
        self._ends_with: Any = None
        """The MLP whose output is the region's alone, once known."""

    @torch.compiler.disable
    def __call__(self, function: Any, *args: Any) -> Any:
        """What function(*args) gives. Tensors among the keywords of a partial get their gradients too."""
        if not torch.is_grad_enabled():
            return function(*args)
        keywords: dict[str, Any] = {}
        if isinstance(function, functools.partial) and not function.args:
            function, keywords = function.func, function.keywords
        inputs: list[torch.Tensor] = []
        if args and isinstance(args[0], torch.Tensor):
            inputs.append(args[0])
            args = (_Place(0), *_taken_out(args[1:], inputs))
        else:
            args = _taken_out(args, inputs)
        call = _Call(function, args, _taken_out(keywords, inputs))
        anchor = None
        if not any(x.requires_grad for x in inputs):
            if not any(parameter.requires_grad for parameter in self.module.parameters()):
                return call.on(inputs)
            anchor = torch.empty(0, requires_grad=True)  # so that the outputs will
        return Recomputed.apply(self, call, anchor, *inputs)

    @property
    def ends_with(self) -> Any:
        """The MLP whose output need not be made again. A hook behind it would see what is there instead."""
        mlp = self._ends_with
        if mlp is None or mlp._forward_hooks or self.module._forward_hooks:
            return None
        return mlp

    @contextmanager
    def recomputing(self) -> Iterator[list[tuple[Any, Any]] | None]:
        """What is computed within it is for backward alone. Gives a list for `decide`, where there is to decide."""
        before = dict(vars(recomputing))
        noted: list[tuple[Any, Any]] | None = None if self._decided else []
        recomputing.inside, recomputing.ends_with = True, self.ends_with
        recomputing.keeps_dequantized, recomputing.noted = self.keep_dequantized, noted
        try:
            yield noted
        finally:
            vars(recomputing).clear()
            vars(recomputing).update(before)

    def decide(self, outputs: Sequence[torch.Tensor], noted: list[tuple[Any, Any]]) -> None:
        """Once and for all, from the first whole recomputation in which our op ran."""
        if noted:
            self._decided, self._ends_with = True, mlp_at_the_end(outputs, noted)


class _Place(NamedTuple):
    """Of a tensor that was taken out."""

    among: int


class _Call(NamedTuple):
    """A call without the tensors that autograd is given."""

    function: Call
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def on(self, inputs: Sequence[torch.Tensor]) -> Any:
        return self.function(
            *_put_back(self.args, inputs),
            **{name: _put_back(value, inputs) for name, value in self.keywords.items()},
        )


def _taken_out(value: Any, inputs: list[torch.Tensor]) -> Any:
    """`value` with the place in `inputs` of every tensor that requires a gradient, which are added to them."""
    if isinstance(value, torch.Tensor):
        if not value.requires_grad:
            return value
        inputs.append(value)
        return _Place(len(inputs) - 1)
    if type(value) in (tuple, list):
        return type(value)(_taken_out(one, inputs) for one in value)
    if type(value) is dict:
        return {key: _taken_out(one, inputs) for key, one in value.items()}
    return value


def _put_back(value: Any, inputs: Sequence[torch.Tensor]) -> Any:
    kind = type(value)
    if kind is _Place:
        return inputs[value.among]
    if kind in (tuple, list):
        return kind(_put_back(one, inputs) for one in value)
    if kind is dict:
        return {key: _put_back(one, inputs) for key, one in value.items()}
    return value


class Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, region: Region, call: _Call, anchor: torch.Tensor | None, *inputs: torch.Tensor
    ) -> Any:
        ctx.region, ctx.call, ctx.stash, ctx.before, ctx.entries = region, call, None, None, []
        ctx.set_materialize_grads(False)
        device = inputs[0].device if inputs else torch.device("cpu")
        ctx.autocast = replay.autocast_now(device)
        kept: list[torch.Tensor] = []
        put = kept.append
        if region.lanes is not None and inputs:
            ctx.stash = region.lanes.stash(device, first=region.first)
            put = ctx.stash.put
            put(inputs[0])
        elif region.ahead is not None and not region.first:
            ctx.before = region.ahead.newest(device)
        random = replay.random_now(device, draws=region.random)
        keep = Keep(put) if region.attention else None
        try:
            with nullcontext() if keep is None else keep.around():
                outputs = call.on(inputs)
        finally:
            if ctx.stash is not None:
                ctx.stash.settle()
        if keep is not None:
            ctx.entries = keep.entries
        if random:
            region.random = replay.drawn_since(random)
        ctx.random = random if region.random else []
        if any(on for _, on, _ in ctx.autocast):
            # Weights that it has cast were cast without a graph.
            torch.clear_autocast_cache()
        if not isinstance(outputs, torch.Tensor | tuple):
            raise TypeError(
                f"{type(region.module).__name__} returns a {type(outputs).__name__}; what is recomputed must return a "
                "tensor or a tuple"
            )
        ctx.save_for_backward(*(inputs if ctx.stash is None else inputs[1:]), *kept)
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "torch.autograd.grad() and backward(inputs=...) do not go through layers that are recomputed; call "
                "backward()"
            )
        wanted = ctx.needs_input_grad[3:]
        inputs, kept, before = list(ctx.saved_tensors), [], ctx.before
        if (stash := ctx.stash) is None:
            inputs, kept = inputs[: len(wanted)], inputs[len(wanted) :]
        else:
            first, *kept = stash.fetch()
            inputs.insert(0, first)
            before = stash.before
            del first
        return None, None, None, *_gradients(ctx, inputs, kept, wanted, gradients, before)


def _gradients(
    ctx: Any,
    inputs: list[torch.Tensor],
    kept: list[torch.Tensor],
    wanted: Sequence[bool],
    gradients: Sequence[torch.Tensor | None],
    before: Stash | None,
) -> list[torch.Tensor | None]:
    """Of `inputs`; those of parameters are added to theirs. `kept`: of attention. Both lists are emptied, so that what
    the recomputation alone reads makes room: for the MLP's gradients, and for `before`, which is sent for."""
    region: Region = ctx.region
    found: list[torch.Tensor | None] = [None] * len(inputs)
    give = Give(ctx.entries, kept) if region.attention else None
    with ExitStack() as replayed:
        noted = replayed.enter_context(region.recomputing())
        replayed.enter_context(replay.random_as(ctx.random))
        for context in replay.unlike_now(ctx.autocast):
            replayed.enter_context(context)
        replayed.enter_context(torch.enable_grad())
        if give is not None:
            replayed.enter_context(give.around())
        outputs = ctx.call.on(_entered(inputs, wanted, found))
    inputs.clear()
    kept.clear()
    if before is not None:
        before.send_for()
    if give is not None:
        region.given = give.whole
    made = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    carrying = [
        (output, gradient)
        for output, gradient in zip(made, gradients, strict=True)
        if gradient is not None and output.requires_grad
    ]
    if noted is not None:
        region.decide([output for output, _ in carrying], noted)
    # Places in the graph alone: nobody reads what the outputs are.
    roots = [get_gradient_edge(output) for output, _ in carrying]
    theirs = [gradient for _, gradient in carrying]
    del outputs, made, carrying
    if roots:
        torch.autograd.backward(roots, theirs)
    return found


def _entered(
    inputs: Sequence[torch.Tensor], wanted: Sequence[bool], found: list[torch.Tensor | None]
) -> list[torch.Tensor]:
    """`inputs` as the recomputation takes them; the gradient of each that is wanted comes to its place in `found`."""
    return [
        Entered.apply(x.new_empty(0).requires_grad_(), (x,), found, place) if want else x.detach()
        for place, (x, want) in enumerate(zip(inputs, wanted, strict=True))
    ]


class Entered(torch.autograd.Function):
    """An input of the recomputation. No leaf: it would stay to the end, whether backward reads it or not, and autocast
    remembers what it made of a leaf, so that its gradients would be added up in 16 bits."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, x: tuple[torch.Tensor], found: Any, place: int
    ) -> torch.Tensor:
        ctx.found, ctx.place = found, place
        ctx.set_materialize_grads(False)
        return x[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[None, ...]:
        ctx.found[ctx.place] = gradient
        return None, None, None, None
