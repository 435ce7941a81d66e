"""RoI extractors: mmdet's results, with RoI layers from any registry."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
import mmcv.ops
from mmdet.models.roi_heads import roi_extractors as mmdet_extractors
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmdeform import layers, models

MODEL = Path(__file__).parents[2] / "configs/_base_/models/mask-rcnn_r50-small.py"
PAIRS = {
    "single": (models.SingleRoIExtractor, mmdet_extractors.SingleRoIExtractor),
    "generic": (models.GenericRoIExtractor, mmdet_extractors.GenericRoIExtractor),
}
ROI_ALIGN = dict(type="RoIAlign", output_size=3, sampling_ratio=2)
DEFORM = dict(type="mmdeform.DeformRoIPoolPack", output_size=3, output_channels=4)
COMMON = dict(out_channels=4, featmap_strides=[4, 8])
pairs = pytest.mark.parametrize("ours, theirs", PAIRS.values(), ids=PAIRS)
extractors = pytest.mark.parametrize("extractor", [ours for ours, _ in PAIRS.values()], ids=PAIRS)


@pytest.fixture(autouse=True)
def mmdet_scope() -> None:
    init_default_scope("mmdet")


def feature_maps() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, size, size, generator=random) for size in (48, 24)]


def regions() -> torch.Tensor:
    """Two RoIs for each of two levels, in turn."""
    return torch.tensor(
        [
            [0, 3.0, 4.0, 40.0, 60.0],
            [1, 0.0, 5.0, 150.0, 140.0],
            [1, 30.0, 20.0, 50.0, 50.0],
            [0, 10.0, 3.0, 130.0, 190.0],
        ]
    )


@pytest.mark.parametrize("scale", [None, 1.4])
@pairs
def test_results_are_mmdets(ours, theirs, scale):
    expected = theirs(roi_layer=ROI_ALIGN, **COMMON)(feature_maps(), regions(), scale)
    got = ours(roi_layer=ROI_ALIGN, **COMMON)(feature_maps(), regions(), scale)
    torch.testing.assert_close(got, expected)
    assert got.abs().mean() > 0.05


@pairs
def test_results_on_one_level_are_mmdets(ours, theirs):
    config = dict(roi_layer=ROI_ALIGN, out_channels=4, featmap_strides=[4])
    expected = theirs(**config)(feature_maps()[:1], regions())
    torch.testing.assert_close(ours(**config)(feature_maps()[:1], regions()), expected)


def test_concatenation_of_levels_is_mmdets():
    config = dict(roi_layer=ROI_ALIGN, out_channels=8, featmap_strides=[4, 8], aggregation="concat")
    expected = mmdet_extractors.GenericRoIExtractor(**config)(feature_maps(), regions())
    got = models.GenericRoIExtractor(**config)(feature_maps(), regions())
    torch.testing.assert_close(got, expected)


class ScopedPool(layers.DeformRoIPool):
    """Registered in mmdet's scope for a test."""


@pytest.mark.parametrize(
    "kind, cls",
    [
        ("mmdeform.DeformRoIPool", layers.DeformRoIPool),
        ("mmdeform.ModulatedDeformRoIPoolPack", layers.ModulatedDeformRoIPoolPack),
        ("mmdeform.layers.DeformRoIPoolPack", layers.DeformRoIPoolPack),
        (layers.DeformRoIPoolPack, layers.DeformRoIPoolPack),
        ("RoIAlign", mmcv.ops.RoIAlign),
        ("RoIPool", mmcv.ops.RoIPool),
        ("DeformRoIPoolPack", mmcv.ops.DeformRoIPoolPack),
        ("ScopedPool", ScopedPool),
        ("mmdet.ScopedPool", ScopedPool),
    ],
    ids=str,
)
@extractors
def test_roi_layer_by_any_name(extractor, kind, cls, monkeypatch):
    monkeypatch.setitem(MMDET_MODELS.module_dict, "ScopedPool", ScopedPool)
    roi_layer = dict(type=kind, output_size=3)
    if cls.__name__.endswith("Pack"):
        roi_layer["output_channels"] = 4
    before = dict(roi_layer)
    built = extractor(roi_layer=roi_layer, **COMMON).roi_layers
    assert [type(layer) for layer in built] == [cls, cls]
    assert [layer.spatial_scale for layer in built] == [0.25, 0.125]
    assert roi_layer == before


@pytest.mark.parametrize(
    "kind", ["NoSuchPool", "mmdeform.NoSuchPool", "mmdeform.RoIAlign", "deform_roi_pool"]
)
@extractors
def test_unknown_roi_layer_is_named(extractor, kind):
    with pytest.raises(KeyError, match=rf"roi_layer\.type: .* got '{kind}'"):
        extractor(roi_layer=dict(type=kind, output_size=3), **COMMON)


@extractors
def test_built_by_a_config_of_mmdet(extractor):
    cfg = dict(type=f"mmdeform.{extractor.__name__}", roi_layer=DEFORM, **COMMON)
    assert type(MMDET_MODELS.build(cfg)) is extractor


@pytest.mark.parametrize("kept", [[0, 2], [1, 3], []], ids=["first", "second", "none"])
@extractors
def test_unused_levels_keep_the_graph(extractor, kept):
    model = extractor(roi_layer=DEFORM, **COMMON)
    feats = [feat.requires_grad_() for feat in feature_maps()]
    output = model(feats, regions()[kept])
    assert output.shape == (len(kept), 4, 3, 3)
    output.sum().backward()
    leaves = [*feats, *model.parameters()]
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_infinities_of_an_unused_level_stay_there():
    pool = dict(type="mmdeform.DeformRoIPool", output_size=3)
    model = models.SingleRoIExtractor(roi_layer=pool, **COMMON)
    feats = feature_maps()
    feats[1].fill_(torch.inf)
    assert model(feats, regions()[[0, 2]]).isfinite().all()
    assert not model(feats, regions()).isfinite().all()


class RecordsDtype(nn.Module):
    def __init__(self, spatial_scale: float) -> None:
        super().__init__()
        self.output_size = (1, 1)

    def forward(self, feat: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        self.dtype = rois.dtype
        return feat.new_zeros(len(rois), 4, 1, 1)


@pytest.mark.parametrize(
    "pool",
    [
        dict(type="mmdeform.DeformRoIPool", output_size=1, sampling_ratio=2),
        dict(type="mmdeform.DeformPSRoIPool", output_size=1, output_channels=4),
    ],
    ids=lambda pool: pool["type"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deformable_layers_get_rois_in_fp32(dtype, pool):
    """And the others in the dtype of the features, without which mmcv's do not work."""
    rois = torch.tensor([[0, 1301.3, 0.0, 1307.9, 3.0]])
    ramp = torch.zeros(1, 4, 4, 1334)
    ramp[..., 1296:] = torch.arange(38.0)
    config = dict(out_channels=4, featmap_strides=[1])
    model = models.SingleRoIExtractor(roi_layer=pool, **config)
    output = model([ramp.to(dtype)], rois)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), model([ramp], rois), rtol=5e-3, atol=0)
    other = models.SingleRoIExtractor(roi_layer=dict(type=RecordsDtype), **config)
    other([ramp.to(dtype)], rois)
    assert other.roi_layers[0].dtype == dtype


@pytest.mark.parametrize("extractor", [models.SingleRoIExtractor])
def test_autocast_with_fp32_features(extractor):
    """As a normalisation at the end of a neck gives them."""
    model = extractor(roi_layer=DEFORM, **COMMON)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(feature_maps(), regions())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, model(feature_maps(), regions()), rtol=0.05, atol=0.05)


def faster_rcnn(pool: str, head: str, extractor: str) -> nn.Module:
    cfg = Config.fromfile(MODEL).model
    cfg.type = "FasterRCNN"
    cfg.backbone.base_channels = cfg.backbone.stem_channels = 4
    cfg.neck.in_channels = [16, 32, 64, 128]
    del cfg.roi_head["mask_roi_extractor"], cfg.roi_head["mask_head"]
    cfg.roi_head.bbox_roi_extractor.type = f"mmdeform.{extractor}"
    if extractor == "GenericRoIExtractor":
        del cfg.roi_head.bbox_roi_extractor["finest_scale"]
    cfg.roi_head.bbox_roi_extractor.roi_layer = dict(
        type=f"mmdeform.{pool}", output_size=7, output_channels=64, deform_fc_channels=8, head=head
    )
    cfg.train_cfg.rpn_proposal.max_per_img = cfg.test_cfg.rpn.max_per_img = 12
    cfg.train_cfg.rcnn.sampler.num = 12
    return MMDET_MODELS.build(cfg)


def batch(boxes: list[list[float]]) -> dict:
    samples = []
    for _ in range(2):
        instances = InstanceData(
            bboxes=torch.tensor(boxes).view(-1, 4), labels=torch.zeros(len(boxes), dtype=torch.long)
        )
        meta = dict.fromkeys(("img_shape", "ori_shape", "batch_input_shape", "pad_shape"), (64, 96))
        meta["scale_factor"] = (1.0, 1.0)
        samples.append(DetDataSample(metainfo=meta, gt_instances=instances))
    return dict(batch_inputs=torch.randn(2, 3, 64, 96), batch_data_samples=samples)


@pytest.mark.parametrize("boxes", [[[5.0, 8.0, 30.0, 40.0]], []], ids=["objects", "empty"])
@pytest.mark.parametrize("head", ["mmcv", "paper"])
@pytest.mark.parametrize("pool", ["DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"])
@pytest.mark.parametrize("extractor", ["SingleRoIExtractor", "GenericRoIExtractor"])
def test_faster_rcnn_learns_where_to_pool(extractor, pool, head, boxes):
    detector = faster_rcnn(pool, head, extractor)
    detector.init_weights()
    pools = detector.roi_head.bbox_roi_extractor.roi_layers
    for layer in pools:
        last = layer.offset_fc if head == "paper" and pool[0] == "D" else layer.offset_fc[-1]
        assert not last.weight.any()
        nn.init.normal_(last.weight, std=0.1)  # or no gradient reaches the layers before
    losses = detector.loss(**batch(boxes))
    sum(sum(v) if isinstance(v, list) else v for k, v in losses.items() if "loss" in k).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    # Level 0 has RoIs; no box within 64 x 96 pixels is large enough for level 3, whose layer has to
    # be in the graph all the same.
    assert any(parameter.grad.any() for parameter in pools[0].parameters())
    unused = not any(parameter.grad.any() for parameter in pools[3].parameters())
    assert unused == (extractor == "SingleRoIExtractor")
    detector.eval()
    with torch.no_grad():
        assert len(detector.predict(**batch(boxes))) == 2
