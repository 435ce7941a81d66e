"""The report's numbers are what a reader would compute from the runs, and no run is lost."""

import csv
import dataclasses
import math
import statistics
from pathlib import Path

import pytest

pytest.importorskip("plotly")
from mmdeform.ablation.report import write_report
from mmdeform.ablation.report.curves import curve_names, mean_curve
from mmdeform.ablation.report.figure import curves_figure
from mmdeform.ablation.report.markdown import escape
from mmdeform.ablation.report.statistics import describe, summarize
from mmdeform.ablation.results import RowResult

from .runs import AP, ERROR, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "new" / "folder"
    paths = write_report(runs(), out, title="Kernels & *stages*")
    assert sorted(paths) == sorted(out.iterdir())
    return out


def markdown_table(path: Path) -> dict[str, dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_spread_is_the_sample_standard_deviation() -> None:
    found = describe([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.std == pytest.approx(math.sqrt(7 / 3))
    assert found.n == 3


def test_one_value_has_no_spread() -> None:
    assert dataclasses.astuple(describe([0.5])) == (0.5, None, 1, 0)


def test_values_that_are_not_finite_are_counted_apart() -> None:
    assert dataclasses.astuple(describe([math.nan, 2.0, math.inf])) == (2.0, None, 1, 2)
    assert dataclasses.astuple(describe([math.nan])) == (None, None, 0, 1)


def test_differences_are_paired_by_seed() -> None:
    row = {row.row: row for row in summarize(runs()).rows}["wide </script>&|"]
    difference = row.differences[AP]
    # Seeds 0 and 1 are also the base row's; seed 3 is not.
    assert difference.mean == pytest.approx((0.2 + 0.1) / 2)
    assert difference.std == pytest.approx(statistics.stdev([0.2, 0.1]))
    assert difference.n == 2


def test_no_difference_without_a_common_seed() -> None:
    shifted = [dataclasses.replace(run, seed=run.seed + 10 * run.is_base) for run in runs()]
    row = {row.row: row for row in summarize(shifted).rows}["wide </script>&|"]
    assert dataclasses.astuple(row.differences[AP]) == (None, None, 0, 0)


def test_only_finished_runs_count() -> None:
    summary = {row.row: row for row in summarize(runs()).rows}
    assert summary["broken"].metrics[AP].n == 0
    assert summary["broken"].finished == 0
    assert summary["broken"].costs["parameters"].mean == 100e6
    assert summary["base"].finished == 3


def test_markdown_table(folder: Path) -> None:
    rows = markdown_table(folder / "report.md")
    assert f"| --- | --- | --- |{' ---: |' * 9}\n" in (folder / "report.md").read_text()
    assert list(rows) == ["base", r"wide \</script\>\&\|", "single", "diverged", "broken"]
    assert rows["base"][AP] == "0.2000 ± 0.1000"
    assert rows["base"][f"Δ {AP}"] == "base"
    wide = rows[r"wide \</script\>\&\|"]
    assert wide[AP] == "0.4000 ± 0.1732"
    assert wide[f"Δ {AP}"] == "+0.1500 ± 0.0707 (n=2)"
    assert rows["single"][AP] == "0.5000"
    assert rows["single"][f"Δ {AP}"] == "+0.4000"
    assert rows["single"]["latency (ms)"] == "9.00"
    assert rows["diverged"][AP] == "0.1500 (n=1, 1 not finite)"
    assert rows["diverged"][f"Δ {AP}"] == "-0.0500 (n=1, 1 not finite)"
    assert rows["broken"][AP] == "-"
    assert rows["broken"]["finished seeds"] == "0/2"
    assert rows["broken"]["parameters (M)"] == "100.0"
    assert rows["base"]["parameters (M)"] == "9.0"
    assert rows["base"]["MACs (G)"] == "2.500"
    assert rows["base"]["latency (ms)"] == "11.00 ± 1.00"
    assert rows["base"]["peak memory (MiB)"] == "3.000"
    assert rows["single"]["stages"] == "-"


def test_markdown_lists_what_is_not_finished(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert text.startswith("# Kernels \\& \\*stages\\*\n")
    assert "Base row: base." in text
    # A fence that the error's own one does not close.
    fenced = "\n".join(f"  {line}" for line in ["````", *ERROR.splitlines(), "````"])
    assert f"- broken, seed 0: failed\n\n{fenced}\n" in text
    assert "- broken, seed 1: running\n" in text
    assert "not finished" not in _markdown_of_finished(folder)


def _markdown_of_finished(folder: Path) -> str:
    out = folder.parent / "finished"
    finished = [run for run in runs() if run.status == "finished"]
    write_report(finished, out, title="t")
    return (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("a_b", "a_b"), ("_a_", r"\_a\_"), ("a`*b", r"a\`\*b"), ("a\n b", "a b"), ("[x]", r"\[x\]")],
)
def test_markdown_escapes(text: str, escaped: str) -> None:
    assert escape(text) == escaped


def test_runs_csv_gives_the_runs_back(folder: Path) -> None:
    lines = read(folder / "runs.csv")
    assert len(lines) == len(runs())
    for line, run in zip(lines, runs(), strict=True):
        assert (line["row"], line["seed"], line["status"]) == (run.row, str(run.seed), run.status)
        assert line["is_base"] == str(run.is_base)
        assert line["axis/kernel"] == run.labels["kernel"]
        assert line["axis/stages"] == run.labels.get("stages", "")
        assert line["error"] == (run.error or "")
        for name in (AP, "coco/bbox_mAP_50"):
            value = run.metrics.get(name)
            assert line[f"metric/{name}"] == ("" if value is None else repr(value))
        for name in ("parameters", "macs", "latency_ms", "peak_memory_bytes"):
            value = getattr(run, name)
            assert line[name] == ("" if value is None else str(value))


def test_summary_csv(folder: Path) -> None:
    lines = {line["row"]: line for line in read(folder / "summary.csv")}
    wide = lines["wide </script>&|"]
    assert float(wide[f"metric/{AP}/mean"]) == pytest.approx(0.4)
    assert float(wide[f"metric/{AP}/std"]) == pytest.approx(statistics.stdev([0.3, 0.3, 0.6]))
    assert wide[f"metric/{AP}/n"] == "3"
    assert float(wide[f"difference/{AP}/mean"]) == pytest.approx(0.15)
    assert wide[f"difference/{AP}/n"] == "2"
    assert (wide["runs"], wide["finished"], wide["is_base"]) == ("3", "3", "False")
    assert wide["axis/kernel"] == "mdconv"
    assert (lines["broken"]["runs"], lines["broken"]["finished"]) == ("2", "0")
    assert lines["base"][f"difference/{AP}/mean"] == ""
    assert lines["diverged"][f"metric/{AP}/not_finite"] == "1"
    assert float(lines["base"]["latency_ms/std"]) == 1.0
    assert float(lines["base"]["macs/mean"]) == 2.5e9


def test_curves_csv_holds_every_point(folder: Path) -> None:
    lines = read(folder / "curves.csv")
    found = [tuple(line.values()) for line in lines]
    assert ("base", "2", AP, "3", repr(0.3)) in found
    assert ("broken", "0", "loss", "1", "nan") in found
    assert len(found) == sum(len(points) for run in runs() for points in run.curves.values())


def test_curves_are_means_over_the_seeds_that_got_there() -> None:
    summary = summarize(runs(), ["coco/bbox_mAP_50", AP])
    assert curve_names(summary) == [AP, "loss"]
    points = mean_curve(summary.rows[0].runs, AP)
    assert [point.epoch for point in points] == [1, 2, 3]
    assert points[-1].over_seeds.mean == pytest.approx(0.2)
    assert points[-1].over_seeds.std == pytest.approx(0.1)
    resumed = RowResult("a", {}, True, 0, "running", curves={"x": [(1, 5.0), (2, 6.0), (1, 7.0)]})
    other = RowResult("a", {}, True, 1, "failed", curves={"x": [(1, 9.0)]})
    points = mean_curve([other, resumed], "x")
    assert [(p.epoch, p.over_seeds.mean, p.over_seeds.n) for p in points] == [(1, 8, 2), (2, 6, 1)]


def test_curves_come_in_the_order_of_the_metrics_and_of_epochs() -> None:
    late = RowResult("a", {}, True, 0, "finished", {AP: 1.0}, {"loss": [(1, 1.0)], AP: [(2, 1.0)]})
    early = RowResult("a", {}, True, 1, "running", curves={AP: [(1, 3.0), (2, 3.0)]})
    assert curve_names(summarize([late, early])) == [AP, "loss"]
    assert [point.epoch for point in mean_curve([late, early], AP)] == [1, 2]


def test_seeds_are_sorted() -> None:
    row = summarize(runs()[::-1]).rows[-1]
    assert (row.row, [run.seed for run in row.runs]) == ("base", [0, 1, 2])


def test_metrics_are_chosen_and_ordered(tmp_path: Path) -> None:
    write_report(runs(), tmp_path, title="t", metrics=["coco/bbox_mAP_50"])
    base = markdown_table(tmp_path / "report.md")["base"]
    assert "coco/bbox_mAP_50" in base
    assert AP not in base
    assert f"metric/{AP}" in read(tmp_path / "runs.csv")[0]


def test_without_a_base_row_there_are_no_differences(tmp_path: Path) -> None:
    write_report([run for run in runs() if not run.is_base], tmp_path, title="t")
    assert "Δ coco" not in (tmp_path / "report.md").read_text()
    assert "There is no base row." in (tmp_path / "report.md").read_text()


def test_plans_alone_make_a_report(tmp_path: Path) -> None:
    planned = [RowResult("a", {"k": "x"}, True, 0, "planned", parameters=1_000_000)]
    write_report(planned, tmp_path, title="t", metrics=[AP])
    row = markdown_table(tmp_path / "report.md")["a"]
    assert (row[AP], row["parameters (M)"]) == ("-", "1.000")


def change(**changes: object) -> list[RowResult]:
    """The runs with one of the second row's changed."""
    return [dataclasses.replace(run, **changes) if i == 4 else run for i, run in enumerate(runs())]


@pytest.mark.parametrize(
    ("results", "metrics", "message"),
    [
        ([], None, "at least one run"),
        (change(seed=0), None, "a seed comes twice"),
        (change(labels={"kernel": "other"}), None, "equal labels"),
        (change(status="done"), None, "got 'done'"),
        (change(row="second", is_base=True), None, "one base row, got base, second"),
        (runs(), ["bbox_mAP"], f"no finished run has 'bbox_mAP'; known: {AP}"),
    ],
)
def test_contradictions_are_refused(
    results: list[RowResult], metrics: list[str] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(results, tmp_path / "out", title="t", metrics=metrics)
    assert not (tmp_path / "out").exists()


def test_picture_of_the_curves(folder: Path) -> None:
    metrics = [AP]
    axes = curves_figure(summarize(runs(), metrics)).axes
    assert [axis.get_title() for axis in axes] == metrics
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    assert list(lines) == [row.row for row in summarize(runs()).rows]
    assert lines["base"].get_xydata().tolist() == [
        [1, pytest.approx(0.05)], [2, pytest.approx(0.1)], [3, pytest.approx(0.2)],
    ]  # fmt: skip
    band = axes[0].collections[0].get_paths()[0].get_extents()
    assert band.intervaly.tolist() == pytest.approx([0.05 - 0.025, 0.2 + 0.1])
    assert len(lines["diverged"].get_xdata()) == 3  # without the seed that is NaN
    assert len(lines["broken"].get_xdata()) == 0
    assert "![learning curves](curves.png)" in (folder / "report.md").read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_picture_leaves_out_what_is_nan() -> None:
    points = [(1, math.nan), (2, 0.5)]
    nans = [dataclasses.replace(run, curves={AP: points}) for run in runs()]
    axis = curves_figure(summarize(nans, [AP])).axes[0]
    assert axis.get_lines()[0].get_xydata().tolist() == [[2, 0.5]]


def test_no_picture_without_curves(tmp_path: Path) -> None:
    plain = [dataclasses.replace(run, curves={}) for run in runs()]
    (tmp_path / "curves.png").write_text("of an earlier report")
    paths = write_report(plain, tmp_path, title="No curves")
    assert "curves.png" not in [path.name for path in paths]
    assert not (tmp_path / "curves.png").exists()
    assert "learning curves" not in (tmp_path / "report.md").read_text()
