"""What an ablation keeps, and what it does not mix."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mmengine")
from mmengine import Config

from mmdeform.ablation import Cost, Store, plan_rows, with_costs
from mmdeform.ablation.store import known_costs

from .small import small_spec, small_store


def test_writes_a_config_for_each_run(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    names = [f"{row['name']}/{seed}" for row, seed, _ in store.runs()]
    assert names == ["one/0", "two/0", "one/1", "two/1"]
    for row, seed, run in store.runs():
        cfg = Config.fromfile(run.config)
        assert cfg.randomness.seed == seed
        assert cfg.model.depth == dict(one=1, two=2)[row["name"]]
        assert run.status() == dict(status="planned")


def test_results_before_anything_was_trained(tmp_path: Path) -> None:
    results = small_store(tmp_path).results()
    assert [(r.row, r.seed, r.is_base) for r in results] == [
        ("one", 0, True), ("one", 1, True), ("two", 0, False), ("two", 1, False),
    ]  # fmt: skip
    assert results[2].labels == dict(depth="two")
    assert {(r.status, r.error, r.parameters) for r in results} == {("planned", None, None)}


def test_curves_count_repeated_steps_once(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    run = store.path / "one/seed_0/train"
    logs = {
        "1": [
            dict(lr=0.1, loss=4.0, loss_cls=1.0, epoch=1, step=1),
            dict(lr=0.1, loss=2.0, loss_cls=1.0, epoch=1, step=2),
            {"coco/bbox_mAP": 0.1, "time": 1.0, "data_time": 0.0, "step": 1},
            dict(lr=0.1, loss=9.0, loss_cls=1.0, epoch=2, step=3),
        ],
        "2": [
            dict(lr=0.1, loss=1.0, loss_cls=1.0, epoch=2, step=3),
            dict(lr=0.1, loss=0.0, loss_cls=1.0, epoch=2, step=4),
            {"coco/bbox_mAP": 0.3, "coco/bbox_mAP_50": 0.5, "time": 1.0, "step": 2},
        ],
    }
    for name, records in logs.items():
        folder = run / name / "vis_data"
        folder.mkdir(parents=True)
        lines = "\n".join(map(json.dumps, records))
        (folder / "scalars.json").write_text(lines + "\n")
    result = store.results()[0]
    assert result.metrics == {"coco/bbox_mAP": 0.3, "coco/bbox_mAP_50": 0.5}
    assert result.curves == {
        "coco/bbox_mAP": [(1, 0.1), (2, 0.3)],
        "coco/bbox_mAP_50": [(2, 0.5)],
        "loss": [(1, 3.0), (2, 0.5)],
        "loss_cls": [(1, 1.0), (2, 1.0)],
    }


def test_grows_but_does_not_change(tmp_path: Path) -> None:
    small_store(tmp_path)
    first = tmp_path / "work/one/seed_0"
    before = (first / "config.py").read_text()
    (first / "status.json").write_text('{"status": "finished", "error": null}')
    values = {"one": {}, "two": {"model.depth": 2}, "three": {"model.depth": 3}}
    grown = small_store(tmp_path, seeds=[0, 5], axes=dict(depth=values))
    assert len(list(grown.runs())) == 6
    assert (first / "config.py").read_text() == before
    assert grown.results()[0].status == "finished"

    values["two"] = {"model.depth": 7}
    with pytest.raises(ValueError, match=r"holds other configs of two: give the changed"):
        small_store(tmp_path, axes=dict(depth=values))
    assert Config.fromfile(tmp_path / "work/two/seed_0/config.py").model.depth == 2
    assert len(list(Store(tmp_path / "work").runs())) == 6


def test_a_run_that_was_removed_is_planned_again(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    run = next(iter(store.runs()))[2]
    run.set_status("failed", "x")
    shutil.rmtree(run.path)
    assert [result.status for result in store.results()] == ["planned"] * 4
    with pytest.raises(ValueError, match=r"seed_0 was removed: `run` with the spec makes it anew"):
        store.retry()
    assert small_store(tmp_path).retry() == []
    assert run.config.is_file()


def test_keeps_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec(tmp_path)
    measured = []

    def measure(cfg: Config, repeats: int) -> Cost:
        measured.append(cfg.model.depth)
        return Cost(10, 100 * cfg.model.depth, 1.5 if repeats else None)

    monkeypatch.setattr("mmdeform.ablation.plan.measure", measure)
    rows = with_costs(plan_rows(spec), {})
    Store.create(tmp_path / "work", spec, rows)
    assert measured == [1, 2]
    Store.create(tmp_path / "work", spec, plan_rows(spec))  # without costs
    known = known_costs(tmp_path / "work")
    assert [known[row.hash].macs for row in rows] == [100, 200]
    again = with_costs(plan_rows(spec), known)
    assert [row.cost for row in again] == [row.cost for row in rows] and measured == [1, 2]
    with_costs(plan_rows(spec), known, repeats=3)
    assert measured == [1, 2, 1, 2]
    assert Store(tmp_path / "work").results()[-1].macs == 200


def test_needs_an_ablation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no folder of an ablation: it has no ablation\.json"):
        Store(tmp_path)
    assert known_costs(tmp_path) == {}
