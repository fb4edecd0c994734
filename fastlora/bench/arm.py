"""One arm, in its own process: timed steps on the whole model, then gradients on a cut-down one.

A bare loop (forward, backward, clip, step), because every engine is to be measured and not TRL's trainer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.bench import work as works
from fastlora.bench.flops import flops_per_token
from fastlora.bench.loaded import ArmTask, Loaded
from fastlora.bench.memory import HostPeak, memory
from fastlora.engines.memory import cap_memory, forget_peak, free_memory
from fastlora.errors import EngineError

if TYPE_CHECKING:
    import torch

PARITY_TOKENS = 512
"""Of each row: enough to tell a wrong gradient, little enough to be compared in float32 on a small card."""
PARITY_B_DEVIATION = 0.02


def counted_tokens(batches: Sequence[dict[str, torch.Tensor]]) -> int:
    """Supervised tokens of micro-batches; the first of a row is never predicted."""
    return sum(int((inputs["labels"][:, 1:] >= 0).sum()) for inputs in batches)


def parity_rows(rows: Sequence[works.Row], count: int) -> list[works.Row]:
    """The first `count` rows that have something to learn within PARITY_TOKENS, cut there."""
    cut = ({name: ids[:PARITY_TOKENS] for name, ids in row.items()} for row in rows)
    return list(islice((row for row in cut if max(row["labels"][1:]) >= 0), count))


def parity_step(loaded: Loaded, rows: Sequence[works.Row]) -> dict[str, torch.Tensor]:
    """Gradients by name, and "loss", float32 on the CPU, of one micro-batch with B away from zero and
    without dropout, whose masks no two engines draw alike.

    Raises EngineError: micro-batches were to be recorded and were not."""
    import torch

    dropouts = [module for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropouts:
        module.eval()
    loaded.set_adapter(PARITY_B_DEVIATION)
    collated = loaded.collate(rows)
    labels = counted_tokens([collated])
    inputs, counted = loaded.on_device(collated), torch.tensor(labels, device=loaded.device)
    graphs = loaded.graphs
    # Where micro-batches are recorded, a replay's gradients are those to be judged.
    for _ in range(1 if graphs is None else graphs.warm_ups + 1):
        loaded.zero_gradients()
        loss = loaded.train(inputs, counted, labels)
    # The scale that keeps float16 gradients from vanishing divides out.
    scale = loaded.scaler.get_scale()
    gradients = {
        name: parameter.grad.float().cpu() / scale
        for name, parameter in loaded.adapter()
        if parameter.grad is not None
    }
    if graphs is not None:
        if graphs.why_not:
            raise EngineError(f"+record: not recorded: {graphs.why_not}")
        graphs.drop()
        graphs.calls = graphs.replays = 0
    for _, parameter in loaded.adapter():
        parameter.grad = None
    for module in dropouts:
        module.train()
    return {**gradients, "loss": loss.float().cpu()}


def run_arm(task: ArmTask) -> dict[str, Any]:
    """The timed steps, then the parity step; what gates and report are made from."""
    from safetensors.torch import save_file

    with HostPeak() as host:
        answer, short = _measured(task, host)
    parity = parity_step(task.load_for_parity(), short)
    save_file(parity, task.gradients)
    return answer


def _measured(task: ArmTask, host: HostPeak) -> tuple[dict[str, Any], list[works.Row]]:
    """The answer, and the rows of the parity step; the whole model is gone by then."""
    import torch
    from safetensors.torch import save_file

    rows = works.load(Path(task.rows))
    train = task.recipe.train
    cap_memory(task.vram_cap_gib)
    started = time.perf_counter()
    loaded = task.load()
    load_s = time.perf_counter() - started
    print(  # for the arm's log
        f"loaded in {load_s:.1f} s: imports {loaded.imports_s:.1f}, model and adapter {loaded.weights_s:.1f}",
        file=sys.stderr,
    )
    whole = rows[: task.compared_rows]
    # Two, or packing has no boundary to leak through.
    short = parity_rows(rows, max(2, task.compared_rows))
    if task.arm.packed:
        # In one sequence, and still the gradients of rows apart.
        whole, short = (works.pack(some, sum(map(_length, some))) for some in (whole, short))
        rows = works.pack(rows, task.recipe.model.seq_len_tokens)
    depth = parity_step(loaded, whole)
    del depth["loss"]
    save_file(
        {name: gradient.bfloat16() for name, gradient in depth.items()},
        str(Path(task.gradients).with_suffix(".depth.safetensors")),
    )
    loaded.set_adapter(0.0)
    before = {name: parameter.detach().cpu().clone() for name, parameter in loaded.adapter()}
    steps = works.steps(rows, train.micro_batch, train.accumulation_steps)
    measured = timed_steps(loaded, steps, task.vram_cap_gib)
    first_rows_after = step_loss(loaded, steps[0])
    after = {name: parameter.detach().cpu() for name, parameter in loaded.adapter()}
    unchanged = [name for name, value in after.items() if torch.equal(before[name], value)]
    if (kept := loaded.kept_attention()) is not None:
        loaded.notes.append(f"+attention: not computed again in {kept} layers")
    notes = loaded.notes
    flops = flops_per_token(loaded.model, loaded.recomputed)
    # The copies that the gates take are among it: of the adapter and its gradients, three times their float32.
    host_gib = host.gib(loaded.host_embedding_bytes)
    empty(loaded)
    answer = {
        **measured,
        "host_gib": host_gib,
        "first_rows_after": first_rows_after,
        "adapter_tensors": len(after),
        "unchanged": unchanged,
        "load_s": round(load_s, 1),
        "notes": notes,
        "flops": flops,
    }
    return answer, short


def timed_steps(loaded: Loaded, steps: works.Steps, cap_gib: float | None = None) -> dict[str, Any]:
    """Train on every step within cap_gib of the GPU; seconds, tokens and losses of each, memory at its peak.

    Raises EngineError: micro-batches were to be recorded and were not, or not to the end.
    """
    import torch

    train, cuda = loaded.recipe.train, loaded.device.type == "cuda"
    parameters = [parameter for _, parameter in loaded.adapter()]
    optimizer = make_optimizer(parameters, train.optimizer, train.lr, train.weight_decay)
    scaler, digest = loaded.scaler, works.Digest()
    collated = [[loaded.collate(rows) for rows in step] for step in steps]
    most_labels = max(counted_tokens([inputs]) for batches in collated for inputs in batches)
    losses, seconds, tokens, supervised = [], [], [], []
    if cuda:
        free_memory()  # what loading left behind is not training's
        forget_peak()
    for batches in collated:
        counts = counted_tokens(batches)
        before = digest.tokens
        for inputs in batches:
            digest.add(inputs)
        cap_memory(cap_gib)
        loaded.zero_gradients()  # here, so that the last step's can be looked at
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        counted = torch.tensor(counts, device=loaded.device)
        total = torch.zeros((), device=loaded.device)
        for inputs in batches:
            total += loaded.train(loaded.on_device(inputs), counted, most_labels)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        loaded.stepped()
        losses.append(float(total))  # waits for the GPU
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        tokens.append(digest.tokens - before)
        supervised.append(counts)
    if reason := loaded.not_recorded:
        raise EngineError(f"+record: not recorded: {reason}")
    if loaded.graphs is not None:
        loaded.notes.append(
            f"+record: {loaded.graphs.replays} of {loaded.graphs.calls} micro-batches were replays of "
            f"{loaded.graphs.recorded} graphs"
        )
    return {
        "losses": losses,
        "step_s": seconds,
        "step_tokens": tokens,
        "step_supervised": supervised,
        "fed_tokens": digest.fed,
        "squared_lengths": digest.squared_lengths,
        "digest": digest.value(),
        "order": digest.ordered(),
        "zero_gradients": [
            name
            for name, parameter in loaded.adapter()
            if parameter.grad is None or float(parameter.grad.norm()) == 0
        ],
        **memory(),
    }


def _length(row: works.Row) -> int:
    return len(row["input_ids"])


def step_loss(loaded: Loaded, step: list[list[works.Row]]) -> float:
    """The loss of one step's rows as the adapter now is."""
    import torch

    batches = [loaded.collate(rows) for rows in step]
    counted = torch.tensor(counted_tokens(batches), device=loaded.device)
    with torch.no_grad():
        return sum(float(loaded.loss(loaded.on_device(inputs), counted)) for inputs in batches)


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], name: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    import torch

    if name == "adamw" or not torch.cuda.is_available():
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    import bitsandbytes as bnb

    kind = bnb.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, lr=lr, weight_decay=weight_decay)
    return optimizer


def empty(loaded: Loaded) -> None:
    """Free a model's memory although unsloth keeps hold of its layers for the whole process."""
    import torch

    if loaded.graphs is not None:
        loaded.graphs.drop()

    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.grad = None
    free_memory()
