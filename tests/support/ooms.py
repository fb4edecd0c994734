"""GPUs that run out of memory at chosen steps of a run, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

PLACES = ("before", "forward", "backward", "last")
"""Before anything of a step; in a layer in the middle of its first forward; in its first backward, when the layer above
has its gradients; and there in its last backward. "none" lets one forward and backward go by."""
SAID = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 4.00 GiB."


class Ooms:
    """`plan`: step -> the places where it runs out of memory, one after the other. `rows`: more do not fit into a
    forward, whatever the step."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        plan: dict[int, list[str]] | None = None,
        *,
        rows: int | None = None,
        effective_batch: int = 8,
        error: type[Exception] = torch.OutOfMemoryError,
        said: str = SAID,
    ) -> None:
        self.plan = {step: list(places) for step, places in (plan or {}).items()}
        self.rows, self.effective_batch, self.error, self.said = rows, effective_batch, error, said
        self.raised: list[tuple[int, str]] = []
        self.done: list[tuple[int, int]] = []
        """(step, rows) of each forward that came to its end."""
        self._armed: tuple[int, str] | None = None
        self._seen, self._hooked, self._model = 0, False, None
        train = Trainer.training_step

        def training_step(
            trainer: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any
        ) -> Any:
            step, count = trainer.state.global_step + 1, len(inputs["labels"])
            self._hook(model)
            if not self.done or self.done[-1][0] != step:
                self._seen = 0
            if self.rows is not None and count > self.rows:
                self._armed = (step, "forward")
            elif places := self.plan.get(step):
                last = self._seen + count == self.effective_batch
                if places[0] == "none":
                    places.pop(0)
                elif places[0] != "last" or last:
                    self._armed = (step, places.pop(0))
            self._reach("before")
            try:
                loss = train(trainer, model, inputs, *rest, **named)
            except Exception:
                self._seen = 0
                raise
            assert self._armed is None
            self._seen += count
            self.done.append((step, count))
            return loss

        monkeypatch.setattr(Trainer, "training_step", training_step)

    def _reach(self, *places: str) -> None:
        if self._armed is not None and self._armed[1] in places:
            self.raised.append(self._armed)
            self._armed, self._seen = None, 0
            raise self.error(self.said)

    def _hook(self, model: Any) -> None:
        if self._model is model:
            return
        self._model = model
        layers = dict(model.named_modules())
        (first,) = (layer for name, layer in layers.items() if name.endswith(".layers.0"))
        (second,) = (layer for name, layer in layers.items() if name.endswith(".layers.1"))
        above = [parameter for parameter in second.parameters() if parameter.requires_grad]
        # Where kernels run gate and up as one, up's output is waiting then.
        second.mlp.up_proj.register_forward_pre_hook(lambda *_: self._reach("forward"))

        def came_back(gradient: torch.Tensor) -> None:
            if self._armed is not None:
                assert all(parameter.grad is not None for parameter in above)
            self._reach("backward", "last")

        def forward(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(came_back)

        first.register_forward_hook(forward)
