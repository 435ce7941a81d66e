"""Fixtures of the tests of configs."""

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def look_for_packages_once() -> Iterator[None]:
    """For each ``mmdet::`` mmengine looks mmdet up and reads all its metafiles: half a second."""
    config = pytest.importorskip("mmengine.config.config")
    utils = pytest.importorskip("mmengine.config.utils")
    with (
        patch.object(config, "is_installed", functools.cache(config.is_installed)),
        patch.object(utils, "load", functools.cache(utils.load)),
    ):
        yield


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set of shapes: two images to train with and one to validate."""
    spec = importlib.util.spec_from_file_location("make_shapes", ROOT / "tools" / "make_shapes.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out = tmp_path_factory.mktemp("data") / "shapes"
    tool.make_shapes(out, train=2, val=1, size=160, seed=0, overwrite=False)
    return out
