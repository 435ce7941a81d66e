"""Specs: which rows they mean, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmengine")
from mmdeform.ablation import load_spec
from mmdeform.ablation.spec import Resources, Spec, make_spec, row_name

AXES: dict[str, Any] = {
    "stages": {"none": None, "c5": {"model.a": 5}, "c4-c5": {"model.a": 4}},
    "modulation": {
        "when": {"stages": ["c5", "c4-c5"]},
        "values": {"v1": {}, "v2": {"model.b": 2}},
    },
}


def spec(**changes: Any) -> Spec:
    content = dict(name="a", base="b.py", axes=AXES, metrics=["m"], **changes)
    return make_spec({k: v for k, v in content.items() if v is not None}, Path("folder"))


def names(made: Spec) -> list[str]:
    return [row_name(labels) for labels in made.combinations]


def test_grid_with_a_conditional_axis() -> None:
    made = spec()
    assert names(made) == ["none", "c5_v1", "c5_v2", "c4-c5_v1", "c4-c5_v2"]
    assert made.base_row == dict(stages="none", modulation="-")
    assert made.combinations[2] == dict(stages="c5", modulation="v2")
    assert made.bases == {"": "folder/b.py"}
    assert (made.seeds, made.resources) == ((0,), Resources())


def test_exclusions_lists_and_another_base_row() -> None:
    excluded = [dict(stages="c5", modulation="v2"), dict(stages="none")]
    made = spec(exclude=excluded, base_row=dict(stages="c4-c5"))
    assert names(made) == ["c5_v1", "c4-c5_v1", "c4-c5_v2"]
    assert made.base_row == dict(stages="c4-c5", modulation="v1")
    made = spec(rows=[dict(stages="c5", modulation="v2"), dict(stages="c5"), {}])
    assert names(made) == ["c5_v2", "c5_v1", "none"]


def test_yaml_and_python_are_alike(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(
        "name: a\nbase: {x: ../b.py, y: 'mmdet::c/d.py'}\naxes: {s: {p: , q: {model.z: 1}}}\n"
        "metrics: [m]\nseeds: [3, 4]\nresources: {parallel: 2, slurm: {slurm_partition: gpu}}\n"
    )
    (tmp_path / "a.py").write_text(
        "name = 'a'\nbase = dict(x='../b.py', y='mmdet::c/d.py')\n"
        "axes = dict(s=dict(p=None, q={'model.z': 1}))\nmetrics = ['m']\nseeds = [3, 4]\n"
        "resources = dict(parallel=2, slurm=dict(slurm_partition='gpu'))\n"
    )
    made = load_spec(tmp_path / "a.yml")
    assert made == load_spec(tmp_path / "a.py")
    assert made.bases == dict(x=str(tmp_path / "../b.py"), y="mmdet::c/d.py")
    assert made.seeds == (3, 4) and made.resources.slurm == dict(slurm_partition="gpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=[1]), r"unknown key: 'seed', did you mean 'seeds'\? \(known: name, base"),
        (dict(metrics=None), "'metrics' is missing"),
        (dict(name="a b"), "name: expected letters"),
        (dict(name=".."), "name: expected letters"),
        (dict(seeds=[1, 1]), r"seeds: expected a list of different int, got \[1, 1\]"),
        (dict(seeds=[]), "seeds: expected a list"),
        (dict(seeds=["1"]), "seeds: expected a list"),
        (dict(metrics="m"), "metrics: expected a list of different str, got 'm'"),
        (dict(base=[1]), "base: expected keys with values"),
        (dict(axes={}), "axes: expected at least one axis"),
        (dict(axes=dict(s={})), "axes: s: expected at least one value"),
        (dict(axes=dict(s={1: {}})), "axes: s: expected a name of letters.* in quotes, got 1"),
        (dict(axes=dict(s={"a_b": {}})), "got 'a_b'"),
        (dict(axes=dict(s={"-": {}})), "got '-'"),
        (dict(axes=dict(s=dict(a=3))), "axes: s: a: expected keys with values, got 3"),
        (
            dict(axes=dict(s=dict(values=dict(a=None), whne={}))),
            "unknown key of axis 's': 'whne', did you mean 'when'",
        ),
        (
            dict(axes=dict(s=dict(values=dict(a=None), when=dict(t="a")), t=dict(a=None))),
            "unknown earlier axis in 'when' of 's': 't'",
        ),
        (
            dict(axes=AXES | dict(x=dict(values=dict(a={}), when=dict(stages="c6")))),
            "unknown value of 'stages': 'c6' .known: none, c5, c4-c5",
        ),
        (dict(exclude=[dict(stages="c6")]), "unknown value of 'stages' in 'exclude': 'c6'"),
        (dict(exclude=[dict(stage="c5")]), "unknown axis in 'exclude': 'stage'"),
        (dict(exclude=[dict(stages="none", modulation="v1")]), "excludes no row"),
        (dict(rows=[{}, {}]), "two rows are called 'none'"),
        (dict(rows=[{}], exclude=[]), "exclude: leave those out of 'rows'"),
        (dict(rows=[dict(modulation="v1")]), "'modulation' does not apply here, got 'v1'"),
        (dict(rows=[dict(stages="c5", modulation="-")]), "'modulation' applies here, got '-'"),
        (dict(rows=[dict(stages="c5")]), "base_row: .*none.* is none of the rows"),
        (dict(resources=dict(gpus=2)), "resources: gpus: a run has 0 or 1 GPU, got 2"),
        (dict(resources=dict(parallel=0)), "parallel: expected a positive integer, got 0"),
        (dict(resources=dict(cpus=1)), "unknown key of 'resources': 'cpus'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    content = dict(name="a", base="b.py", axes=AXES, metrics=["m"]) | changes
    with pytest.raises(ValueError, match=message):
        make_spec({k: v for k, v in content.items() if v is not None}, Path())


def test_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    for text, message in (("name: [", "while parsing"), ("- 1", "the spec: expected keys")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"a\.yml: {message}"):
            load_spec(path)
    with pytest.raises(ValueError, match="No such file"):
        load_spec(tmp_path / "b.yml")
    with pytest.raises(ValueError, match="expected a spec that ends in"):
        load_spec(tmp_path / "b.json")
