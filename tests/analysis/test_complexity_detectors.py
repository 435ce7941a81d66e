"""What detectors of mmdet cost, and how many boxes their RoI heads get."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

from mmdeform.analysis.complexity import (
    complexity,
    count_rois,
    fixed_proposals,
    make_inputs,
    proposals_of,
)

from .small_mask_rcnn import CHANNELS, MASK_RCNN, PER_BOX, PER_MASK


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    init_default_scope("mmdet")
    torch.manual_seed(0)
    return MODELS.build(ConfigDict(MASK_RCNN)).eval()


def test_inputs_are_padded_as_the_detector_does(detector: nn.Module) -> None:
    inputs = make_inputs(detector, (50, 70))
    assert inputs.image_shape == (50, 70)
    assert inputs.network_shape == (64, 96)
    assert inputs.args[0].shape == (1, 3, 64, 96)
    (sample,) = inputs.kwargs["data_samples"]
    assert sample.img_shape == (50, 70) and sample.batch_input_shape == (64, 96)
    assert inputs.kwargs["mode"] == "tensor"


@pytest.mark.parametrize("proposals", [3, 120])
def test_fixed_proposals(detector: nn.Module, proposals: int) -> None:
    assert proposals_of(detector) == 20
    inputs = make_inputs(detector, (50, 70))
    with fixed_proposals(detector, proposals), count_rois(detector) as rois:
        result = complexity(detector, *inputs.args, **inputs.kwargs)
    masks = min(proposals, 100)  # mmdet's limit
    assert rois == {
        "roi_head.bbox_roi_extractor": proposals,
        "roi_head.mask_roi_extractor": masks,
    }
    found = {part.name: part for part in result.parts(2)}
    assert found["roi_head.bbox_head"].macs == proposals * PER_BOX
    assert found["roi_head.mask_head"].macs == masks * PER_MASK
    pooled = 2 * (proposals + masks) * CHANNELS * 49 * 16  # 2 x 2 bilinear samples
    assert result.total.by_kind()["RoIAlign"] == pooled + pooled // 32
    pixels = 16 * 24 + 8 * 12  # of both levels
    rpn = pixels * CHANNELS * (CHANNELS * 9 + 3 * 5)
    assert found["rpn_head"].macs == rpn
    assert result.deformable == tuple(f"backbone.layer2.{block}.conv2" for block in range(4))
    assert all(part.by_kind()["deformable"] for part in result.deformable_layers())
    assert result.missing() == {}
    assert "predict" not in vars(detector.rpn_head)


def test_boxes_lie_in_the_image_and_on_all_levels(detector: nn.Module) -> None:
    inputs = make_inputs(detector, (300, 400))
    maps = (torch.zeros(1, CHANNELS, 75, 100), torch.zeros(1, CHANNELS, 38, 50))
    random = torch.get_rng_state()
    with fixed_proposals(detector, 200), torch.no_grad():
        (found,) = detector.rpn_head.predict(maps, inputs.kwargs["data_samples"], rescale=False)
    left, top, right, bottom = found.bboxes.unbind(1)
    assert found.bboxes.shape == (200, 4)
    assert (left >= 0).all() and (right <= 400).all() and (right - left >= 16).all()
    assert (top >= 0).all() and (bottom <= 300).all() and (bottom - top >= 16).all()
    size = ((right - left) * (bottom - top)).sqrt()
    counts = torch.histc(size, 3, 0, 336)  # of FPN's levels: up to 112, 224 and 336 pixels
    assert (counts >= 5).all()
    assert torch.equal(torch.get_rng_state(), random)


def test_all_of_a_prediction(detector: nn.Module) -> None:
    inputs = make_inputs(detector, (64, 64), mode="predict")
    with count_rois(detector) as rois:
        result = complexity(detector, *inputs.args, **inputs.kwargs)
    boxes = rois["roi_head.bbox_roi_extractor"]
    assert 1 <= boxes <= 20
    found = {part.name: part for part in result.parts(2)}
    assert found["roi_head.bbox_head"].macs == boxes * PER_BOX
    assert inputs.kwargs["mode"] == "predict"
    assert set(result.missing()) == {"mmcv.nms", "aten.grid_sampler_2d"}  # that pastes masks


def test_detectors_without_proposals(detector: nn.Module) -> None:
    assert proposals_of(nn.Identity()) is None
    assert proposals_of(detector.backbone) is None
    with pytest.raises(ValueError, match="Identity has no RPN"), fixed_proposals(nn.Identity(), 5):
        pass
    with pytest.raises(ValueError, match="at least one, got 0"), fixed_proposals(detector, 0):
        pass
    with count_rois(nn.Identity()) as rois:
        pass
    assert rois == {}
