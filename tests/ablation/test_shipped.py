"""Every shipped ablation can be planned on all its data, and its models be built."""

import functools
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("mmdet")
from mmengine.config import config as config_module
from mmengine.config import utils
from mmengine.registry import MODELS, init_default_scope

from mmdeform.ablation import load_spec, plan_rows

SPECS = sorted((Path(__file__).parents[2] / "configs" / "_ablations").glob("*.yml"))
ROWS = {
    "dat_offsets": 7,
    "dat_stages": 5,
    "dcnv2_stages": 15,
    "deform_groups": 4,
    "deformable_detr": 6,
    "kernels": 5,
    "offset_lr": 4,
    "rfcn_layers": 10,
    "roi_pooling": 3,
}
SAME_WEIGHTS = ("offset_lr",)  # rows differ in how they are trained


@pytest.fixture(scope="module", autouse=True)
def look_for_packages_once() -> Iterator[None]:
    """For each ``mmdet::`` mmengine looks mmdet up and reads all its metafiles."""
    with (
        patch.object(config_module, "is_installed", functools.cache(config_module.is_installed)),
        patch.object(utils, "load", functools.cache(utils.load)),
    ):
        yield


def test_all_are_here() -> None:
    assert [path.stem for path in SPECS] == list(ROWS)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["shapes", "coco"])
def test_is_planned(path: Path, base: str) -> None:
    spec = load_spec(path)
    assert spec.name.replace("-", "_") == path.stem
    assert list(spec.bases) == ["shapes", "coco"] and len(spec.seeds) >= 3
    rows = plan_rows(spec, base)
    assert len(rows) == ROWS[path.stem]
    assert sum(row.is_base for row in rows) == 1
    if base == "coco":
        return
    init_default_scope("mmdet")
    for row in rows:
        with torch.device("meta"):
            MODELS.build(row.config.model)
