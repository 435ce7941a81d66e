"""Checkpoints in the authors' formats, tables of other sizes, and what does not fit."""

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmdeform.models.backbones import DAT
from mmdeform.models.backbones.dat import load_dat_checkpoint

from .deterministic import fill_parameters, uniform

SMALL: dict[str, Any] = dict(
    img_size=64,
    stem_dims=8,
    dims=(8, 16, 32, 64),
    num_heads=(1, 2, 4, 8),
    num_groups=(1, 1, 2, 4),
    stage_specs=("LS", "N", "LD", "D"),
    strides=(4, 2, 1, 1),
    window_sizes=4,
    neighborhood_sizes=3,
)
WINDOW = "stages.0.attns.0.relative_position_bias_table"
NEIGHBOR = "stages.1.attns.0.rpb"
DEFORMABLE = "stages.2.attns.1.rpe_table"


def dat(**options: Any) -> DAT:
    return DAT(**{**SMALL, **options}).eval()


@functools.cache
def filled() -> DAT:
    """The classifier whose weights are loaded; not to be changed."""
    model = dat(num_classes=5)
    fill_parameters(model)
    return model


def published(**changes: Tensor) -> dict[str, Tensor]:
    """Its weights as the authors' code stores them, with constants."""
    constants = {
        "stages.0.attns.0.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        "stages.0.attns.1.attn_mask": torch.zeros(16, 16, 16),
    }
    return {**filled().state_dict(), **constants, **changes}


def backbone_names(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if not key.startswith(("norms.", "cls_"))}


def assert_loaded(model: nn.Module, names: set[str] | None = None) -> None:
    own, expected = model.state_dict(), filled().state_dict()
    for key in names or backbone_names(model):
        assert torch.equal(own[key], expected[key]), key


class TestFormats:
    def test_classifier_as_backbone(self) -> None:
        model = dat()
        report = load_dat_checkpoint(model, {"model": published(), "epoch": 299})
        assert_loaded(model)
        assert set(report.loaded) == backbone_names(model)
        assert all(key.startswith("norms.") for key in report.missing)
        assert len(report.missing) == 8
        assert report.resized == report.unexpected == []

    def test_classifier_as_classifier(self) -> None:
        model = dat(num_classes=5)
        report = load_dat_checkpoint(model, {"model": published()})
        assert report.missing == report.unexpected == []
        image = uniform("image", (1, 3, 64, 64)).float()
        assert torch.equal(model(image), filled()(image))

    def test_other_classes_keep_the_new_head(self) -> None:
        model = dat(num_classes=7)
        report = load_dat_checkpoint(model, {"model": published()})
        assert report.missing == report.unexpected == ["cls_head.weight", "cls_head.bias"]
        assert_loaded(model, backbone_names(model) | {"cls_norm.norm.weight"})

    @pytest.mark.parametrize("outer", ["", "module."])
    def test_detector(self, outer: str) -> None:
        state = {f"{outer}backbone.{key}": value for key, value in published().items()}
        state[f"{outer}neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
        model = dat()
        report = load_dat_checkpoint(model, {"state_dict": state, "meta": {"epoch": 36}})
        assert_loaded(model)
        assert report.unexpected == []

    @pytest.mark.parametrize("prefix", ["teacher.net", "teacher.net."])
    def test_prefix(self, prefix: str) -> None:
        state = {f"teacher.net.{key}": value for key, value in published().items()}
        state |= {f"backbone.{key}": torch.zeros_like(value) for key, value in published().items()}
        model = dat()
        load_dat_checkpoint(model, state, prefix)
        assert_loaded(model)

    def test_names_of_layer_scales(self) -> None:
        model = dat(layer_scale=0.5)
        name = "stages.0.layer_scales.3"
        report = load_dat_checkpoint(model, published(**{f"{name}.gamma": torch.ones(8)}))
        assert f"{name}.weight" in report.loaded
        assert model.state_dict()[f"{name}.weight"].eq(1).all()

    def test_stages_that_are_not_built(self) -> None:
        model = dat(out_indices=(0, 1))
        report = load_dat_checkpoint(model, published())
        assert_loaded(model)
        assert {key[:12] for key in report.unexpected} == {"down_projs.1", "down_projs.2"} | {
            key[:12] for key in published() if key.startswith(("stages.2", "stages.3"))
        }

    def test_report_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        state = published(**{"stages.0.odd": torch.ones(1), WINDOW: torch.zeros(25, 1)})
        with caplog.at_level(logging.INFO):
            load_dat_checkpoint(dat(), state, logger=logging.getLogger("dat"))
        assert "entries loaded from checkpoint" in caplog.text
        assert f"1 resized tables: {WINDOW}" in caplog.text
        assert "8 missing there, unchanged here: norms.0.norm.weight" in caplog.text
        assert "1 not used: stages.0.odd" in caplog.text


class TestTables:
    def test_window(self) -> None:
        model = dat(window_sizes=(6, 4, 4, 4))
        report = load_dat_checkpoint(model, published())
        assert report.resized == [WINDOW, WINDOW.replace("attns.0", "attns.1")]
        table = filled().state_dict()[WINDOW].reshape(1, 1, 7, 7)
        expected = F.interpolate(table, (11, 11), mode="bicubic").reshape(121, 1)
        assert torch.equal(model.state_dict()[WINDOW], expected)

    def test_several_heads_stay_apart(self) -> None:
        options = dict(stage_specs=("L", "L", "L", "L"))
        source, model = dat(**options), dat(**options, window_sizes=6)
        fill_parameters(source)
        load_dat_checkpoint(model, source.state_dict())
        name = "stages.2.attns.0.relative_position_bias_table"
        for head in range(4):
            table = source.state_dict()[name][:, head].reshape(1, 1, 7, 7)
            expected = F.interpolate(table, (11, 11), mode="bicubic").flatten()
            assert torch.allclose(model.state_dict()[name][:, head], expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "size", "options"),
        [
            (DEFORMABLE, (11, 11), dict(img_size=96)),
            (DEFORMABLE, (7, 11), dict(img_size=(64, 96))),
            (NEIGHBOR, (9, 9), dict(neighborhood_sizes=5)),
        ],
    )
    def test_deformable_and_neighborhood(
        self, name: str, size: tuple[int, int], options: dict[str, Any]
    ) -> None:
        model = dat(**options)
        report = load_dat_checkpoint(model, published())
        assert name in report.resized
        expected = F.interpolate(filled().state_dict()[name][None], size, mode="bicubic")[0]
        assert torch.equal(model.state_dict()[name], expected)

    def test_fixed_bias_is_resized_as_maps_of_queries_and_keys(self) -> None:
        options = dict(stage_specs=("L", "D", "L", "L"), position_bias="fixed")
        model, name = dat(**options, img_size=96), "stages.1.attns.0.rpe_table"
        query, key = uniform("query", (2, 8, 8)), uniform("key", (2, 4, 4))
        source = dat(**options).state_dict()
        source[name] = torch.einsum("mq,mk->mqk", query.flatten(1), key.flatten(1))
        report = load_dat_checkpoint(model, source)
        assert report.resized == [name]
        query = F.interpolate(query[None], (12, 12), mode="bicubic")[0].flatten(1)
        key = F.interpolate(key[None], (6, 6), mode="bicubic")[0].flatten(1)
        expected = torch.einsum("mq,mk->mqk", query, key).float()
        assert torch.allclose(model.state_dict()[name], expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "shape", "options"),
        [
            (WINDOW, (49, 2), {}),  # heads
            (WINDOW, (48, 1), {}),  # no square
            (DEFORMABLE, (3, 7, 7), {}),
            (DEFORMABLE, (4, 16, 16), {}),  # a fixed bias
            (DEFORMABLE, (4, 7, 7), dict(position_bias="fixed")),
            ("patch_proj.0.weight", (8, 1, 4, 4), {}),
        ],
    )
    def test_what_cannot_be_resized(
        self, name: str, shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        model = dat(**options)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        expected = str(tuple(before[name].shape))
        with pytest.raises(ValueError, match="another shape") as error:
            load_dat_checkpoint(model, published(**{name: torch.zeros(shape)}))
        assert f"{name} {expected}, got {shape}" in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class TestErrors:
    def test_nothing_fits(self) -> None:
        with pytest.raises(ValueError, match=r"no entry fits.*'patch_proj.0.weight'.*'layer1'"):
            load_dat_checkpoint(dat(), {"layer1": torch.zeros(1)})

    def test_prefix_that_nothing_has(self) -> None:
        with pytest.raises(ValueError, match=r"prefix 'teacher.'.*\['backbone', 'neck'\]"):
            state = {"backbone.x": torch.zeros(1), "neck.x": torch.zeros(1)}
            load_dat_checkpoint(dat(), state, "teacher")

    @pytest.mark.parametrize(
        ("checkpoint", "got"),
        [({}, ""), ({"epoch": 1, "lr": 2}, "'epoch', 'lr'"), ({"model": {"x": 1}}, "'model'")],
    )
    def test_no_weights(self, checkpoint: dict, got: str) -> None:
        with pytest.raises(ValueError, match=f"in 'state_dict' or 'model'.*got {got}"):
            load_dat_checkpoint(dat(), checkpoint)

    def test_a_file_without_weights(self, tmp_path: Path) -> None:
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(ValueError, match=r"list\.pth: expected a dict.*got list"):
            load_dat_checkpoint(dat(), tmp_path / "list.pth")


class TestInitWeights:
    def test_pretrained(self, tmp_path: Path) -> None:
        torch.save({"model": published()}, tmp_path / "dat.pth")
        config = dict(type="Pretrained", checkpoint=str(tmp_path / "dat.pth"))
        model = dat(init_cfg=config, img_size=96)
        model.init_weights()
        assert_loaded(model, backbone_names(model) - {DEFORMABLE, "stages.3.attns.0.rpe_table"})
        assert model.init_cfg == config

    def test_with_other_initialisers_and_prefix(self, tmp_path: Path) -> None:
        state = {f"net.{key}": value for key, value in published().items()}
        torch.save({"state_dict": state}, tmp_path / "dat.pth")
        model = dat(
            init_cfg=[
                dict(type="Pretrained", checkpoint=str(tmp_path / "dat.pth"), prefix="net."),
                dict(type="Constant", layer="LayerNorm", val=3.0),
            ]
        )
        model.init_weights()
        assert_loaded(model)  # pretrained weights come last
        assert model.norms[0].norm.weight.eq(3).all()

    def test_only_once(self, tmp_path: Path) -> None:
        torch.save({"model": published()}, tmp_path / "dat.pth")
        model = dat(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "dat.pth")))
        model.init_weights()
        nn.init.zeros_(model.patch_proj[0].weight)
        model.init_weights()
        assert model.patch_proj[0].weight.eq(0).all()

    def test_load_from_of_a_detector(self, tmp_path: Path) -> None:
        """mmengine's own loading, which knows prefixes and unexpected entries but no resizing."""
        pytest.importorskip("mmdet")
        from mmengine.runner import load_checkpoint

        from .small_retinanet import build, retinanet

        config = {**retinanet(), "backbone": dict(type="mmdeform.DAT", **SMALL)}
        source, detector = build(config), build(config)
        fill_parameters(source)
        state = dict(source.state_dict())
        state["backbone.stages.0.attns.0.relative_position_index"] = torch.zeros(16, 16).long()
        torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
        load_checkpoint(detector, str(tmp_path / "detector.pth"), map_location="cpu")
        for key, value in detector.state_dict().items():
            assert torch.equal(value, state[key]), key
