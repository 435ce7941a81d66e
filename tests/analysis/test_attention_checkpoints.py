"""Checkpoints of a run are found, put in order, and refused with a reason."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv")
from mmdeform.analysis.attention.checkpoints import (
    Checkpoint,
    find_checkpoints,
    load_weights,
    order_checkpoints,
)


def save(path: Path, value: float = 0.0, features: int = 2, **meta: int) -> Path:
    state = nn.Linear(features, 1).state_dict() | {"bias": torch.tensor([value])}
    torch.save(dict(state_dict=state, meta=meta), path)
    return path


def test_a_folder_stands_for_its_checkpoints(tmp_path: Path) -> None:
    names = ["epoch_2.pth", "epoch_10.pth", "iter_500.pth", "best_coco_bbox_mAP_epoch_2.pth"]
    for name in (*names, "last_checkpoint", "config.py", "epoch_3.pth.tmp"):
        (tmp_path / name).touch()
    found = find_checkpoints([tmp_path])
    assert sorted(path.name for path in found) == sorted(names[:3])
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    again = find_checkpoints([tmp_path / names[3], tmp_path, link / names[0], link])
    assert sorted(path.name for path in again) == sorted(names)
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        find_checkpoints([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no checkpoint: expected epoch_1\.pth"):
        find_checkpoints([tmp_path / "empty"])


def test_order_is_that_of_training(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    last = save(tmp_path / "a.pth", epoch=10, iter=1000)
    first = save(tmp_path / "epoch_9.pth", epoch=9, iter=90)
    middle = save(tmp_path / "iter_95.pth", epoch=9, iter=95)
    assert order_checkpoints([last, middle, first], model) == [
        Checkpoint(first, 9, 90),
        Checkpoint(middle, 9, 95),
        Checkpoint(last, 10, 1000),
    ]
    named = [save(tmp_path / f"best_epoch_{number}.pth") for number in (10, 9)]
    assert order_checkpoints(named, model) == [Checkpoint(named[1], 9), Checkpoint(named[0], 10)]
    iterations = [save(tmp_path / f"iter_{number}.pth") for number in (1000, 200)]
    assert [c.iteration for c in order_checkpoints(iterations, model)] == [200, 1000]
    plain = save(tmp_path / "plain.pth")
    assert order_checkpoints([plain], model) == [Checkpoint(plain)]
    with pytest.raises(ValueError, match=r"plain\.pth: expected the number of the epoch or iter"):
        order_checkpoints([first, plain], model)
    with pytest.raises(ValueError, match="expected the number of the epoch or iteration"):
        order_checkpoints([named[0], iterations[0]], model)


def test_weights_are_loaded(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    load_weights(model, save(tmp_path / "a.pth", 3.5))
    assert model.bias.item() == 3.5
    torch.save({f"module.{k}": v + 1 for k, v in model.state_dict().items()}, tmp_path / "b.pth")
    load_weights(model, tmp_path / "b.pth")  # a bare state dict, of a distributed model
    assert model.bias.item() == 4.5
    legacy = tmp_path / "c.pth"
    torch.save(model.state_dict(), legacy, _use_new_zipfile_serialization=False)
    load_weights(nn.Linear(2, 1), legacy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a checkpoint, got a file that torch cannot read as one"),
        (b"PK\x03\x04 not a zip file", "expected a checkpoint, got a file"),
        ("cut", "expected a checkpoint, got a file that torch cannot read as one"),
        ([1, 2], "expected a checkpoint with tensors in 'state_dict'"),
        (dict(state_dict={}), "expected a checkpoint with tensors in 'state_dict'"),
        (dict(state_dict=dict(bias=1)), "expected a checkpoint with tensors in 'state_dict'"),
        (
            dict(state_dict=dict(bias=torch.zeros(1), scale=torch.zeros(1), a=torch.zeros(1))),
            "does not fit the Linear of the config: it lacks 1 of its weights, such as weight; "
            "it adds 2 of its weights, such as a",
        ),
        (
            dict(state_dict=nn.Linear(3, 1).state_dict()),
            "does not fit the Linear of the config: it has weight of shape (1, 3) where it has "
            "(1, 2)",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content, message: str) -> None:
    path = tmp_path / "epoch_1.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":  # as an interrupted copy leaves it
        save(path)
        path.write_bytes(path.read_bytes()[:300])
    else:
        torch.save(content, path)
    model = nn.Linear(2, 1)
    for read in (lambda: load_weights(model, path), lambda: order_checkpoints([path], model)):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read()
        assert str(path) in str(error.value)


class Unsafe:
    def __reduce__(self):
        return (print, ("code was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(dict(state_dict=Unsafe()), tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match=r"epoch_1\.pth: expected a checkpoint"):
        load_weights(nn.Linear(2, 1), tmp_path / "epoch_1.pth")
    assert "code was run" not in capsys.readouterr().out
