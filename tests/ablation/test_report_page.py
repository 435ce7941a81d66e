"""The page, read back from a browser without a network: numbers, sorting, curves."""

import re
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")
from mmdeform.ablation.report import write_report
from mmdeform.ablation.results import RowResult

from .browser import dump, evaluate, table
from .runs import AP, ERROR, runs

TITLE = "Kernels {{table}} <script>alert(1)</script> & stages"
WIDE = "wide </script>&|"
# Clicks, then draws each curve; what it returns is what a user then has before them.
SCRIPT = """
const heads = [...document.querySelectorAll("#rows thead th")];
const button = (title) => heads.find((head) => head.dataset.key === title).querySelector("button");
const order = (title) => {
  if (title) button(title).click();
  const rows = [...document.querySelectorAll("#rows tbody tr")];
  return [rows.map((row) => row.cells[0].textContent), decodeURIComponent(location.hash)];
};
const plot = document.getElementById("plot");
const select = document.getElementById("curve");
const drawn = (index) => {
  select.selectedIndex = index;
  select.dispatchEvent(new Event("change"));
  return {
    name: select.value,
    axis: plot.layout.yaxis.title.text,
    traces: plot.data.map(({ x, y, name, showlegend, line, customdata }) =>
      ({ x, y, name, showlegend, color: line.color, customdata })),
  };
};
const wait = () => new Promise((resolve) => setTimeout(resolve, 300));
const found = {
  clicks: [order(), order("parameters (M)"), order("parameters (M)"), order("row"), order("row")],
  sorted: heads.filter((head) => head.ariaSort).map((head) => head.dataset.key),
  focus: (button("row").focus(), document.activeElement === button("row")),
  curves: [...select.options].map((_, index) => drawn(index)),
  legend: [...plot.querySelectorAll(".legendtext")].map((text) => text.textContent),
  lines: plot.querySelectorAll(".scatterlayer .js-line").length,
  fills: plot.querySelectorAll(".scatterlayer .js-fill").length,
  buttons: [...plot.querySelectorAll(".modebar-btn")].map((button) => button.dataset.title),
  requests: performance.getEntriesByType("resource").map(({ name }) => name),
  refused: [...refused],
};
new Image().src = "http://localhost:9/picture";
location.hash = "#sort=kernel";
await wait();
return { ...found, tried: refused.slice(found.refused.length), address: order()[0] };
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(runs(), out, title=TITLE, metrics=[AP])
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    return folder / "report.html"


@pytest.fixture(scope="module")
def best_first(page: Path, folder: Path) -> str:
    """The page as it comes, opened with an address that sorts it."""
    return dump(page, folder, "sort=" + urllib.parse.quote(f"-{AP}", safe=""))


@pytest.fixture(scope="module")
def used(page: Path, folder: Path) -> dict[str, Any]:
    return evaluate(page, folder, SCRIPT)


def test_numbers_can_be_read_back(best_first: str) -> None:
    rows = {row["row"]: row for row in table(best_first)}
    assert rows[WIDE] == {
        "row": WIDE,
        "kernel": "mdconv",
        "stages": "c5",
        "finished seeds": "3/3",
        AP: "0.4000 ± 0.1732",
        f"Δ {AP}": "+0.1500 ± 0.0707 (n=2)",
        "parameters (M)": "10.0",
        "MACs (G)": "2.500",
        "latency (ms)": "11.33 ± 1.53",
        "peak memory (MiB)": "3.000",
    }
    assert rows["base"][AP] == "0.2000 ± 0.1000"
    assert rows["base"][f"Δ {AP}"] == "base"
    assert rows["single"][AP] == "0.5000"
    assert rows["diverged"][AP] == "0.1500 (n=1, 1 not finite)"
    assert rows["broken"][AP] == "-"


def test_address_sorts(best_first: str) -> None:
    found = [row["row"] for row in table(best_first)]
    assert found == ["single", WIDE, "base", "diverged", "broken"]
    assert re.findall(r'data-key="([^"]*)" aria-sort="(\w+)"', best_first) == [(AP, "descending")]


def test_rows_are_marked(best_first: str) -> None:
    assert '<tr class="base" data-row="base">' in best_first
    broken = best_first.split('<tr class="unfinished" data-row="broken">')[1].split("</tr>")[0]
    # What has no value sorts last: metric, difference, MACs, latency, memory.
    assert broken.count('class="number" data-value="">-</td>') == 5


def test_names_are_text(best_first: str) -> None:
    escaped = "Kernels {{table}} &lt;script&gt;alert(1)&lt;/script&gt; &amp; stages"
    assert f"<h1>{escaped}</h1>" in best_first
    assert f"<title>{escaped}</title>" in best_first
    assert "</script>&" not in best_first.split('<script type="application/json"')[0]


def test_what_is_not_finished_is_listed(best_first: str) -> None:
    section = best_first.split('<section id="unfinished">')[1].split("</section>")[0]
    error = ERROR.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<b>broken</b>, seed 0: failed<pre>{error}</pre>" in section
    assert "<b>broken</b>, seed 1: running</li>" in section


def test_clicks_sort_numbers_as_numbers(used: dict[str, Any]) -> None:
    rows = ["base", WIDE, "single", "diverged", "broken"]
    assert used["clicks"] == [
        [rows, ""],
        [rows[::-1], "#sort=-parameters (M)"],
        [rows, "#sort=parameters (M)"],  # 9, 10, 11, 12, 100
        [sorted(rows), "#sort=row"],
        [sorted(rows, reverse=True), "#sort=-row"],
    ]

    assert used["sorted"] == ["row"]


def test_a_new_address_sorts(used: dict[str, Any]) -> None:
    # conv, dcnv3, dcnv4, dconv, mdconv
    assert used["address"] == ["base", "single", "diverged", "broken", WIDE]


def test_titles_take_the_keyboard(used: dict[str, Any]) -> None:
    assert used["focus"]


def test_curves_are_drawn_with_bands(used: dict[str, Any]) -> None:
    first, loss = used["curves"]
    assert first["name"] == first["axis"] == AP
    assert loss["name"] == "loss"
    names = ["base", "wide &lt;/script&gt;&amp;|", "single", "diverged"]
    assert [trace["name"] for trace in first["traces"][2::3]] == names
    low, high, mean = first["traces"][:3]
    assert mean["x"] == [1, 2, 3]
    assert mean["y"] == pytest.approx([0.05, 0.1, 0.2])
    assert low["y"] == pytest.approx([0.025, 0.05, 0.1])
    assert high["y"] == pytest.approx([0.075, 0.15, 0.3])
    assert [n for n, _ in mean["customdata"]] == [3, 3, 3]
    # The one value of a row that has no other, and NaN, which is nothing.
    assert first["traces"][6]["y"] == first["traces"][8]["y"] == [0.125, 0.25, 0.5]
    assert [trace["y"] for trace in loss["traces"][-3:]] == [[None]] * 3
    assert len({trace["color"] for trace in loss["traces"][2::3]}) == 5
    # The last curve drawn: what is seen.
    assert used["legend"] == ["base", WIDE, "single", "diverged", "broken"]
    assert used["lines"] >= 4
    assert used["fills"] >= 4


def test_nothing_is_fetched(page: Path, used: dict[str, Any]) -> None:
    assert used["requests"] == []
    assert used["refused"] == []
    assert not [button for button in used["buttons"] if "Share" in button]
    text = page.read_text("utf-8")
    assert '"Content-Security-Policy" content="default-src \'none\';' in text
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(src|href)=|@import|url\(", own)


def test_the_policy_refuses_requests(used: dict[str, Any]) -> None:
    assert used["tried"] == ["http://localhost:9/picture"]


def test_without_curves_there_is_no_plot(tmp_path: Path) -> None:
    write_report([RowResult("a", {}, True, 0, "planned")], tmp_path, title="t")
    hidden = "return [document.getElementById('curves').hidden, refused];"
    assert evaluate(tmp_path / "report.html", tmp_path, hidden) == [True, []]
