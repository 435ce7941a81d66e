"""Checkpoints in the authors' formats, and what does not fit. See also test_reading.py."""

import functools
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")

from .deterministic import fill_parameters, uniform
from .small_intern_image import KINDS, small_intern_image

HEAD = {"conv_head", "head"}


@functools.cache
def filled(kind: str) -> nn.Module:
    """The classifier whose weights are loaded; not to be changed."""
    model = small_intern_image(kind, num_classes=5).eval()
    fill_parameters(model)
    return model


def published(kind: str, **changes: Tensor) -> dict[str, Tensor]:
    return {**filled(kind).state_dict(), **changes}


def backbone_names(kind: str) -> set[str]:
    return {key for key in published(kind) if key.partition(".")[0] not in HEAD}


def assert_loaded(model: nn.Module, kind: str) -> None:
    own, expected = model.state_dict(), filled(kind).state_dict()
    for key in backbone_names(kind):
        assert torch.equal(own[key], expected[key]), key


@pytest.mark.parametrize("kind", KINDS)
class TestFormats:
    def test_classifier_as_backbone(self, kind: str) -> None:
        model = small_intern_image(kind)
        report = model.load_checkpoint({"model": published(kind), "epoch": 299})
        assert_loaded(model, kind)
        assert set(report.loaded) == backbone_names(kind)
        assert report.missing == report.unexpected == []

    def test_classifier_as_classifier(self, kind: str) -> None:
        model = small_intern_image(kind, num_classes=5).eval()
        report = model.load_checkpoint({"model": published(kind)})
        assert report.missing == report.unexpected == []
        image = uniform("image", (1, 3, 64, 64)).float()
        assert torch.equal(model(image), filled(kind)(image))

    def test_other_classes_keep_the_new_head(self, kind: str) -> None:
        model = small_intern_image(kind, num_classes=7)
        report = model.load_checkpoint({"model": published(kind)})
        assert report.missing == report.unexpected == ["head.weight", "head.bias"]
        assert_loaded(model, kind)
        assert torch.equal(model.conv_head[0].weight, filled(kind).conv_head[0].weight)

    def test_averaged_weights_are_preferred(self, kind: str) -> None:
        model = small_intern_image(kind)
        worse = {key: torch.zeros_like(value) for key, value in published(kind).items()}
        averaged = {f"module.{key}": value for key, value in published(kind).items()}
        model.load_checkpoint({"model": worse, "model_ema": averaged})
        assert_loaded(model, kind)

    def test_deepspeed(self, kind: str) -> None:
        model = small_intern_image(kind)
        model.load_checkpoint({"module": published(kind), "optimizer": None})
        assert_loaded(model, kind)

    @pytest.mark.parametrize("outer", ["", "module."])
    def test_detector(self, kind: str, outer: str) -> None:
        state = {
            f"{outer}backbone.{key}": value
            for key, value in published(kind).items()
            if key in backbone_names(kind)
        }
        state[f"{outer}neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
        model = small_intern_image(kind)
        report = model.load_checkpoint({"state_dict": state, "meta": {"epoch": 12}})
        assert_loaded(model, kind)
        assert report.unexpected == report.missing == []

    def test_prefix(self, kind: str) -> None:
        state = {f"teacher.net.{key}": value for key, value in published(kind).items()}
        state |= {f"backbone.{key}": torch.zeros_like(v) for key, v in published(kind).items()}
        model = small_intern_image(kind)
        model.load_checkpoint(state, prefix="teacher.net")
        assert_loaded(model, kind)

    def test_stages_that_are_not_built(self, kind: str) -> None:
        model = small_intern_image(kind, out_indices=(0, 1))
        report = model.load_checkpoint(published(kind))
        assert report.missing == []
        assert {key[:9] for key in report.unexpected} == {"levels.1.", "levels.2.", "levels.3."}
        assert all(".downsample." in key for key in report.unexpected if key[7] == "1")

    def test_without_layer_scale(self, kind: str) -> None:
        """The published 'tiny' classifiers: scales of 1 in the model leave them what they are."""
        source = small_intern_image(kind, layer_scale=None).eval()
        fill_parameters(source)
        model = small_intern_image(kind).eval()
        report = model.load_checkpoint({"model": source.state_dict()})
        assert report.missing and all(".gamma" in key for key in report.missing)
        image = uniform("image", (1, 3, 64, 64)).float()
        assert torch.equal(model(image)[3], source(image)[3])

    def test_report_is_logged(self, kind: str, caplog: pytest.LogCaptureFixture) -> None:
        state = published(kind, **{"levels.0.odd": torch.ones(1)})
        del state["patch_embed.conv1.bias"]
        with caplog.at_level(logging.INFO):
            small_intern_image(kind).load_checkpoint(state, logger=logging.getLogger("intern"))
        assert f"{KINDS[kind].__name__}: " in caplog.text
        assert "entries loaded from checkpoint" in caplog.text
        assert "1 missing there, unchanged here: patch_embed.conv1.bias" in caplog.text
        assert "1 not used: levels.0.odd" in caplog.text


class TestErrors:
    def test_another_size(self) -> None:
        model = small_intern_image("v3", groups=(2, 2, 2, 4))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="4 entries have another shape") as error:
            model.load_checkpoint(published("v3"))
        assert "levels.0.blocks.0.dcn.offset.weight (36, 8), got (18, 8)" in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_weights_of_the_other_kind_are_reported(self) -> None:
        report = small_intern_image("v4").load_checkpoint(published("v3"))
        assert {key.split(".dcn.")[1] for key in report.missing} == {
            f"{name}.{kind}"
            for name in ("value_proj", "offset_mask")
            for kind in ("weight", "bias")
        }
        assert "levels.0.blocks.0.dcn.input_proj.weight" in report.unexpected

    def test_nothing_fits(self) -> None:
        with pytest.raises(ValueError, match=r"no entry fits.*'patch_embed.*'layer1'"):
            small_intern_image("v3").load_checkpoint({"layer1": torch.zeros(1)})

    def test_no_weights(self) -> None:
        with pytest.raises(ValueError, match="in 'state_dict' or 'model_ema' or 'model' or"):
            small_intern_image("v3").load_checkpoint({"epoch": 1})

    def test_code_is_not_run(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple:
                return Path.mkdir, (tmp_path / "harm",)

        file = tmp_path / "intern.pth"
        torch.save({"model": published("v3"), "config": Attack()}, file)
        model = small_intern_image("v3", init_cfg=dict(type="Pretrained", checkpoint=str(file)))
        with pytest.raises(pickle.UnpicklingError, match=r"intern\.pth.*nothing of it was run"):
            model.init_weights()
        assert not (tmp_path / "harm").exists()


class TestInitWeights:
    @pytest.mark.parametrize("kind", KINDS)
    def test_pretrained(self, kind: str, tmp_path: Path) -> None:
        torch.save({"model": published(kind)}, tmp_path / "intern.pth")
        config = dict(type="Pretrained", checkpoint=str(tmp_path / "intern.pth"))
        model = small_intern_image(kind, init_cfg=config)
        model.init_weights()
        assert_loaded(model, kind)
        assert model.init_cfg == config

    def test_of_a_detector(self, tmp_path: Path) -> None:
        """By mmdet's own init_weights, and by mmengine's load_checkpoint as ``load_from`` does."""
        pytest.importorskip("mmdet")
        from mmengine.runner import load_checkpoint

        from .small_intern_image import SMALL
        from .small_retinanet import build, retinanet

        torch.save({"model": published("v4")}, tmp_path / "intern.pth")
        backbone: dict[str, Any] = dict(type="mmdeform.FlashInternImage", **SMALL)
        pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "intern.pth"))
        detector = build({**retinanet(), "backbone": {**backbone, "init_cfg": pretrained}})
        detector.init_weights()
        assert_loaded(detector.backbone, "v4")

        torch.save({"state_dict": detector.state_dict(), "meta": {}}, tmp_path / "detector.pth")
        again = build({**retinanet(), "backbone": backbone})
        load_checkpoint(again, str(tmp_path / "detector.pth"), map_location="cpu")
        assert_loaded(again.backbone, "v4")
