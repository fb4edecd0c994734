"""A model's two ends with a LoRA adapter: the embedding, and the output layer with the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from opbench import Case, Setting, Work
from opbench.modules import drawn, linear_base, with_adapters

Arm = Callable[[], dict[str, Tensor]]


def head_case(group: str, model: str, vocabulary: int, hidden: int) -> Case:
    """The loss of `setting.tokens` tokens with a label each. `floor` is h W^T and g W."""

    def arms(setting: Setting) -> dict[str, Any]:
        found: dict[str, Any] = head_arms(vocabulary, hidden, 1.0, setting, counted=True)
        found["peft"] = found.pop("logits")
        return {name: found[name] for name in ("truth", "floor", "peft", "ours")}

    def work(setting: Setting) -> Work:
        tokens, rank, dtype, *_ = setting
        floor, adapter = 4 * tokens * hidden * vocabulary, rank * (hidden + vocabulary)
        # Logits need not be written. h is read twice and dh written, W read twice.
        moved = (3 * tokens + 2 * vocabulary) * hidden * dtype.itemsize + 3 * 4 * adapter
        return Work(floor + 6 * tokens * adapter, floor, moved)

    return Case(group, "lora_head", model, f"{hidden}x{vocabulary}", "dense", arms, work)


def head_arms(
    vocabulary: int, hidden: int, labelled: float, setting: Setting, *, counted: bool = False
) -> dict[str, Arm]:
    """truth (wider arithmetic), floor, logits, trl where it can, ours: each but floor gives loss, dh and, with an
    adapter (a rank that is not 0), dA and dB; truth and logits the loss of each row as well. `counted`: ours is told
    how many labels there are, as where a micro-batch is recorded, and need not ask."""
    from fastlora_kernels.ops.head_loss import lora_head_loss

    tokens, rank, dtype, device, seed, *_ = setting
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    linear: Any = linear_base(hidden, vocabulary, "dense", setting, generator)
    model: Any = nn.ModuleDict({"lm_head": linear})
    trained: list[Tensor] = []
    if rank:
        trained = [*with_adapters(model, ["lm_head"], "dense", setting, generator).values()]
    layer = model["lm_head"]
    x = drawn(tokens, hidden, std=1.0, setting=setting, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    labels[torch.rand(tokens, device=device, generator=generator) >= labelled] = -100
    items = int((labels != -100).sum())

    def with_gradients(loss: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
        found = (loss.detach(), *torch.autograd.grad(loss, inputs))
        return dict(zip(("loss", "dh", "dA", "dB"), found, strict=False))

    def from_logits(z: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        rows = functional.cross_entropy(z, labels, reduction="none")
        return {"row": rows.detach()} | with_gradients(rows.sum() / items, inputs)

    def truth() -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        inputs = [t.detach().to(wide).requires_grad_() for t in (x, *trained)]
        z = inputs[0] @ linear.weight.to(wide).T
        if trained:
            z = z + 2 * (inputs[0] @ inputs[1].T) @ inputs[2].T
        return from_logits(z, inputs)

    def floor() -> dict[str, Tensor]:
        z = x.detach() @ linear.weight.T
        return {"dh": z @ linear.weight}  # z in place of g, which is as large

    def logits() -> dict[str, Tensor]:
        with setting.autocast():
            z = layer(x)
        return from_logits(z, [x, *trained])

    def trl() -> dict[str, Tensor]:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

        mask, outputs = labels != -100, ("log_probs", "entropy", "is_top1")
        with setting.autocast():
            log_probs, *_ = _ChunkedLogProbFunction.apply(
                x[mask], linear.weight, None, labels[mask], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
            )  # fmt: skip
        return with_gradients(-log_probs.sum() / items, [x])

    def ours() -> dict[str, Tensor]:
        a, b = trained or (None, None)
        more: dict[str, Any] = {"most_labels": items} if counted else {}
        with setting.autocast():
            loss = lora_head_loss(x, linear.weight, None, a, b, 2.0, labels, **more)
        return with_gradients(loss, [x, *trained])

    arms: dict[str, Any] = {"truth": truth, "floor": floor, "logits": logits, "ours": ours}
    if device.type == "cuda" and not rank:
        arms["trl"] = trl
    return arms


def embedding_case(group: str, model: str, vocabulary: int, hidden: int) -> Case:
    """`floor` is the lookup alone: W is frozen, and nothing goes back beyond it."""

    def work(setting: Setting) -> Work:
        tokens, rank, dtype, *_ = setting
        # y = W[ids] + s A^T[ids] B^T; g B, and dB. Rows of W and of A read, y written, g read, dA and dB written.
        moved = 3 * tokens * hidden * dtype.itemsize + 4 * rank * (2 * tokens + vocabulary)
        return Work(6 * tokens * rank * hidden, 0, moved + 2 * 4 * rank * hidden)

    arms = partial(_embedding_arms, vocabulary, hidden)
    return Case(group, "lora_embedding", model, f"{vocabulary}x{hidden}", "dense", arms, work)


def _embedding_arms(vocabulary: int, hidden: int, setting: Setting) -> dict[str, Any]:
    from fastlora_kernels import attach

    tokens, _, dtype, device, seed, *_ = setting
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(drawn, std=1.0, setting=setting, generator=generator)
    base = nn.Embedding(vocabulary, hidden, _weight=random(vocabulary, hidden))
    model: Any = nn.ModuleDict({"embed": base.requires_grad_(False)})
    trained = with_adapters(model, ["embed"], "dense", setting, generator)
    for parameter in trained.values():  # PEFT begins with A at zero
        nn.init.normal_(parameter, std=0.1, generator=generator)
    ids = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    g = random(tokens, hidden)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    left = list(attach(twin).left)

    def with_gradients(y: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(y, inputs, g.to(y.dtype))
        return {"y": y.detach()} | dict(zip(trained, gradients, strict=True))

    def step(model: Any) -> dict[str, Tensor]:
        with setting.autocast():
            y = model["embed"](ids)
        return with_gradients(y, [*trained.values()])

    def truth() -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        a, b = inputs = [p.detach().to(wide).requires_grad_() for p in trained.values()]
        y = functional.embedding(ids, base.weight).to(wide)
        scaling = model["embed"].scaling["default"]
        return with_gradients(y + scaling * functional.embedding(ids, a.T) @ b.T, inputs)

    arms = {
        "truth": truth,
        "floor": lambda: functional.embedding(ids, base.weight),
        "peft": lambda: step(model),
    }
    return arms | ({"left": left[0]} if left else {"ours": lambda: step(twin)})
