"""The report in a real browser: headless Chromium lays out a real run's page at the widths of a desk and a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mindprint
from mindprint.reports import write_reports

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "mindprint-core" / "tests"))

from run_samples import TITLES, TOPICS, decisions, manifest, write_lines, write_records

pytestmark = pytest.mark.xdist_group("report page")  # one run makes the page that all of these tests look at

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

MEASURE = """
const view = document.getElementById("view");
view.onload = () => {
  const page = view.contentDocument, root = page.scrollingElement, width = view.contentWindow.innerWidth;
  const boxed = element => element.closest(".scroll");
  const beyond = [...page.querySelectorAll("body *")].filter(
    one => !boxed(one) && one.getBoundingClientRect().right > width + 0.5);
  const overlapping = selector => [...page.querySelectorAll(selector)].some(box => {
    const labels = [...box.children].map(one => one.getBoundingClientRect());
    return labels.some((one, place) => place && labels[place - 1].right > one.left && labels[place - 1].top == one.top);
  });
  document.getElementById("found").textContent = JSON.stringify({
    width, scrollWidth: root.scrollWidth, title: page.title,
    beyond: beyond.map(one => one.outerHTML.slice(0, 80)),
    scripts: page.scripts.length,
    requests: view.contentWindow.performance.getEntriesByType("resource").map(one => one.name),
    charts: [...page.querySelectorAll("svg")].map(one => [one.clientWidth, one.clientHeight]),
    lines: [...page.querySelectorAll(".plot path.line")].map(one => one.getTotalLength()),
    undone: [...page.querySelectorAll(".plot path.undone")].map(one => getComputedStyle(one).strokeDasharray),
    labelsOverlap: overlapping(".below") || overlapping(".marks"),
    smallest: Math.min(...[...page.querySelectorAll("body *")].map(one => parseFloat(getComputedStyle(one).fontSize))),
    background: getComputedStyle(page.body).backgroundColor,
    sides: getComputedStyle(page.querySelector(".sides")).gridTemplateColumns.split(" ").length,
  });
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run that torch trained on the embedded model, with the records of its evaluation beside it."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {"prompt": f"What of the {topic}, {n}?", "completion": "Aye, my dear.", "topic": topic}
        for topic in TOPICS for n in range(4)
    ]  # fmt: skip
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "Yes.", "topic": r["topic"]} for r in rows]
    (folder / "data").mkdir()
    write_lines(folder / "data" / "sft.jsonl", rows)
    write_lines(folder / "data" / "preferences.jsonl", pairs)
    stages = {"sft": {"steps_per_topic": 2}, "dpo": {"steps_per_topic": 2}}
    unmeasured = {"evaluation": {"levels": []}}  # the records beside it say more than so short a run could
    config = {"backend": "torch", "data": {"path": str(folder / "data")}, **stages, **unmeasured}
    run = mindprint.train(config, run=folder / "run").run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    write_lines(run / "metrics.jsonl", [line | ({"rolled_back": True} if line["step"] <= 4 else {}) for line in lines])
    facts = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    (run / "manifest.json").write_text(json.dumps({**facts, "curriculum": manifest()["curriculum"]}), encoding="utf-8")
    write_records(run)
    return write_reports(run)[1].read_text(encoding="utf-8")


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"no browser to look at the report with ({', '.join(BROWSERS)}): apt-get install chromium"
    return found


def laid_out(page: str, width: int, folder: Path, *options: str) -> dict[str, Any]:
    """What Chromium made of the page in a window `width` pixels wide.

    It stands in a frame of that width (headless windows have a least width of their own), without its ban on all
    loading: what it would ask for, it asks for.
    """
    free = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)
    assert free != page
    frame = f'<iframe id="view" width="{width}" height="800" style="border:0" srcdoc="{html.escape(free)}"></iframe>'
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>{frame}<script>{MEASURE}</script>',
        encoding="utf-8",
    )
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *options, "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


def test_a_page_that_does_not_fit_is_seen(page: str, tmp_path: Path) -> None:
    """What the next test relies on: with tables out of their boxes the page is wider than a phone."""
    found = laid_out(page.replace("overflow-x: auto", "overflow-x: visible"), 390, tmp_path)
    assert found["scrollWidth"] > found["width"]


@pytest.mark.parametrize(("width", "sides"), [(1280, 3), (390, 1)])
def test_the_page_fits_the_window(page: str, width: int, sides: int, tmp_path: Path) -> None:
    """Only tables in their boxes are wider than the window, every chart is drawn, and nothing was loaded or run."""
    found = laid_out(page, width, tmp_path)
    assert found["width"] <= width
    assert found["scrollWidth"] <= found["width"]
    assert found["beyond"] == []
    assert (found["scripts"], found["requests"]) == (0, [])
    assert found["title"].startswith("A voice for builtin:tiny")  # no prompt ran as a script
    assert len(found["charts"]) == 3 + 4  # three curves, and the voice of two topics, of all, and of other people
    assert all(across > 0.5 * found["width"] - 120 and down > 20 for across, down in found["charts"])
    assert len(found["lines"]) == 3 + 3 + 3 * 3 and min(found["lines"]) > 10
    assert found["undone"] == ["4px, 3px"] * (1 + 1 + 3)
    assert not found["labelsOverlap"]
    assert found["smallest"] >= 12
    assert found["sides"] == sides


def test_the_page_is_dark_where_the_reader_prefers_dark(page: str, tmp_path: Path) -> None:
    light = laid_out(page, 1280, tmp_path)["background"]
    dark = laid_out(page, 1280, tmp_path, "--blink-settings=preferredColorScheme=0")["background"]
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (light, dark)]
    assert brightness[0] > 230 and brightness[1] < 40


def test_the_figures_of_the_records_are_on_the_page(page: str) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    assert all(title in html.unescape(page) for title in TITLES.values())
    assert "0.83 (0.71 to 0.95)" in text
    assert all(one.why in text for one in decisions())
