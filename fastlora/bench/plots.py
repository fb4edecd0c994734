"""The plots of a report as PNG bytes; an arm has the same colour in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from fastlora.bench.schema import Report, Spread
from fastlora.bench.summary import SPEED_LABELS, Row, headline, rows
from fastlora.bench.tables import gib, number, times

DPI = 150
WIDTH_IN = 7.0
BAR_IN = 0.55
AROUND_BARS_IN = 1.2
# Okabe and Ito's, which stay apart for the colour-blind; the first arm, that the rest is held to, is grey.
COLOURS = (
    "#8c8c8c", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
)  # fmt: skip


def speed_plot(report: Report) -> bytes:
    """Bars of the headline speed with whiskers from p20 to p80."""
    shown = rows(report)
    label = f"{SPEED_LABELS[headline(report)]} (whiskers: steps' p20 to p80)"
    whiskers = [_whiskers(row.speed) if row.speed else (0.0, 0.0) for row in shown]
    values = [row.p50 for row in shown]
    texts = [f"{number(row.p50)}  {times(row.speed_ratio, row.within_noise)}" for row in shown]
    return _bars(report, shown, label, values, texts, whiskers)


def _whiskers(speed: Spread) -> tuple[float, float]:
    """None to a side beyond which p50 lies: it may be total tokens over total seconds."""
    return max(0.0, speed.p50 - speed.p20), max(0.0, speed.p80 - speed.p50)


def memory_plot(report: Report) -> bytes:
    """Bars of peak reserved memory."""
    shown = rows(report)
    values = [row.arm.peak_reserved_gib for row in shown]
    texts = [f"{gib(row.arm.peak_reserved_gib)}  {times(row.memory_ratio)}" for row in shown]
    whiskers = [(0.0, 0.0)] * len(shown)
    return _bars(report, shown, "peak reserved GiB", values, texts, whiskers)


def loss_plot(report: Report) -> bytes | None:
    """Training loss per step of every arm that has one, red arms as well: there it says most."""
    if not any(arm.losses for arm in report.arms):
        return None
    figure, axes = _figure(height_in=3.6)
    for index, arm in enumerate(report.arms):
        if not arm.losses:
            continue
        # Equal work gives equal curves: each is drawn thinner, so that the ones beneath stay in sight.
        width = 1.6 + 1.2 * (len(report.arms) - 1 - index)
        axes.plot(
            range(1, len(arm.losses) + 1),
            arm.losses,
            color=_colour(index),
            linewidth=width,
            label=f"{arm.arm}  {arm.losses[0]:.4f} -> {arm.losses[-1]:.4f}",
        )
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    return _png(figure)


def _bars(
    report: Report,
    shown: Sequence[Row],
    label: str,
    values: Sequence[float | None],
    texts: Sequence[str],
    whiskers: Sequence[tuple[float, float]],
) -> bytes:
    figure, axes = _figure(height_in=AROUND_BARS_IN + BAR_IN * len(shown))
    ends = [(value or 0.0) + high for value, (_, high) in zip(values, whiskers, strict=True)]
    longest = max(ends, default=0.0) or 1.0
    for place, (row, value, text, (low, high)) in enumerate(
        zip(shown, values, texts, whiskers, strict=True)
    ):
        axes.barh(place, value or 0.0, height=0.62, color=_colour(place))
        if value is not None and (low or high):
            axes.errorbar(value, place, xerr=[[low], [high]], color="#222222", capsize=3)
        axes.text(
            ends[place] + 0.015 * longest,
            place,
            row.why_empty if value is None else text,
            va="center",
            color="#222222" if row.sound else "#b00020",
            parse_math=False,
        )
    axes.set_yticks(range(len(shown)), [row.arm.arm for row in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)  # the first arm on top
    axes.set_xlim(0, 1.32 * longest)  # room for the texts
    machine = report.environment.get("machine") or {}
    axes.set_title(
        ", ".join(filter(None, (report.name, machine.get("gpu")))), fontsize=10, parse_math=False
    )
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return _png(figure)


def _figure(height_in: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and looks for a display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(WIDTH_IN, height_in), layout=layout)
    return figure, figure.add_subplot()


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()
