"""Checkpoints of mmengine load with torch's checks on, and only they."""

import importlib
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
from mmengine.dist import utils
from mmengine.logging import HistoryBuffer
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import load_checkpoint

from mmdeform import compat


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What mmengine's ``save_checkpoint`` writes, in small."""
    buffer = HistoryBuffer()
    for value in (1.0, 2.0, 6.0):
        buffer.update(value)
    path = tmp_path / "epoch_1.pth"
    state = dict(weight=torch.ones(2, 3), bias=torch.zeros(2))
    scores = dict(double=np.float64(0.5), single=np.float32(0.5), step=np.int64(7), ok=np.True_)
    hub = dict(log_scalars={"train/loss": buffer, "empty": HistoryBuffer()}, runtime_info=scores)
    torch.save(dict(meta=dict(epoch=1), state_dict=state, message_hub=hub), path)
    return path


def test_a_checkpoint_loads(checkpoint: Path) -> None:
    model = torch.nn.Linear(3, 2)
    loaded = load_checkpoint(model, str(checkpoint), map_location="cpu")
    assert torch.equal(model.weight, torch.ones(2, 3))
    buffer = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert (buffer.mean(), buffer.min(), buffer.max(), buffer.current()) == (3, 1, 6, 6)
    buffer.update(8.0)  # usable, as after a resume
    assert buffer.statistics("mean", 2) == 7
    assert torch.load(checkpoint).keys() == loaded.keys()  # allowed also after a load by mmengine
    info = loaded["message_hub"]["runtime_info"]
    assert info == dict(double=0.5, single=0.5, step=7, ok=True)


def test_a_checkpoint_would_not_load_without(checkpoint: Path) -> None:
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(checkpoint)
    finally:
        torch.serialization.add_safe_globals(allowed)


def test_a_checkpoint_written_with_numpy_1_loads(checkpoint: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(old, "w") as target:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in content
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            target.writestr(item, content)
    assert torch.load(old)["message_hub"]["log_scalars"]["train/loss"].current() == 6


class Reduced:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (Reduced(os.system, "exit 1"), "system"),
        (Reduced(getattr, HistoryBuffer, "__init__"), "'__init__' of <class"),
        (Reduced(getattr, HistoryBuffer.min, "__globals__"), "'__globals__' of <function"),
        (Reduced(getattr, torch.Tensor, "min"), "'min' of <class 'torch.Tensor'"),
        (np.array([Reduced(os.system, "exit 1")], dtype=object), "numpy.dtypes.ObjectDType"),
    ],
    ids=["call", "attribute", "function", "class", "array"],
)
def test_a_malicious_checkpoint_is_refused(tmp_path: Path, attack: object, reason: str) -> None:
    path = tmp_path / "evil.pth"
    torch.save(dict(message_hub=attack), path)
    with pytest.raises(pickle.UnpicklingError, match=reason):
        torch.load(path)


def test_repairs_can_be_applied_again() -> None:
    importlib.reload(compat)
    importlib.reload(compat)
    assert not hasattr(utils._init_dist_pytorch.__wrapped__, "__wrapped__")
    assert not hasattr(MMDistributedDataParallel.__init__.__wrapped__, "__wrapped__")


def test_harmless_without_mmengine() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'mmdet', 'numpy']));"
        "import mmdeform, torch;"
        "assert 'HistoryBuffer' not in str(torch.serialization.get_safe_globals())"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
