"""The forward of a causal language model of transformers with our loss in it: no logits while it trains.

    reason = attach_head(model)     # None: served
    detach_head(model)

Which models: those whose `forward` in transformers 5 is, statement by statement, the form below (Llama, Mistral,
Qwen, Olmo, SmolLM3, Phi-3, GLM-4 and some fifty more), with softcapped (Gemma 2, 3) or scaled logits (Granite,
Cohere) or neither. It is read from the class's source, so that a model with a loss of another kind, such as that of
an MoE router, or a forward that Liger or Unsloth replaced, is never taken for one of them.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastlora_kernels.layers import fallback, linear
from fastlora_kernels.layers.common import hooked
from fastlora_kernels.layers.source import function_of, without_docstring
from fastlora_kernels.ops.head_loss import Shape, lora_head_loss

Parts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, float]
"""Weight, bias, A, B, scaling: the op's arguments."""

DECORATORS = {"can_return_tuple", "auto_docstring"}
BEFORE = """
outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, \
past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
hidden_states = outputs.last_hidden_state
slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
logits = self.lm_head(hidden_states[:, slice_indices, :])
"""
SHAPES: dict[str, Callable[[Any], Shape]] = {
    "": lambda model: Shape(1.0, None),
    """
if self.config.final_logit_softcapping is not None:
    logits = logits / self.config.final_logit_softcapping
    logits = torch.tanh(logits)
    logits = logits * self.config.final_logit_softcapping
""": lambda model: Shape(1.0, model.config.final_logit_softcapping),
    "logits = logits / self.config.logits_scaling": lambda model: Shape(
        1 / model.config.logits_scaling, None
    ),
    "logits = logits * self.logit_scale": lambda model: Shape(model.logit_scale, None),
}
AFTER = """
loss = None
if labels is not None:
    loss = self.loss_function({arguments}, **kwargs)
return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values, \
hidden_states=outputs.hidden_states, attentions=outputs.attentions)
"""
ARGUMENTS = (
    "logits=logits, labels=labels, vocab_size=self.config.vocab_size",
    "logits, labels, self.vocab_size",
    "logits, labels, vocab_size=self.config.vocab_size",
)


class Backbone(NamedTuple):
    """A model without its output layer."""

    outputs: Callable[..., tuple[torch.Tensor, Any]]
    """(theirs, model, labels, arguments) -> (last hidden states (..., T, K), what else there is of a
    BaseModelOutputWithPast). `theirs` is the class's own forward, `arguments` those it would be given, but for
    labels."""
    shape: Callable[[Any], Shape]
    """How a model makes logits of its output layer's output."""


def attach_head(
    model: nn.Module, *, in_evaluation: bool = False, backbone: Backbone | None = None
) -> str | None:
    """Give `model`, a PeftModel or what is inside one, our loss; the reason if it is not served, or not for now.

    Served are calls with labels in training mode, and in evaluation mode too with `in_evaluation`: the output then has
    the loss, and `logits` is None. With a LoRA adapter on lm_head or without, tied to the embedding or not. Calls
    without labels, with logits_to_keep or return_dict=False, and whatever the op does not do (several adapters on
    lm_head, one that is disabled, merged or has DoRA, dropout in training, a bias; hooks; another loss function) go
    to the class's own forward, looked at on every call. Where that happens in training to a loss that was reported as
    served, a warning says so, as of a layer (see `attach`).

    `backbone`: for a class whose forward is not transformers', and who calls for it knows its way to the hidden states.
    `most_labels=N` in a call: no more than N tokens have a label, and the op need not wait for the device to count.

    The model gets a class of the same name, so that what is saved of it names its architecture as before. To be
    pickled whole, it has to be detached first.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    theirs = vars(type(base)).get("_fastlora_theirs", type(base))
    if "forward" in vars(base):
        return "its forward was replaced"
    if backbone is None:
        shape = _shape_of(theirs.forward)
        if shape is None:
            return f"the forward of {theirs.__name__} has another form"
        backbone = Backbone(_inner_model, shape)
    base.__class__ = _attached(theirs, in_evaluation, backbone)
    found = _parts_of(base, backbone, training=True)
    reason = found if isinstance(found, str) else None
    vars(base)[fallback.REPORTED] = "loss", reason or ""
    fallback.forget()
    return reason


def _inner_model(
    theirs: Any, model: Any, labels: torch.Tensor, given: dict[str, Any]
) -> tuple[torch.Tensor, Any]:
    outputs = model.model(**given)
    return outputs.last_hidden_state, outputs


def detach_head(model: nn.Module) -> None:
    """Give `model` its class's own forward again; also where another wrapper has kept ours."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.__class__ = vars(type(base)).get("_fastlora_theirs", type(base))
    vars(base).pop(fallback.REPORTED, None)


def is_attached(model: nn.Module) -> bool:
    """Whether `model`, a PeftModel or what is inside one, has our loss."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return "_fastlora_theirs" in vars(type(base))


@functools.cache
def _attached(theirs: Any, in_evaluation: bool, backbone: Backbone) -> type:
    names = list(inspect.signature(theirs.forward).parameters)[1:-1]  # but self and **kwargs

    @functools.wraps(theirs.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        most_labels = kwargs.pop("most_labels", None)
        given = dict(zip(names, args, strict=False)) | kwargs
        return_dict = given.pop("return_dict", None)
        if return_dict is None:
            return_dict = self.config.return_dict
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", 0)
        served = (
            isinstance(self, ours)  # a bound method may outlive detach_head
            and labels is not None
            and return_dict
            and isinstance(keep, int)
            and keep == 0
            and (self.training or in_evaluation)
        )
        parts = _parts_of(self, backbone) if served else ""
        if isinstance(parts, str):
            if served:
                fallback.no_loss(self, parts)
            return theirs.forward(self, *args, **kwargs)
        hidden, outputs = backbone.outputs(theirs.forward, self, labels, given)
        shifted = given.get("shift_labels")
        loss = lora_head_loss(
            hidden,
            *parts,
            labels if shifted is None else shifted.view(hidden.shape[:-1]),
            shift=shifted is None,
            num_items=given.get("num_items_in_batch"),
            ignore_index=given.get("ignore_index", -100),
            most_labels=most_labels,
            **backbone.shape(self)._asdict(),
        )
        return CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    names_of = {key: getattr(theirs, key) for key in ("__module__", "__qualname__", "__doc__")}
    ours: Any = type(
        theirs.__name__, (theirs,), {"forward": forward, "_fastlora_theirs": theirs} | names_of
    )
    return ours  # type: ignore[no-any-return]


@functools.cache
def _shape_of(forward: Any) -> Callable[[Any], Shape] | None:
    """How it makes logits of lm_head's output; None if it is not of the form above."""
    function = function_of(forward)
    return None if function is None else _shape_in(function)


def shape_as_written(cls: Any) -> Callable[[Any], Shape] | None:
    """The same of the forward that stands in the file of `cls`, whichever it has by now."""
    try:
        (found,) = ast.parse(inspect.getsource(cls)).body
    except (OSError, TypeError, SyntaxError):
        return None
    functions = [one for one in getattr(found, "body", []) if isinstance(one, ast.FunctionDef)]
    forwards = [one for one in functions if one.name == "forward"]
    return _shape_in(without_docstring(forwards[0])) if len(forwards) == 1 else None


def _shape_in(function: ast.FunctionDef) -> Callable[[Any], Shape] | None:
    if not {ast.unparse(decorator) for decorator in function.decorator_list} <= DECORATORS:
        return None
    lines = [ast.unparse(_Bare().visit(statement)) for statement in function.body]
    before = _lines(BEFORE)
    if lines[: len(before)] != before:
        return None
    for arguments in ARGUMENTS:
        after = _lines(AFTER.replace("{arguments}", arguments))
        if lines[-len(after) :] == after:
            between = lines[len(before) : -len(after)]
            return next((of for text, of in SHAPES.items() if _lines(text) == between), None)
    return None


class _Bare(ast.NodeTransformer):
    """Without annotations: `outputs: BaseModelOutputWithPast = ...`."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return node
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


def _lines(text: str) -> list[str]:
    return [ast.unparse(statement) for statement in ast.parse(text.strip()).body]


def _parts_of(model: Any, backbone: Backbone, training: bool = False) -> Parts | str:
    """The op's arguments as they now are, or why the class's own forward must run."""
    head = model.lm_head
    if hooked(head):
        return "hooks on lm_head"
    down = up = None
    scaling = 0.0
    if type(head) is nn.Linear:
        base = head
    elif (reason := linear.never(head)) is not None:
        return f"lm_head: {reason}"
    else:
        found = linear.parts_of(head, training)
        if isinstance(found, str):
            return f"lm_head: {found}"
        if found.magnitude is not None:
            return "lm_head: DoRA"
        if found.dropout:
            return "lm_head: dropout in training"
        if found.up.bias is not None:
            return "lm_head: bias in the adapter"
        base, down, up, scaling = found.base, found.down.weight, found.up.weight, found.scaling
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter:
        return f"lm_head: base layer is a {type(base).__name__}"
    if backbone.outputs is _inner_model and model.loss_function is not ForCausalLMLoss:
        return "another loss function"  # that transformers' forward would call
    if base.weight.shape[0] != model.config.vocab_size:
        return "lm_head is not of the vocabulary's size"
    device = base.weight.device.type
    if device not in ("cpu", "cuda"):
        return f"device {device}"
    dtypes = {t.dtype for t in (base.weight, base.bias, down, up) if t is not None}
    if not training and len(dtypes) > 1 and not torch.is_autocast_enabled(device):
        return "lm_head: base and adapter differ in dtype"  # PEFT computes in both of them
    return base.weight, base.bias, down, up, scaling
