"""Replaced layers in detectors of mmdet: initial values, a training step, state dicts."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path

from mmdeform import layers
from mmdeform.layers import OffsetConv2d, OffsetLinear

MMDET_CONFIGS = Path(get_installed_path("mmdet"), ".mim", "configs")
DCNV2 = dict(type="mmdeform.DCNv2")
EIGHT_POINTS = dict(type="mmdeform.MultiScaleDeformableAttention", num_points=8)


class TinyConvNeXt(BaseModule):
    """The names and layers of mmpretrain's ConvNeXt: depthwise 7x7 convolutions in blocks."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(init_cfg=dict(type="TruncNormal", layer=["Conv2d", "Linear"], std=0.02))
        self.stem = nn.Conv2d(3, channels, 4, 4)
        self.stages = nn.ModuleList(
            nn.Sequential(*(self.block(channels) for _ in range(depth))) for depth in (1, 1, 2, 1)
        )
        self.pool = nn.MaxPool2d(2)

    @staticmethod
    def block(channels: int) -> nn.Module:
        block = nn.Module()
        block.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        block.pointwise_conv = nn.Conv2d(channels, channels, 1)
        block.forward = lambda x: x + block.pointwise_conv(block.depthwise_conv(x)).relu()
        return block

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, x = [], self.stem(x)
        for stage in self.stages:
            outputs.append(stage(x))
            x = self.pool(outputs[-1])
        return tuple(outputs)


def retinanet() -> ConfigDict:
    cfg = Config.fromfile(MMDET_CONFIGS / "retinanet/retinanet_r18_fpn_1x_coco.py")
    model = cfg.model
    # No gradient passes a scale of zero at the end of a residual branch.
    zero = dict(zero_init_residual=False)
    model.backbone.update(base_channels=8, frozen_stages=-1, init_cfg=None, **zero)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=2, num_classes=3)
    return cfg


def convnext() -> ConfigDict:
    cfg = retinanet()
    cfg.model.backbone = ConfigDict(type=TinyConvNeXt)
    cfg.model.neck.in_channels = [8] * 4
    return cfg


def swin() -> ConfigDict:
    cfg = Config.fromfile(MMDET_CONFIGS / "swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py")
    cfg.model.backbone.update(
        embed_dims=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4], init_cfg=None
    )
    cfg.model.neck.update(in_channels=[24, 48, 96], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)
    return cfg


def rtmdet() -> ConfigDict:
    cfg = Config.fromfile(MMDET_CONFIGS / "rtmdet/rtmdet_tiny_8xb32-300e_coco.py")
    cfg.model.backbone.update(widen_factor=0.125, init_cfg=None)
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, num_classes=3)
    cfg.model.data_preprocessor.update(batch_augments=None)
    return cfg


def detr(path: str) -> ConfigDict:
    cfg = Config.fromfile(MMDET_CONFIGS / path)
    model = cfg.model
    model.backbone.update(base_channels=8, stem_channels=8, frozen_stages=-1, init_cfg=None)
    if "panoptic_head" in model:
        head = model.panoptic_head
        head.update(in_channels=[32, 64, 128, 256], num_queries=10)
        model.train_cfg.num_points = 64
        model.data_preprocessor.batch_augments = None  # pads to 1024 x 1024
        head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 1
    else:
        model.neck.in_channels = [64, 128, 256]
        model.encoder.num_layers = model.decoder.num_layers = 1
        model.num_queries = 20
    return cfg


# Config, rules, the class that each rule's modules become and their number.
FAMILIES = {
    "resnet18": (
        retinanet,
        [
            dict(select="backbone.layer3.*.conv2", type="mmdeform.DCNv2", deform_groups=2),
            dict(select="backbone.layer4.*.conv[12]", type="mmdeform.DCN"),
            dict(select="backbone.layer2.0.conv2", type="mmdeform.DCNv4"),
        ],
        {
            layers.ModulatedDeformConv2dPack: 2,
            layers.DeformConv2dPack: 4,
            layers.DCNv4: 1,
        },
    ),
    "fpn and head": (
        retinanet,
        [
            dict(select="neck.fpn_convs.*.conv", type="mmdeform.DCNv3"),
            dict(select=["bbox_head.cls_convs.*.conv", "bbox_head.retina_cls"], **DCNV2),
        ],
        {layers.DCNv3: 5, layers.ModulatedDeformConv2dPack: 3},
    ),
    "convnext": (
        convnext,
        [
            dict(select="backbone.stages.2.**.depthwise_conv", **DCNV2),
            dict(select="backbone.stages.3.**.depthwise_conv", type="mmdeform.DCNv4", groups=1),
        ],
        {layers.ModulatedDeformConv2dPack: 2, layers.DCNv4: 1},
    ),
    "swin": (
        swin,
        [dict(select="backbone.patch_embed.projection", **DCNV2)],
        {layers.ModulatedDeformConv2dPack: 1},
    ),
    "rtmdet": (
        rtmdet,
        [dict(select="backbone.stage[34].**.depthwise_conv.conv", **DCNV2)],
        {layers.ModulatedDeformConv2dPack: 2},
    ),
    "deformable detr": (
        lambda: detr("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"),
        [dict(select="encoder.layers.*.self_attn", **EIGHT_POINTS)],
        {layers.MultiScaleDeformableAttention: 1},
    ),
    "dino": (
        lambda: detr("dino/dino-4scale_r50_8xb2-12e_coco.py"),
        [dict(select=["encoder.**.self_attn", "decoder.**.cross_attn"], **EIGHT_POINTS)],
        {layers.MultiScaleDeformableAttention: 2},
    ),
    "mask2former": (
        lambda: detr("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"),
        [dict(select="panoptic_head.pixel_decoder.encoder.**.self_attn", **EIGHT_POINTS)],
        {layers.MultiScaleDeformableAttention: 1},
    ),
}


def build(cfg: Config, rules: list[dict]) -> nn.Module:
    """A detector with its initial values, the same every time."""
    init_default_scope("mmdet")
    torch.manual_seed(0)
    plain = cfg.model.type
    cfg.model.update(type="mmdeform.Transplant", model=plain, rules=rules)
    detector = MODELS.build(cfg.model)
    assert type(detector).__name__ == plain
    return detector


def predictors(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (OffsetConv2d, OffsetLinear))]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    make_cfg, rules, expected = FAMILIES[family]
    cfg = make_cfg()
    plain, detector = build(make_cfg(), []), build(cfg, rules)
    new = {name: m for name, m in detector.named_modules() if type(m) in expected}
    for kind, number in expected.items():
        assert sum(type(m) is kind for m in new.values()) == number
    optimizer = build_optim_wrapper(detector, cfg.optim_wrapper).optimizer
    for model in (plain, detector):
        torch.manual_seed(1)
        model.init_weights()

    # Everything that the plain detector has too starts as it does there, to the last bit.
    theirs = plain.state_dict()
    shared = {
        name
        for name, value in detector.state_dict().items()
        if name in theirs and value.shape == theirs[name].shape and "sampling_offsets" not in name
    }
    assert any(name.startswith(tuple(new)) for name in shared)
    for name in shared:
        assert torch.equal(detector.state_dict()[name], theirs[name]), name
    for module in new.values():
        assert not any(layer.weight.any() for layer in predictors(module))
        if isinstance(module, layers.MultiScaleDeformableAttention):
            fresh = layers.MultiScaleDeformableAttention(num_levels=module.num_levels, num_points=8)
            assert torch.equal(module.sampling_offsets.bias, fresh.sampling_offsets.bias)
            assert not module.sampling_offsets.weight.any()

    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in detector.parameters() if p.requires_grad} <= optimized

    for module in new.values():
        for layer in predictors(module):
            nn.init.normal_(layer.weight, std=0.01)  # what is in front of zeros has no gradient
    detector.train()
    batch = demo_mm_inputs(1, [[3, 64, 64]], num_classes=3, with_mask=family == "mask2former")
    losses = detector(**detector.data_preprocessor(batch, training=True), mode="loss")
    total, _ = detector.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    for module in new.values():
        for name, parameter in module.named_parameters():
            gradient = parameter.grad.abs().sum()
            assert gradient.isfinite() and gradient > 0, name

    build(make_cfg(), rules).load_state_dict(detector.state_dict(), strict=True)
