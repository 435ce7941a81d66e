"""Detectors with layers of every kind, and what they made of an image."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Config of a data set of small images."""
    from .all_kinds import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def detectors(data: dict) -> dict:
    """Detectors by name, whose layers of all kinds move their samples."""
    from mmengine import Config

    from mmdeform.analysis.detectors import load_detector

    from .all_kinds import DETECTORS, config_of, move

    models = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, model in DETECTORS.items():
            models[name] = load_detector(Config(config_of(model(), data)))
            move(models[name])
    return models


@pytest.fixture(scope="session")
def scenes(detectors: dict, data: dict) -> dict:
    """Scenes of the same image by name of the detector."""
    from mmdeform.analysis.detectors import load_picture
    from mmdeform.analysis.scene import look

    path = Path(data["data_root"]) / "1.png"
    return {name: look(model, load_picture(model, path)) for name, model in detectors.items()}
