"""A run's curves: loss.png, and the plots of its page as inline SVG.

Text in the SVG stays text, and its colours are variables of the page, so that it is light or dark with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.rundir.store import write_atomic

Entries = Sequence[dict[str, Any]]

# As wide as a phone, and drawn 1:1 there.
_SIZE_IN = (5.0, 2.9)
_MOST_POINTS = 800
# matplotlib wants colours; each of these becomes the page's variable of that name.
_VARIABLES = {"#010203": "text", "#020304": "dim", "#030405": "line"} | {
    f"#0a0b0{number}": f"series-{number}" for number in range(1, 7)
}
_TEXT, _DIM, _LINE = (colour for colour in list(_VARIABLES)[:3])
_SERIES = list(_VARIABLES)[3:]
_DASHES = ("-", "--", "-.", ":")


class Curve(NamedTuple):
    label: str
    points: list[tuple[float, float]]
    """(step, value), in order; NaN and infinities left out."""


class Plot(NamedTuple):
    title: str
    """With its unit."""
    svg: str
    words: str
    """What it shows, for who cannot see it."""


def plot_loss(entries: Entries, target: Path) -> None:
    """Training and held-out loss over steps, as a PNG."""
    from io import BytesIO

    from matplotlib.figure import Figure  # no pyplot: it keeps global state and looks for a display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for curve in _curves(entries, {"loss": "training", "eval_loss": "held out"}):
        axes.plot(
            *zip(*curve.points, strict=True),
            label=curve.label,
            marker="o" if len(curve.points) < 30 else None,
            markersize=3,
        )
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_atomic(target, buffer.getvalue())


def plots(entries: Entries) -> list[Plot]:
    """Every plot that the entries of a metrics.jsonl have points for."""
    loss = "(nats per supervised token)"
    by_source, sources = _by_source(entries)
    wanted: list[tuple[str, Entries, dict[str, str]]] = [
        (f"Loss {loss}", entries, {"loss": "training", "eval_loss": "held out"}),
        (f"Held-out loss by source {loss}", by_source, sources),
        ("Learning rate", entries, {"lr": "learning rate"}),
        ("Speed (tokens/s)", entries, {"tokens_per_s": "speed"}),
        ("Peak GPU memory (GiB)", entries,
         {"peak_reserved_gib": "reserved", "peak_allocated_gib": "allocated"}),
        ("Gradient norm before clipping", entries, {"grad_norm": "gradient norm"}),
    ]  # fmt: skip
    drawn = [(title, curves) for title, rows, keys in wanted if (curves := _curves(rows, keys))]
    return [Plot(title, _svg(title, curves), _words(curves)) for title, curves in drawn]


def _by_source(entries: Entries) -> tuple[Entries, dict[str, str]]:
    """The held-out losses of each source, as entries of their own, and how each is called."""
    found = [
        {**losses, "step": entry.get("step")}
        for entry in entries
        if isinstance(losses := entry.get("eval_loss_by_source"), dict)
    ]
    return found, {key: str(key) for entry in found for key in entry if key != "step"}


def _curves(entries: Entries, keys: dict[str, str]) -> list[Curve]:
    curves = []
    for key, label in keys.items():
        points = [
            (float(entry["step"]), float(entry[key]))
            for entry in entries
            if _is_number(entry.get("step")) and _is_number(entry.get(key))
        ]
        if points:
            curves.append(Curve(label, points))
    return curves


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _words(curves: Sequence[Curve]) -> str:
    said = []
    for label, points in curves:
        (first, begin), (last, end) = points[0], points[-1]
        lowest, highest = (f(y for _, y in points) for f in (min, max))
        said.append(
            f"{label}: {begin:.4g} at step {first:g}, {end:.4g} at step {last:g}, "
            f"between {lowest:.4g} and {highest:.4g}"
        )
    return "; ".join(said)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS, each the mean of as many neighbours: a page is to open at once."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _svg(title: str, curves: Sequence[Curve]) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # names inside one SVG must not be those of another in the same page
        "font.size": 10.5,
        "font.family": "sans-serif",
        "text.color": _TEXT,
        "axes.labelcolor": _DIM,
        "axes.edgecolor": _LINE,
        "axes.formatter.limits": (-4, 6),
        "axes.formatter.use_mathtext": False,
        "xtick.color": _DIM,
        "ytick.color": _DIM,
        "grid.color": _LINE,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_SIZE_IN)  # matplotlib's own layouts take as long again as drawing
        figure.subplots_adjust(left=0.145, right=0.98, bottom=0.17, top=0.94)
        axes = figure.add_subplot()
        for number, curve in enumerate(curves):
            points = _thinned(curve.points)
            axes.plot(
                *zip(*points, strict=True),
                color=_SERIES[number % len(_SERIES)],
                linestyle=_DASHES[number % len(_DASHES)],
                linewidth=1.6,
                label=f" {curve.label}",  # a leading _ would hide it
                marker="o" if len(points) < 30 else None,
                markersize=3.5,
            )
        axes.set_xlabel("step")
        axes.grid(linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if len(curves) > 1:
            for text in axes.legend(frameon=False).get_texts():
                text.set_parse_math(False)
        buffer = StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inlined(buffer.getvalue())


def _inlined(svg: str) -> str:
    """As an element of a page: without prologue, fixed size, or ids that another plot has too."""
    head, rest = svg[svg.index("<svg") :].split(">", 1)
    head = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", head)
    svg = f"{head}>{rest}".replace("<svg", '<svg aria-hidden="true"', 1)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page's own
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
