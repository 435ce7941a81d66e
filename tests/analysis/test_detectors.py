"""Detectors are loaded completely or not at all; positions find their way through the pipeline."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
from mmengine import Config

from mmdeform.analysis.detectors import build_dataset, load_detector, load_picture, preprocess

from .small_detector import write_checkpoint, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("detectors"))


@pytest.fixture(scope="module")
def checkpoint(config: Path) -> Path:
    return write_checkpoint(config)


def test_a_checkpoint_fills_the_model(config: Path, checkpoint: Path) -> None:
    cfg = Config.fromfile(config)
    # The checkpoint holds everything: what the backbone would start from is not looked for.
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="nowhere/resnet.pth")
    model = load_detector(cfg, checkpoint)
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training and model.cfg is cfg
    assert model.dataset_meta == dict(classes=("disc", "ring", "pair"))
    assert load_detector(config).dataset_meta["classes"] == ("disc",)


def test_options_change_the_config(config: Path) -> None:
    model = load_detector(config, cfg_options={"model.test_cfg.score_thr": 0.25})
    assert model.test_cfg.score_thr == 0.25


def test_other_checkpoints_are_refused(config: Path, checkpoint: Path, tmp_path: Path) -> None:
    saved = torch.load(checkpoint, weights_only=False)
    name = "backbone.layer3.0.conv2.conv_offset.weight"
    offset = saved["state_dict"].pop(name)
    path = tmp_path / "other.pth"
    torch.save(saved, path)
    with pytest.raises(ValueError, match=f"lacks 1 of the weights of RetinaNet, {name} first"):
        load_detector(config, path)
    saved["state_dict"][name] = offset[:1]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"does not fit RetinaNet: (?s:.*)conv_offset.weight"):
        load_detector(config, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds list, expected a checkpoint"):
        load_detector(config, path)
    path.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"other\.pth cannot be read as a checkpoint"):
        load_detector(config, path)


def test_a_config_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("default_scope = 'mmdet'\n")
    with pytest.raises(ValueError, match=r"config\.py has no model"):
        load_detector(path)


def test_positions_go_through_the_pipeline(config: Path) -> None:
    """A spot is where ``to_inputs`` says, after resizing to 180 x 120 and padding to 192 x 128."""
    x, y = np.meshgrid(np.arange(75), np.arange(50))
    spot = 200 * np.exp(-((x - 50) ** 2 + (y - 20) ** 2) / 18)
    path = config.parent / "spot.png"
    cv2.imwrite(str(path), np.stack([spot, 0 * spot, spot / 2], -1).astype(np.uint8))  # BGR
    model = load_detector(config)
    picture = load_picture(model, path)
    assert picture.size == (75, 50) and picture.scale == pytest.approx((2.4, 2.4))
    assert picture.pixels[20, 50].tolist() == [100, 0, 200]

    images, samples = preprocess(model, picture)
    assert images.shape == (1, 3, 128, 192) and samples[0].img_shape == (120, 180)
    channel = images[0].flatten(1).amax(1).argmax()
    weights = images[0, channel].clamp(min=0)
    at = [
        float((weights * torch.arange(n).view(shape)).sum() / weights.sum())
        for n, shape in ((192, (1, -1)), (128, (-1, 1)))
    ]
    assert picture.to_inputs((50, 20)) == pytest.approx(at, abs=0.1)
    points = torch.tensor([[50.0, 20.0], [0.0, 0.0]])
    back = picture.from_inputs(torch.from_numpy(picture.to_inputs(points)))
    np.testing.assert_allclose(back, points, atol=1e-9)
    assert picture.to_inputs((-0.5, -0.5)).tolist() == [-0.5, -0.5]  # edges stay edges
    (result,) = model.test_step(picture.batch)
    assert len(result.pred_instances) > 0

    path.write_text("no image")
    with pytest.raises(ValueError, match=r"spot.png is no image that OpenCV can read"):
        load_picture(model, path)


def test_data_sets(config: Path) -> None:
    cfg = Config.fromfile(config)
    assert build_dataset(cfg).get_data_info(0)["img_path"].endswith("image.png")
    with pytest.raises(ValueError, match=r"config\.py has no train_dataloader"):
        build_dataset(cfg, "train")
    cfg.val_dataloader.dataset.ann_file = "elsewhere.json"
    with pytest.raises(ValueError, match=r"data set of val_dataloader is not there: .*elsewhere"):
        build_dataset(cfg)
