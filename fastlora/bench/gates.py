"""What must hold before a speed is shown. Plain functions of what the processes sent back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastlora.bench.schema import Gate

if TYPE_CHECKING:
    import torch

PARITY_FACTOR = 2.0
"""A gradient may be so many times as far from float32's as plain PEFT's in the same type is."""
PARITY_EPSILON = 1e-5
"""And this much of its own size more: what float32 itself leaves open."""
LOSS_EPSILON = 1e-3
"""The same for the loss, a single number, which plain PEFT may meet by luck."""
YARDSTICK = 0.25
"""Plain PEFT itself must be nearer to float32 than so much of a gradient's size, or it measures nothing."""
DEPTH_COSINE, DEPTH_NORM = 0.9, 1.25
"""At full depth the roundings of two engines grow apart; a wrong sign, scale or layer is further away."""
TRAJECTORY_BAND = 0.01
"""Of the first arm's loss, at every step. Two engines at equal initialisation stay within 0.0005 over 20
steps of an 8B model; float32 norms and head part them by 0.01 within 5."""
FALL = 0.001
"""By so much the loss of the first step's rows must be lower after training."""


def gate_work(result: Mapping[str, Any], digest: str, order: str) -> Gate:
    """The rows that were fed are those that were asked for (`digest`), in their order (`order`)."""
    tokens = f"{sum(result['step_tokens']):,} tokens, {sum(result['step_supervised']):,} supervised"
    told = f"{tokens} (digest {result['digest']})"
    if result["digest"] != digest:
        told = f"fed other rows than were asked for ({digest}): {told}"
    elif result["order"] != order:
        told = f"fed the rows in another order: {told}"
    same = (result["digest"], result["order"]) == (digest, order)
    return Gate(name="work", passed=same, detail=told)


def gate_loss(losses: Sequence[float], first_rows_after: float) -> Gate:
    """Finite at every step, and lower after training than before on the first step's rows."""
    bad = [step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss)]
    if bad:
        return Gate(name="loss", passed=False, detail=f"not finite at step {bad[0]}")
    return Gate(
        name="loss",
        passed=first_rows_after < losses[0] * (1 - FALL),
        detail=f"first rows {losses[0]:.4f} -> {first_rows_after:.4f}, must fall by {FALL:.1%}",
    )


def gate_gradients(result: Mapping[str, Any]) -> Gate:
    return _none_of(
        "gradients", result["zero_gradients"], result["adapter_tensors"], "have no gradient"
    )


def gate_weights(result: Mapping[str, Any]) -> Gate:
    return _none_of("weights", result["unchanged"], result["adapter_tensors"], "did not change")


def gate_memory(driver_gib: float, cap_gib: float) -> Gate:
    """The most that the driver counted is within the cap, the CUDA context included."""
    return Gate(
        name="memory",
        passed=driver_gib <= cap_gib,
        detail=f"{driver_gib:.3f} GiB in use at the peak, CUDA context included; the cap is {cap_gib:g}",
    )


def _none_of(name: Any, bad: Sequence[str], total: int, what: str) -> Gate:
    detail = f"{len(bad)} of {total} adapter tensors {what}"
    if bad:
        detail += f", such as {bad[0]}"
    return Gate(name=name, passed=not bad and total > 0, detail=detail)


def gate_parity(
    found: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
) -> Gate:
    """The loss and, per adapter tensor, |ours - exact| <= 2 |plain - exact| + eps |exact|, Frobenius norms.

    Gradients by name, and the loss under "loss". exact: float32 reference; plain: PEFT in the arm's type.
    All are float32 on the CPU.
    """
    missing = sorted(set(exact) ^ set(found))
    if missing or len(exact) < 2:
        such = f", such as {missing[0]}" if missing else ""
        return Gate(
            name="parity",
            passed=False,
            detail=f"{len(missing)} adapter tensors differ from PEFT's{such}; the reference has {len(exact) - 1}",
        )
    worst, worst_name, wrong = -1.0, "", []
    for name, reference in exact.items():
        size = float(reference.norm())
        error, yardstick = (float((each[name] - reference).norm()) for each in (found, plain))
        if not yardstick <= YARDSTICK * size:
            return Gate(
                name="parity",
                passed=False,
                detail=f"plain PEFT is itself {yardstick / size:.0%} off float32 ({name}): nothing to measure by",
            )
        eps = LOSS_EPSILON if name == "loss" else PARITY_EPSILON
        allowed = PARITY_FACTOR * yardstick + eps * size
        share = error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)
        if not share <= 1:  # so that NaN is wrong
            wrong.append(name)
        if not share <= worst:
            worst, worst_name = share, name
    detail = f"largest error {worst:.2f} of what is allowed ({worst_name}), {len(exact) - 1} tensors and the loss"
    if wrong:
        detail = f"{len(wrong)} of {len(exact)} are wrong; {detail}"
    return Gate(name="parity", passed=not wrong, detail=detail)


def gate_depth(found: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor]) -> Gate:
    """Per adapter tensor of the whole model, on a whole micro-batch: the gradient has the direction and the
    size of the first arm's. Parity is stricter, and sees the first layers and short rows alone."""
    if set(found) != set(first):
        return Gate(name="depth", passed=False, detail="other adapter tensors than the first arm's")
    lowest, largest, wrong = 2.0, 1.0, []
    for name, wanted in first.items():
        got, wanted = found[name].float(), wanted.float()
        sizes = float(got.norm()), float(wanted.norm())
        cosine = float((got * wanted).sum()) / max(sizes[0] * sizes[1], 1e-30)
        ratio = max(sizes) / max(min(sizes), 1e-30)
        if not (cosine >= DEPTH_COSINE and ratio <= DEPTH_NORM):
            wrong.append(name)
        lowest, largest = min(lowest, cosine), max(largest, ratio)
    detail = f"cosine {lowest:.4f} or more, sizes within {largest:.3f}x, {len(first)} tensors"
    if wrong:
        detail = f"{len(wrong)} of {len(first)} gradients are not the first arm's, such as {wrong[0]}; {detail}"
    return Gate(name="depth", passed=not wrong, detail=detail)


def gate_trajectory(losses: Sequence[float], first: Sequence[float]) -> Gate:
    """Step by step within the band around the first arm's losses."""
    apart = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(losses, first, strict=True)]
    worst = max(
        range(len(apart)), key=lambda step: apart[step] if apart[step] == apart[step] else math.inf
    )
    return Gate(
        name="trajectory",
        passed=all(distance <= TRAJECTORY_BAND for distance in apart),
        detail=f"at most {apart[worst]:.3%} from the first arm's loss (step {worst + 1}), "
        f"allowed {TRAJECTORY_BAND:.0%}",
    )
