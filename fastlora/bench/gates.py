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
TRAJECTORY_BAND = 0.01
"""Of the first arm's loss, at every step. Two engines at equal initialisation stay within 0.0005 over 20
steps of an 8B model; other initial adapters part by 0.02 within 5."""
FALL = 0.005
"""The last fifth of the losses must lie lower than the first fifth by so much of it."""


def gate_work(result: Mapping[str, Any], first: Mapping[str, Any], same_order: bool) -> Gate:
    """The same rows as the first arm's, and, unless one of them packs, in the same order."""
    key = "order" if same_order else "digest"
    same = result[key] == first[key]
    tokens = f"{sum(result['step_tokens']):,} tokens, {sum(result['step_supervised']):,} supervised"
    told = tokens if same else f"fed other rows than the first arm: {tokens}"
    return Gate(name="work", passed=same, detail=f"{told} (digest {result[key]})")


def gate_loss(losses: Sequence[float]) -> Gate:
    bad = [step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss)]
    if bad:
        return Gate(name="loss", passed=False, detail=f"not finite at step {bad[0]}")
    fifth = max(1, len(losses) // 5)
    start, end = sum(losses[:fifth]) / fifth, sum(losses[-fifth:]) / fifth
    return Gate(
        name="loss",
        passed=end < start * (1 - FALL),
        detail=f"{start:.4f} -> {end:.4f}, must fall by {FALL:.1%}",
    )


def gate_gradients(result: Mapping[str, Any]) -> Gate:
    return _none_of(
        "gradients", result["zero_gradients"], result["adapter_tensors"], "have no gradient"
    )


def gate_weights(result: Mapping[str, Any]) -> Gate:
    return _none_of("weights", result["unchanged"], result["adapter_tensors"], "did not change")


def _none_of(name: Any, bad: Sequence[str], total: int, what: str) -> Gate:
    detail = f"{len(bad)} of {total} adapter tensors {what}"
    if bad:
        detail += f", such as {bad[0]}"
    return Gate(name=name, passed=not bad and total > 0, detail=detail)


def gate_parity(
    gradients: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
) -> Gate:
    """Per adapter tensor: |ours - exact| <= 2 |plain - exact| + eps |exact|, in Frobenius norms.

    exact: float32 reference; plain: PEFT in the arm's type. All are float32 on the CPU.
    """
    missing = sorted(set(exact) ^ set(gradients))
    if missing:
        return Gate(
            name="parity",
            passed=False,
            detail=f"{len(missing)} adapter tensors differ from PEFT's, such as {missing[0]}",
        )
    worst, worst_name, wrong = -1.0, "", []
    for name, reference in exact.items():
        size = float(reference.norm())
        error = float((gradients[name] - reference).norm())
        allowed = PARITY_FACTOR * float((plain[name] - reference).norm()) + PARITY_EPSILON * size
        share = error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)
        if not share <= 1:  # so that NaN is wrong
            wrong.append(name)
        if not share <= worst:
            worst, worst_name = share, name
    detail = f"largest error {worst:.2f} of what is allowed ({worst_name}), {len(exact)} tensors"
    if wrong:
        detail = f"{len(wrong)} of {len(exact)} gradients are wrong; {detail}"
    return Gate(name="parity", passed=not wrong, detail=detail)


def gate_trajectory(losses: Sequence[float], first: Sequence[float]) -> Gate:
    """Step by step within the band around the first arm's losses."""
    apart = [abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True)]
    worst = max(
        range(len(apart)), key=lambda step: apart[step] if apart[step] == apart[step] else math.inf
    )
    return Gate(
        name="trajectory",
        passed=all(distance <= TRAJECTORY_BAND for distance in apart),
        detail=f"at most {apart[worst]:.3%} from the first arm's loss (step {worst + 1}), "
        f"allowed {TRAJECTORY_BAND:.0%}",
    )
