"""The pages in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import bench_reports
import pytest
from PIL import Image
from runs import make_run

from fastlora.bench.report import write
from fastlora.rundir.report import write_report
from fastlora.rundir.store import RunDir

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

pytestmark = pytest.mark.xdist_group("pages")  # one browser

# (text, contrast) of all text that is drawn, WCAG 2.2's 1.4.3.
CONTRASTS = """
() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => numbers(colour).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor, alpha = numbers(colour)[3];
      if (alpha === undefined || alpha === 1) return colour;
    }
    return 'rgb(255, 0, 255)';
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
    if (!text || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const [a, b] = [e.closest('svg') ? style.fill : style.color, behind(e)].map(luminance);
    found.push([text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        try:
            context = playwright.chromium.launch_persistent_context(
                tmp_path_factory.mktemp("profile"),
                executable_path=CHROMIUM,
                headless=True,
                args=list(FLAGS),
            )
        except sync_api.Error as error:  # half installed, or a stub that asks for a snap
            pytest.skip(f"{CHROMIUM} does not start here: {error.message.splitlines()[0]}")
        yield context
        context.close()


@pytest.fixture(scope="module", params=["run", "stopped run", "bench"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    if request.param == "bench":
        write(bench_reports.report(), folder)
        return folder / "report.html"
    more = {"status": "failed", "error": "E" * 300} if request.param == "stopped run" else {}
    return write_report(RunDir.look(make_run(folder / "1", **more)))


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1200, "dark")])
def test_a_page_is_drawn_and_asks_for_nothing(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    tab = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")

    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert said == []
    assert "fastlora" in tab.title()  # and not what a script in an answer would have made of it
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    too_faint = [line for line in tab.evaluate(CONTRASTS) if line[1] < 4.5]
    assert too_faint == []
    shot = Image.open(BytesIO(tab.screenshot(full_page=True))).convert("RGB")
    pictures = [picture.bounding_box() for picture in tab.get_by_role("img").all()]
    assert pictures
    for box in pictures:
        assert box["width"] > 0.8 * min(width, 440)
        assert box["height"] > 80
        place = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
        assert len(shot.crop(place).getcolors(2**24) or []) > 20  # not blank
    corner = sum(shot.getpixel((2, 2))) / 3  # type: ignore[arg-type]
    assert corner > 200 if scheme == "light" else corner < 60
    tab.close()
