"""Fixtures of the tests of configs."""

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def read_metafiles_once() -> Iterator[None]:
    """mmengine reads all of mmdet's metafiles for each ``mmdet::`` that it meets: half a second."""
    config_utils = pytest.importorskip("mmengine.config.utils")
    with patch.object(config_utils, "load", functools.cache(config_utils.load)):
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
