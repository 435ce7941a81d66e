"""The tables of docs/ablations.md are those of the raw results beside them."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("plotly")
from mmdeform.ablation import RowResult
from mmdeform.ablation.report.markdown import to_markdown
from mmdeform.ablation.report.statistics import summarize

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = sorted((DOCS / "results/ablations").iterdir())
METRICS = ("coco/bbox_mAP", "coco/bbox_mAP_50")


def read_runs(path: Path) -> list[RowResult]:
    with path.open(newline="") as file:
        return [
            RowResult(
                row=line["row"],
                labels={name[5:]: line[name] for name in line if name.startswith("axis/")},
                is_base=line["is_base"] == "True",
                seed=int(line["seed"]),
                status=line["status"],
                metrics={name[7:]: float(line[name]) for name in line
                         if name.startswith("metric/")},
                parameters=int(line["parameters"]),
                macs=int(line["macs"]),
            )
            for line in csv.DictReader(file)
        ]  # fmt: skip


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_results(folder: Path) -> None:
    runs = read_runs(folder / "runs.csv")
    table = [line for line in to_markdown(summarize(runs, METRICS), "").splitlines()
             if line.startswith("|")]  # fmt: skip
    assert "\n".join(table) in (DOCS / "ablations.md").read_text()


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_every_row_has_the_same_three_seeds_or_more(folder: Path) -> None:
    runs = read_runs(folder / "runs.csv")
    assert {run.status for run in runs} == {"finished"}
    seeds = {run.row: [] for run in runs}
    for run in runs:
        seeds[run.row].append(run.seed)
    first, *others = seeds.values()
    assert len(set(first)) >= 3 and all(sorted(other) == sorted(first) for other in others)
    with (folder / "curves.csv").open(newline="") as file:
        last = {(line["row"], int(line["seed"])): float(line["value"])
                for line in csv.DictReader(file) if line["curve"] == METRICS[0]}  # fmt: skip
    assert last == {(run.row, run.seed): run.metrics[METRICS[0]] for run in runs}
