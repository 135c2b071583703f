"""The report as a browser has it: it is looked at in Chromium where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from pec_jax.evaluation import charts, figures, report, table
from tests.evaluation.test_figures import steps
from tests.evaluation.test_table import row

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def rows():
    spread = [row(f"Method {i}", i, 15 - i, "012", 0.1 * i) for i in range(17)]
    return table.normalise([row("Base", 0, 20), row("Flow-GRPO", 12, 0.5), *spread])


@pytest.fixture(scope="module")
def page(rows, tmp_path_factory):
    """A report of 19 rows with samples over training, as text."""
    directory = tmp_path_factory.mktemp("grids")

    def grid(name, level):
        path = directory / f"{name}_{level}.png"
        Image.new("RGB", (24, 8), (level, 0, 0)).save(path)
        return path

    grids = {r.label: {s: grid(r.label, 20 * s) for s in (0, 5, 10)} for r in rows}
    trained = {r.label: [] if r.method == "Base" else [steps(), steps()] for r in rows}
    drawn = {
        "quality_diversity": figures.quality_diversity(rows),
        "training_curves": figures.training_curves(trained),
        "reward_entropy": figures.reward_entropy(trained),
    }
    svgs = {name: charts.svg(figure, name, name) for name, figure in drawn.items()}
    return report.write_report(rows, svgs, {**grids, "Base": {0: grid("Base", 0)}}, ["A note."])


def test_it_is_self_contained(page):
    for outside in ("http:", "https:", "<link", "@import", "url(h"):
        assert outside not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:")
    assert "script-src 'sha256-" in policy and "script-src 'unsafe" not in policy


def test_ids_are_unique_and_references_lead_to_them(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert used and {a or b for a, b in used} <= set(ids)


def test_labels_are_text_and_nothing_else():
    names = ["<b>&", "</script><script>alert(1)</script>", '" onload="x', "\x00\x1b[31m", "&lt;"]
    rows = table.normalise([row(name, i, -i) for i, name in enumerate(names)])
    svg = charts.svg(figures.quality_diversity(rows), "q", names[2])
    page = report.write_report(rows, {"q": svg}, {}, names)
    assert page.count("<script") == 2 and "<b>" not in page
    labels = re.search(r'<script type="application/json" id="labels">(.*?)</script>', page)[1]
    assert json.loads(labels) == names
    assert "&lt;/script&gt;" in page and 'onload="x"' not in page


def test_the_table_is_sorted_by_overall(page, rows):
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    found = [
        html.unescape(name) for name in re.findall(r'class="label" data-value="([^"]*)"', body)
    ]
    means = {r.label: r.mean(table.OVERALL) for r in rows}
    assert sorted(means, key=lambda label: -means[label]) == found
    for index, label in re.findall(
        r'<tr data-row="(\d+)"><td class="label" data-value="(.*?)"', body
    ):
        assert rows[int(index)].label == html.unescape(label)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 100])
def test_of_many_steps_some_are_shown(count):
    shown = report._some(list(range(count)))
    assert len(shown) == min(count, report.MOST_STEPS) == len(set(shown))
    assert shown[0] == 0 and shown[-1] == count - 1


def test_panels_say_where_a_point_is():
    """A known point of the data lies where the panel says, in the SVG's own units."""
    figure = figures.quality_diversity(table.normalise([row("a", 0, 1), row("b", 1, 0)]))
    svg = charts.svg(figure, "q", "q")
    (panel,) = json.loads(html.unescape(re.search(r'data-panels="([^"]+)"', svg)[1]))
    marker = re.search(
        r'data-row="1" data-kind="point".*?<use[^>]*? x="([\d.]+)" y="([\d.]+)"', svg, re.S
    )
    for at, (start, end), (low, high), expected in (
        (float(marker[1]), (panel["left"], panel["right"]), panel["x"], 1.0),
        (float(marker[2]), (panel["bottom"], panel["top"]), panel["y"], 0.0),
    ):
        assert low + (at - start) / (end - start) * (high - low) == pytest.approx(
            expected, abs=2e-3
        )


def dump(page, path, *flags):
    """The document after its scripts have run, and what the browser complained of."""
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--virtual-time-budget=3000", f"--user-data-dir={path.parent / 'profile'}", *flags,
         "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, complaints


DRIVER = """{
const found = {};
const [scatter, curves] = document.querySelectorAll("svg[data-panels]");
const inPage = (svg, x, y) => new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
function point(svg, x, y) {
  const at = inPage(svg, x, y);
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: at.x, clientY: at.y, bubbles: true}));
}
const use = scatter.querySelector("[data-row='3'][data-kind=point] use");
point(scatter, Number(use.getAttribute("x")) + 1, Number(use.getAttribute("y")) + 1);
found.tip = document.getElementById("tip").textContent;
found.picked = [...document.querySelectorAll("tr.picked .label")].map((x) => x.textContent);
found.curvesToo = curves.querySelectorAll("[data-row='3'].picked").length;
found.dimmed = getComputedStyle(curves.querySelector("[data-row='4']")).opacity;
scatter.dispatchEvent(new PointerEvent("pointerleave"));
found.left = document.querySelectorAll(".picked").length;
const slider = document.querySelector(".slider input");
slider.value = 1;
slider.dispatchEvent(new Event("input"));
found.said = document.querySelector(".slider output").textContent;
found.steps = [...document.querySelectorAll("figure[data-steps] img:not([hidden])")]
  .map((image) => image.dataset.step);
const sort = (column) => {
  document.querySelectorAll("th button")[column].click();
  return [...document.querySelectorAll("tbody tr .label")].map((x) => x.textContent);
};
found.byQuality = sort(2);
found.byQualityUp = sort(2);
const wide = document.querySelector(".wide");
wide.scrollLeft = 200;
const box = document.querySelector("td.overall").getBoundingClientRect();
found.overallInSight = box.left >= 0 && box.right <= innerWidth;
found.width = document.documentElement.scrollWidth <= innerWidth;
document.body.dataset.found = JSON.stringify(found);
}"""


@needs_browser
def test_it_runs_under_its_own_policy(page, tmp_path):
    _, complaints = dump(page, tmp_path / "report.html")
    assert not complaints
    # Nothing else does: what a label could smuggle in is refused.
    smuggled = page.replace("</body>", "<script>document.body.id = 'mine'</script></body>")
    dom, complaints = dump(smuggled, tmp_path / "smuggled.html")
    assert 'id="mine"' not in dom and "Content Security Policy" in complaints[0]


@needs_browser
@pytest.mark.parametrize("size", ["1300,900", "500,900"])
def test_it_answers(page, rows, tmp_path, size):
    open_page = re.sub(r"script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", page)
    driven = open_page.replace("</body>", f"<script>{DRIVER}</script></body>")
    dom, complaints = dump(driven, tmp_path / "driven.html", f"--window-size={size}")
    assert not complaints
    found = json.loads(html.unescape(re.search(r'data-found="([^"]+)"', dom)[1]))
    quality, diversity = (rows[3].mean(name) for name in (table.QUALITY, table.DIVERSITY))
    name, *numbers = found["tip"].split("\n")
    assert name == rows[3].label and found["picked"] == [name]
    shown = [float(line.rpartition(": ")[2]) for line in numbers]
    np.testing.assert_allclose(shown, [quality, diversity], atol=3e-3)
    assert found["curvesToo"] == 6 * 4  # line, band, label and its leader in each panel
    assert float(found["dimmed"]) < 0.2
    assert found["left"] == 0
    assert found["said"] == "iteration 5" and found["steps"] == ["0", "5", "5"]
    means = {r.label: r.mean(table.QUALITY) for r in rows}
    falling = [means[label] for label in found["byQuality"]]
    assert falling == sorted(falling, reverse=True)
    assert [means[label] for label in found["byQualityUp"]] == sorted(falling)
    assert found["overallInSight"] and found["width"]
