"""A plan on the console."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from fastlora.plan.advise import Advice
from fastlora.plan.budget import Choice, figures_said, setting_said
from fastlora.plan.predict import Prediction
from fastlora.plan.setup import Setup
from fastlora.plan.working import GIB

_SHOWN_FROM = 0.005  # GiB; smaller terms are summed


def show(
    found: Prediction,
    best: Advice | None,
    singles: list[Advice],
    choice: Choice | None,
    default: Choice | None,
    console: Console,
) -> None:
    """`choice`: within a budget of the whole card; `default`: of a run without one, where all of it is free."""
    _headline(found, console)
    console.print(_memory_table(found))
    _totals(found, console)
    _speed(found, console)
    for note in found.setup.notes:
        console.print(f"[dim]{note}[/]", soft_wrap=True)
    _verdict(found, console)
    if choice and not (default and default.settings == choice.settings):
        _budget(found, choice, console)
    if default and default.filled:
        of_run = f"with so much free and full rows, a run chooses {_chosen(default)}"
        console.print(of_run, highlight=False, soft_wrap=True, markup=False)
    if singles and found.verdict in ("no", "tight"):
        console.print(_changes_table(singles))
    if found.verdict == "no":
        _way_out(best, console)


def _headline(found: Prediction, console: Console) -> None:
    shape, setup = found.shape, found.setup
    console.print(
        f"{shape.model_type}, {shape.parameters / 1e9:.2f} B parameters, {shape.layers} layers; {setup.engine}, "
        f"{setup.quantization}, rank {setup.rank}, {setup.micro_batch} x {setup.row_tokens:,} tokens, "
        f"checkpointing {setup.policy}, loss {setup.loss}{_kept(setup)}",
        highlight=False,
        soft_wrap=True,
    )


def _kept(setup: Setup) -> str:
    counts = {
        "kept whole": 0 if setup.policy == "none" else setup.keep_layers,
        "that keep their attention": setup.keep_attention_layers,
        "streamed": setup.stream_layers,
        "dequantized once a step": setup.dense_layers,
    }
    layers = "".join(f", {count} layers {how}" for how, count in counts.items() if count)
    layers += ", dequantized weights kept" * setup.keep_dequantized
    return layers + ", embedding in host memory" * setup.host_embedding


def _memory_table(found: Prediction) -> Table:
    """The terms at the moment of the peak, and the other moments' totals."""
    mem = found.memory
    table = Table(title=f"GPU memory at its peak: {mem.peak}", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    table.add_column("")
    terms, dominant = mem.moments[mem.peak], mem.dominant()
    for one in sorted(terms, key=lambda one: -one.bytes):
        if one.bytes / GIB >= _SHOWN_FROM:
            most = "  <- most" if one is dominant else ""
            table.add_row(one.name, f"{one.bytes / GIB:.2f}", one.about + most)
    small = sum(one.bytes for one in terms if one.bytes / GIB < _SHOWN_FROM) / GIB
    table.add_row("less than 0.005 each", f"{small:.2f}", "", end_section=True)
    for moment, others in mem.moments.items():
        table.add_row(moment, f"{sum(one.bytes for one in others) / GIB:.2f}", "in all")
    return table


def _totals(found: Prediction, console: Console) -> None:
    mem, fixed = found.memory, found.correction
    console.print(
        f"allocated {mem.allocated_gib:.2f} GiB; reserved {mem.reserved_gib:.2f}, where the card has room; CUDA "
        f"context {mem.context / GIB:.2f}; card {mem.needed_gib:.2f} at least, {mem.comfortable_gib:.2f} with room",
        highlight=False,
        soft_wrap=True,
    )
    host = ", ".join(f"{one.name} {one.bytes / GIB:.1f}" for one in mem.host)
    console.print(f"host {mem.host_gib:.1f} GiB: {host}", highlight=False, soft_wrap=True)
    if fixed.error is not None:
        console.print(
            f"within {fixed.error:.1%} on this GPU over {fixed.runs} runs like it, by which what comes beside weights "
            f"and state is multiplied ({fixed.factor:.3f})",
            highlight=False,
            soft_wrap=True,
        )


def _speed(found: Prediction, console: Console) -> None:
    rate, gpu = found.speed, found.card.gpu
    if rate is None or gpu is None:
        console.print("speed: not known without a GPU; name one with --gpu, e.g. --gpu 'RTX 4090'")
        return
    whole = f"; {time_said(found.seconds)} in all" if found.seconds else ""
    console.print(
        f"speed about {rate.tokens_per_s:,.0f} tokens/s, bound by the {rate.bound_by}; "
        f"{time_said(rate.seconds(1e6))} for a million tokens{whole} "
        f"({gpu.name}, {gpu.tflops:.0f} TFLOP/s: {gpu.source})",
        highlight=False,
        soft_wrap=True,
    )


def time_said(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _verdict(found: Prediction, console: Console) -> None:
    card = found.card
    if card.vram_gib is None:
        console.print("fits? Say into what: --vram 24GiB")
        return
    said = {
        "fits": "[bold green]fits[/]",
        "tight": "[bold yellow]fits, but tightly[/]: slower where the allocator has to give memory back",
        "no": "[bold red]does not fit[/]",
    }[found.verdict]
    host = f" and {card.host_gib:.1f} GiB of the host" if card.host_gib else ""
    console.print(f"{card.vram_gib:.2f} GiB{host}: {said}", highlight=False, soft_wrap=True)


def _budget(found: Prediction, choice: Choice, console: Console) -> None:
    """What memory.vram chose, or would."""
    if found is choice.result:
        for line in choice.lines():
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    elif choice.filled:
        console.print(
            f'memory.vram = "{found.card.vram_gib:.2f}GiB" would choose {_chosen(choice)}',
            highlight=False,
            soft_wrap=True,
        )


def _chosen(choice: Choice) -> str:
    settings = ", ".join(map(setting_said, choice.filled))
    return f"{settings}: {figures_said(choice.result)}"


def _changes_table(singles: list[Advice]) -> Table:
    table = Table(title="What would need less", title_justify="left")
    for name in ("change", "card GiB", "host GiB", "tokens/s", "training", ""):
        table.add_column(name, justify="right" if "GiB" in name or "/" in name else "left")
    for one in singles:
        rate, mem = one.result.speed, one.result.memory
        table.add_row(
            typed(one, " "),
            f"{mem.needed_gib:.2f}",
            f"{mem.host_gib:.1f}",
            f"{rate.tokens_per_s:,.0f}" if rate else "",
            "the same" if one.change.same_training else "another",
            one.result.verdict.replace("no", ""),
        )
    return table


def _way_out(best: Advice | None, console: Console) -> None:
    if best is None:
        console.print(
            "no change that is known here makes it fit; take a smaller model or a larger card"
        )
        return
    rate = best.result.speed
    console.print(
        f"cheapest that fits, {best.result.memory.needed_gib:.2f} GiB"
        + (f" and {rate.tokens_per_s:,.0f} tokens/s" if rate else "")
        + ("" if best.change.same_training else ", another training")
        + f":\n  {typed(best, ' --set ')}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def typed(advice: Advice, before: str) -> str:
    parts = (f"{key}={_toml(value)}" for key, value in advice.change.settings.items())
    return "".join(f"{before}{shlex.quote(part)}" for part in parts).strip()


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
