from __future__ import annotations

import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from runs import HOSTILE, entries, make_run

from fastlora.cli.main import cli
from fastlora.rundir.curves import plots
from fastlora.rundir.report import write_report
from fastlora.rundir.sections import held_out_losses
from fastlora.rundir.store import RunDir


def page_of(folder: Path) -> str:
    return write_report(RunDir.look(folder)).read_text(encoding="utf-8")


class Text(HTMLParser):
    """What a reader sees, outside the style sheet and what is folded away."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("style", "details", "title"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "details", "title"):
            self.open.remove(tag)

    def handle_data(self, data: str) -> None:
        if not self.open:
            self.seen.append(data)


def seen(page: str) -> str:
    return " ".join(" ".join(Text(page).seen).split())


def test_the_page_has_everything(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "llama31" / "7"))
    text = seen(page)
    for figure in (
        "llama31/7", "finished", "Loss 3.0000 to 0.0750 in 40 steps", "held out 2.2500 to 1.6000;",
        "lora.rank = 32 for 1,150 rows", "12.00 GiB: 11.43 GiB and 10,729 tokens/s predicted",
        "memory.keep_layers = 10 of 28 layers", "tokens 120,130", "median 9,123", "reserved 7.06 GiB", "for 600 s",
        "Loss (nats", "held out", "Held-out loss by source", "cipher", "$general$", "Learning rate",
        "Speed (tokens/s)", "Peak GPU memory (GiB)", "allocated",
        "Say it.", "before " + HOSTILE, "after It.", "expected It.", "As messages",
        "chrf 12.2 88.5", "rouge l 40.0%", "chrf 12.2 to 88.5 of 18 answers",
        "near_duplicate warn 2 rows: nearly the same as another row", "rows.jsonl: line 77",
        "train.lr a rate of 4e-3: it is outside 1e-4..3e-4. Set 2e-4",
        "supervised tokens 6,513 301", "name rows.jsonl format messages rows 1,200 bad rows 1", "It is taught.",
        "kernel fastlora layers 56 of q_proj 28, v_proj 28 kernel PEFT", "why no faster one dropout",
        "logits differ by 0.20% 102.00%", "dtype bfloat16", "same likeliest token 99.80%",
        "model-q8_0.gguf", "NVIDIA H100", "79.2 GiB", "torch 2.11.0", "abc1234def",
    ):  # fmt: skip
        assert figure in text, figure
    assert '<span class="taught">It is taught.</span>' in page
    assert "<dt>train.lr</dt><dd>0.0002</dd>" in page
    assert "&#34;gpu&#34;: &#34;NVIDIA H100&#34;" in page  # the manifest itself
    assert "987654321" not in page
    assert "70707" not in text


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "1", error=HOSTILE, status="failed", recipe_file=HOSTILE))
    assert not re.search(r"https?://|<script|<link|<iframe|@import|\son\w+=|src=", page)
    assert set(re.findall(r"url\((.)|href=\"(.)", page)) <= {("#", ""), ("", "#")}
    assert page.count(escape(HOSTILE, quote=False).split(" &")[0].split('"')[0]) >= 5


def test_plots_are_readable_without_seeing_them_and_do_not_share_ids(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "1"))
    named = re.findall(r'<figure role="img" aria-label="([^"]*)"', page)
    assert len(named) == 6
    assert named[0].startswith(
        "Loss (nats per supervised token). training: 3 at step 1, 0.075 at step 40"
    )
    assert "held out: 2.25 at step 0, 1.6 at step 40" in named[0]
    assert "cipher: 1.5 at step 0" in named[1]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    used = re.findall(r'(?:url\(|href=")#([\w-]+)', page)
    assert set(used) <= set(ids)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg.replace("xlink:", ""))
        assert "#0" not in svg.replace('"#', "").replace("url(#", "")  # every colour is the page's


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "1", metrics=entries(20_000)))
    assert len(page) < 500_000
    assert "0.00015 at step 20000" in page
    assert "in 20,000 steps" in page


def test_a_run_that_failed_says_why_and_how_to_go_on(tmp_path: Path) -> None:
    page = page_of(make_run(
        tmp_path / "1", status="failed", error="RunDirError: the disk is full", result=None,
        metrics=entries(5),
    ))  # fmt: skip
    text = seen(page)
    assert "failed : Loss 3.0000 to 0.6000 in 5 steps" in text
    assert "RunDirError: the disk is full" in text
    assert "Go on with: fastlora run llama31 --resume" in text
    assert "tokens 5,000" in text
    assert 'class="verdict red"' in page


def test_a_run_that_only_began_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"status": "interrupted"}')
    page = page_of(folder)
    assert "interrupted : No step was logged" in seen(page)
    assert "Curves" not in page
    assert 'class="verdict partial"' in page


def test_damaged_files_do_not_keep_the_page_from_being_made(tmp_path: Path) -> None:
    metrics = [
        {"step": 1, "loss": float("nan"), "grad_norm": None},
        {"step": 2, "loss": 2.0, "tokens_per_s": None},
        {"loss": 1.0},
        7,
    ]
    folder = make_run(tmp_path / "1", metrics=metrics, comparison=["x", {"before": None}])  # type: ignore[arg-type]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3, "lo')
    assert "training: 2 at step 2, 2 at step 2" in page_of(folder)
    (folder / "comparison.json").write_text("[{")
    page_of(folder)


def test_half_a_character_in_an_answer(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "1", comparison=[{"prompt": "p", "before": "\ud83d", "after": "b"}]
    )
    assert '<dd class="text">?</dd>' in page_of(folder)


def test_a_resumed_run_shows_where_it_ran_last(tmp_path: Path) -> None:
    later = {
        "at": "2026-11-26T00:00:00+00:00",
        "machine": {"gpu": "NVIDIA H200"},
        "kernels": [{"kind": "q_proj", "count": 1, "kernel": "unsloth fused", "reason": ""}],
    }
    text = seen(page_of(make_run(tmp_path / "1", resumed=[later])))
    assert "NVIDIA H200" in text
    assert "unsloth fused" in text
    assert "PEFT" not in text.partition("Kernels engaged")[2].partition("What the run said")[0]


def test_nothing_to_plot_gives_no_plot() -> None:
    assert plots([]) == []
    assert plots([{"step": 1, "loss": float("nan")}]) == []


def test_the_command_writes_it_again_also_while_the_run_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "1", status="running")
    training = RunDir.open(folder)
    done = CliRunner().invoke(cli, ["report", str(folder), "--json"])
    training.close()
    assert done.exit_code == 0
    written = Path(json.loads(done.output)["report"])
    assert written == folder / "report.html"
    assert "running" in written.read_text()


@pytest.mark.parametrize("content", [None, "{", '"text"'])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "manifest.json").write_text(content)
    done = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert "not a run's folder" in done.output
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("losses", "before", "said"),
    [
        ([9.8], None, "9.8000"),  # and not 9.8000 to 9.8000
        ([3.2], 9.7, "9.7000 to 3.2000"),
        ([2.0, 1.5, 1.9], None, "2.0000 to 1.9000, 1.5000 at best"),
        ([2.0, 1.5], None, "2.0000 to 1.5000"),
        ([1.50001, 1.50002], 2.0, "2.0000 to 1.5000"),
    ],
)
def test_held_out_losses_as_they_went(losses: list[float], before: float | None, said: str) -> None:
    assert held_out_losses(losses, before, " to ") == said
