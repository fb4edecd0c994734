from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import pandas
import pytest
from rich.console import Console

from fastlora.bench.plots import AROUND_BARS_IN, BAR_IN, DPI, WIDTH_IN, loss_plot
from fastlora.bench.report import frame, print_report, write
from fastlora.bench.schema import ArmResult, Frontier, Gate, LedgerEntry, Report, Spread
from fastlora.bench.summary import verdict
from fastlora.bench.tables import arms_table, frontier_table, ledger_table

HOSTILE = "<script>alert(1)</script> [red]$x$ & $y$"
GATES = ("work", "loss", "gradients", "weights", "parity", "trajectory")


def gates(*red: str) -> list[Gate]:
    return [
        Gate.model_validate({"name": name, "passed": name not in red, "detail": f"{name} detail"})
        for name in GATES
    ]


def spread(p50: float) -> Spread:
    return Spread(p20=p50 - 10, p50=p50, p80=p50 + 20)


def measured(arm: str, p50: float, gib: float | None, **more: Any) -> ArmResult:
    return ArmResult(
        arm=arm,
        status="ok",
        gates=gates(),
        tokens_per_s=spread(p50),
        supervised_tokens_per_s=spread(p50 / 2),
        step_s=Spread(p20=1.0, p50=1.5, p80=1.75),
        peak_allocated_gib=gib and gib - 1,
        peak_reserved_gib=gib,
        driver_gib=gib and gib + 1,
        host_gib=gib and gib + 2,
        mfu=0.321,
        hfu=0.432,
        losses=[12.5, 11.25, 10.125],
        **more,
    )


def report(*arms: ArmResult, lengths: str = "full", **more: Any) -> Report:
    fields: dict[str, Any] = {
        "name": "llama-8b",
        "model": "Llama 8B",
        "status": "partial",
        "started": "2026-11-25T10:11:12+00:00",
        "seconds": 1234.5,
        "vram_cap_gib": 24,
        "settings": {
            "recipe": {
                "model": {"name": "/scratch", "quantization": "nf4", "seq_len_tokens": 2048},
                "lora": {"rank": 16, "target_modules": ["q_proj", "v_proj"]},
                "train": {"micro_batch": 2, "accumulation": None, "effective_batch": 8},
            },
            "work": {"steps": 30, "lengths": lengths},
            "weights": "random",
        },
        "environment": {
            "machine": {"gpu": "NVIDIA H200", "gpu_gib": 139.8},
            "driver": "580.95",
            "versions": {"torch": "2.11.0", "peft": "0.21.2"},
            "commit": "abc1234",
            "dirty": True,
            "ceilings": {"gemm_tflops": 731.2, "copy_gb_s": 4123.0},
        },
        "arms": list(arms) or ARMS,
    }
    return Report.model_validate(fields | more)


ARMS = [
    measured("peft", 1000.0, 16.0),
    measured("unsloth", 2000.0, 8.0, notes=[HOSTILE], counted={"digest": "5eed"}),
    ArmResult(
        arm="liger", status="red", gates=gates("parity"), tokens_per_s=spread(7777.0), mfu=0.777,
        peak_reserved_gib=7.77, losses=[12.5, float("nan")],
    ),
    ArmResult(arm="unsloth-offload", status="oom", detail="wanted 2 GiB more"),
]  # fmt: skip
LEDGER = [
    LedgerEntry(
        ingredient="without fused LoRA kernels", arm="unsloth-kernels", base="unsloth",
        tokens_per_s=600.0, base_tokens_per_s=800.0, peak_reserved_gib=8.25,
        base_peak_reserved_gib=7.5,
    )
]  # fmt: skip
FRONTIER = [
    Frontier(arm=arm, axis="seq_len_tokens", fits=fits, fails=fits + 512, tokens_per_s=987.0,
             peak_reserved_gib=23.5)
    for arm, fits in (("peft", 4096), ("unsloth", 65536))
]  # fmt: skip
CPU: dict[str, Any] = {"settings": {}, "environment": {}, "vram_cap_gib": None}


def printed(of: Report, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(of, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_frame_has_a_row_per_arm_and_metric(tmp_path: Path) -> None:
    write(report(), tmp_path)
    rows = pandas.read_csv(tmp_path / "rows.csv")
    assert list(rows.columns) == [
        "suite", "arm", "model", "quantization", "rank", "targets", "micro_batch", "accumulation",
        "seq_len_tokens", "lengths", "metric", "p20", "p50", "p80", "peak_allocated_gib",
        "peak_reserved_gib", "driver_gib", "host_gib", "mfu", "hfu", "gates", "status", "gpu",
        "driver", "versions", "commit", "dirty", "timestamp",
    ]  # fmt: skip
    metrics = ["tokens_per_s", "supervised_tokens_per_s", "step_s"]
    assert list(zip(rows.arm, rows.metric, strict=True)) == [
        *(("peft", metric) for metric in metrics),
        *(("unsloth", metric) for metric in metrics),
        ("liger", "tokens_per_s"),
        ("unsloth-offload", "tokens_per_s"),
    ]
    assert rows.loc[4].to_dict() == {
        "suite": "llama-8b", "arm": "unsloth", "model": "Llama 8B", "quantization": "nf4",
        "rank": 16, "targets": "q_proj v_proj", "micro_batch": 2, "accumulation": 4,
        "seq_len_tokens": 2048, "lengths": "full", "metric": "supervised_tokens_per_s",
        "p20": 990.0, "p50": 1000.0, "p80": 1020.0, "peak_allocated_gib": 7.0,
        "peak_reserved_gib": 8.0, "driver_gib": 9.0, "host_gib": 10.0,
        "mfu": 0.321, "hfu": 0.432,
        "gates": "passed", "status": "ok", "gpu": "NVIDIA H200", "driver": 580.95,
        "versions": "torch=2.11.0 peft=0.21.2", "commit": "abc1234", "dirty": True,
        "timestamp": "2026-11-25T10:11:12+00:00",
    }  # fmt: skip
    figures = ["p20", "p50", "p80", "peak_reserved_gib", "mfu"]
    assert rows.loc[6:, figures].isna().all(axis=None)
    assert list(rows.gates[6:].fillna("")) == ["parity", ""]


def test_a_frame_without_gpu_or_settings_is_empty_there() -> None:
    row = frame(report(measured("peft", 12.0, None), **CPU)).iloc[0]
    assert row[["gpu", "driver", "commit", "rank", "accumulation"]].isna().all()


def test_the_report_reads_back_as_it_was(tmp_path: Path) -> None:
    made = report(ledger=LEDGER, frontier=FRONTIER)
    write(made, tmp_path / "new")
    write(made, tmp_path / "new")
    names = ["memory.png", "report.html", "report.json", "rows.csv", "speed.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    again = Report.model_validate_json((tmp_path / "new" / "report.json").read_text())
    # NaN is not itself, so the texts are compared; and a loss that was NaN is not null.
    assert again.model_dump_json() == made.model_dump_json()
    assert str(again.arms[2].losses[1]) == "nan"


@pytest.mark.parametrize("name", ["speed.png", "memory.png"])
def test_plots_have_a_bar_per_arm(tmp_path: Path, name: str) -> None:
    write(report(name=HOSTILE), tmp_path)
    png = (tmp_path / name).read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    height = (AROUND_BARS_IN + 4 * BAR_IN) * DPI
    assert struct.unpack(">II", png[16:24]) == (int(WIDTH_IN * DPI), int(height))


def test_bars_carry_figures_and_ratios_and_say_why_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("fastlora.bench.plots._png", lambda figure: drawn.append(figure) or b"png")
    write(report(), tmp_path)
    speed, memory, loss = (figure.axes[0] for figure in drawn)
    empty = ["red: parity", "out of memory"]
    assert [text.get_text() for text in speed.texts] == ["1,000  1.00x", "2,000  2.00x", *empty]
    assert [text.get_text() for text in memory.texts] == ["16.00  1.00x", "8.00  0.50x", *empty]
    assert [bar.get_width() for bar in speed.patches] == [1000, 2000, 0, 0]
    assert [bar.get_width() for bar in memory.patches] == [16, 8, 0, 0]
    assert {990, 1020} <= {line.get_xdata()[0] for line in speed.lines}
    assert [line.get_label().split()[0] for line in loss.lines] == ["peft", "unsloth", "liger"]
    assert "12.5000 -> 10.1250" in loss.lines[0].get_label()


def test_a_p50_outside_its_interval_breaks_nothing(tmp_path: Path) -> None:
    outside = [
        measured(arm, 1000.0, 1.0).model_copy(
            update={"tokens_per_s": Spread(p20=p20, p50=1000, p80=p80)}
        )
        for arm, p20, p80 in (("peft", 1010, 1030), ("unsloth", 900, 990))
    ]
    write(report(*outside), tmp_path)
    assert "1,000 [1,010..1,030]" in (tmp_path / "report.html").read_text()


def test_ratios_within_the_noise_are_marked() -> None:
    near = report(
        measured("unsloth", 1000.0, 8.0),
        measured("unsloth-kernels", 1010.0, 8.0),
        measured("unsloth-loss", 700.0, 8.0),
    )
    ledger = [
        LedgerEntry(
            ingredient=arm, arm=arm, base="unsloth", tokens_per_s=speed, base_tokens_per_s=1000.0,
            peak_reserved_gib=8.0, base_peak_reserved_gib=8.0,
        )
        for arm, speed in (("unsloth-kernels", 1010.0), ("unsloth-loss", 700.0))
    ]  # fmt: skip
    table = ledger_table(near.model_copy(update={"ledger": ledger}))
    assert [cells[5] for cells in table.rows] == ["~1.01x", "0.70x"]
    assert table.right[5]
    assert [cells[3] for cells in arms_table(near).rows] == ["1.00x", "~1.01x", "0.70x"]


def test_a_frontier_shows_no_speed_of_unsound_arms_and_no_zero_for_what_was_not_found() -> None:
    def found(arm: str, fits: int, detail: str = "") -> Frontier:
        return Frontier(arm=arm, axis="micro_batch", fits=fits, fails=None, tokens_per_s=987.0,
                        peak_reserved_gib=2.5, detail=detail)  # fmt: skip

    states = ("failed", "timeout", "oom", "red", "interrupted")
    arms = [measured("peft", 1000.0, 8.0)]
    arms += [ArmResult.model_validate({"arm": state, "status": state}) for state in states]
    frontier = [found("peft", 8), *(found(state, 4) for state in states), found("unknown", 4)]
    frontier += [found("late", 0, "timeout: after 900 s"), found("big", 0, "oom: loading")]
    cells = frontier_table(report(*arms, frontier=frontier)).rows
    assert cells[0][2:6] == ["8", "1.00x", "", "987"]
    assert [row[2:6] for row in cells[1:7]] == [["4", "0.50x", "", ""]] * 6
    assert cells[7][2:4] + cells[7][7:] == ["", "", "not found: timeout: after 900 s"]
    assert cells[8][2:4] + cells[8][7:] == ["0", "0.00x", "oom: loading"]


def test_arms_without_losses_or_speeds_still_give_a_folder(tmp_path: Path) -> None:
    failed = report(ArmResult(arm="peft", status="failed", detail="no kernel image"), **CPU)
    assert loss_plot(failed) is None
    write(failed, tmp_path)
    assert "no kernel image" in (tmp_path / "report.html").read_text()


def test_the_page_has_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    made = report(ledger=LEDGER, frontier=FRONTIER)
    write(made, tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in (
        verdict(made), "1,000 [990..1,020]", "2.00x", "0.50x", "8.00", "32.1%", "43.2%", "6 of 6",
        "red: parity", "parity detail", "wanted 2 GiB more", "5eed", "8.25", "0.75x", "1.10x",
        "without fused LoRA kernels",
        "65,536", "66,048", "16.00x", "987", "731.2 TFLOP/s, 4,123 GB/s", "580.95", "torch 2.11.0",
        "abc1234 with changes", "24 GiB", "1,234 s", "&#34;micro_batch&#34;: 2",
        "fastlora bench llama-8b --arms peft,unsloth,liger,unsloth-offload --steps 30 "
        "--lengths full --vram-cap 24GiB --frontier",
    ):  # fmt: skip
        assert text in page, text
    assert not re.search(r"7,777|7\.77", page)  # a red arm's figures
    assert not re.search(r"https?://|<script|<link|@import", page)
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(.{0,22})""", page)
    assert sources == ["data:image/png;base64,"] * 3
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_repeats_the_command_that_was_typed(tmp_path: Path) -> None:
    write(report(settings={"command": "fastlora bench mine.toml --frontier"}), tmp_path)
    assert "fastlora bench mine.toml --frontier<" in (tmp_path / "report.html").read_text()


def test_the_console_shows_every_figure() -> None:
    text = printed(report(ledger=LEDGER, frontier=FRONTIER))
    for figure in (
        "1,000", "[990..1,020]", "2.00x", "0.50x", "8.00", "32.1%", "43.2%", "6 of 6",
        "liger: parity: parity detail", "unsloth-offload: out of memory: wanted 2 GiB more",
        "without fused LoRA kernels", "0.75x", "1.10x", "65,536", "16.00x", "at most 24 GiB",
    ):  # fmt: skip
        assert figure in text, figure
    assert "7,777" not in text
    assert text.splitlines()[-1] == verdict(report())


def test_a_narrow_console_cuts_nothing() -> None:
    text = printed(report(), width=40)
    assert all(cell in text for cell in ("[1,990..2,020]", "red: parity", "43.2%"))
    assert "…" not in text


def test_names_are_not_markup() -> None:
    text = printed(report(measured("[red]x[/red]", 1.0, 1.0), name="[/oops]", model="[b]"))
    assert text.startswith("[/oops]  [b], at most 24 GiB\n")
    assert "\n[red]x[/red] " in text


def test_real_lengths_show_supervised_tokens_first(tmp_path: Path) -> None:
    made = report(lengths="real")
    text = printed(made)
    assert "[490..520]" in text
    assert "1,000" in text  # all tokens beside it
    write(made, tmp_path)
    assert "supervised tokens/s</th>" in (tmp_path / "report.html").read_text()
