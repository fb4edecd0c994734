"""The loss plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_loss(entries: Sequence[dict[str, Any]], target: Path) -> None:
    """Training and held-out loss over steps, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and looks for a display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                marker="o" if len(points) < 30 else None,
                markersize=3,
            )
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    scratch = target.with_name(f".{target.name}")
    figure.savefig(scratch, dpi=120, format="png")
    scratch.replace(target)
