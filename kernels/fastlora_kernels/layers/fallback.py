"""A line in the log, once, where what was reported as served, a layer or the loss, is not after all while it trains.

Its report was read before that, and the results are PEFT's: what changes is the speed, which nobody would look for.
Through `logging`, as of a library; who does not want it sets the level of the logger "fastlora_kernels".
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

LOG = logging.getLogger("fastlora_kernels")
REPORTED = "_fastlora_reported"
"""Where the dict of a layer with our class has its kind, as q_proj, and why `attach` left it to PEFT, or ""; that of a
model with our loss likewise."""
MORE_THAN_X = "called with more than x, as adapter_names"

_said: set[str] = set()


def forget() -> None:
    """Say everything once more: there is a new report."""
    _said.clear()


def unserved(layer: Any, reason: str) -> torch.Tensor | None:
    """No output of ours: PEFT's forward must run, for `reason`."""
    if _trains(layer):
        # Whoever keeps our forward from before `detach` calls it on a layer without.
        kind, reported = vars(layer).get(REPORTED, (type(layer).__name__, ""))
        if reason != reported:
            _say(
                reason,
                "%s: PEFT's own forward runs from now on: %s; attach(model) reports what is served as it now is",
                kind, reason,
            )  # fmt: skip
    return None


def no_loss(model: Any, reason: str) -> None:
    """The loss is not ours: the class's own forward must run, for `reason`."""
    if _trains(model) and reason != vars(model).get(REPORTED, ("", ""))[1]:
        _say(
            reason,
            "loss: the model's own forward runs from now on, which holds all logits: %s; attach_head(model) reports "
            "whether it is served as it now is",
            reason,
        )  # fmt: skip


def ungrouped(layer: Any, names: str) -> None:
    """Its group, of these names, has given up."""
    if _trains(layer):
        _say(
            names,
            "%s: these layers run one by one from now on: they were not called one after the other with the same x; "
            "attach(model) groups them anew",
            names,
        )  # fmt: skip


def no_dtype(x: torch.Tensor, parts: str) -> str:
    """Why there is no one dtype to compute in. `parts`: those that have one, in words."""
    device = x.device.type
    if type(x) not in (torch.Tensor, nn.Parameter) or device not in ("cpu", "cuda"):
        return f"x is a {type(x).__name__} on {device}"
    if torch.is_autocast_enabled(device):
        return "it does not compute in autocast's dtype"
    return f"{parts} are of different dtypes outside autocast"


def _trains(layer: nn.Module) -> bool:
    """What answers or compares is not worth a line, and what torch.compile traces cannot say one."""
    compiling = torch.compiler.is_compiling()
    return not compiling and layer.training and torch.is_grad_enabled()


def _say(what: str, message: str, *words: str) -> None:
    if what not in _said:
        _said.add(what)
        LOG.warning(message, *words)
