"""RPN and RoI head of one detector on different maps: c4, and c5 with its channels reduced."""

import pytest
import torch

pytest.importorskip("mmdet")
from mmdet.models.dense_heads import RPNHead as MMDetRPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor as MMDetSingleRoIExtractor
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from mmdeform.models import RPNHead, SingleRoIExtractor, TopReduction

ANCHORS = dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0], strides=[16])
EXTRACTOR = dict(roi_layer=dict(type="RoIAlign", output_size=3, sampling_ratio=2), out_channels=5)


@pytest.fixture(autouse=True)
def mmdet_scope() -> None:
    init_default_scope("mmdet")


def maps() -> list[torch.Tensor]:
    return [torch.randn(2, channels, 6, 7) for channels in (4, 5, 6)]


@pytest.mark.parametrize("index", [0, 2, -1])
def test_rpn_reads_the_maps_it_is_told(index: int) -> None:
    feats = maps()
    channels = feats[index].shape[1]
    head = MODELS.build(
        dict(
            type="mmdeform.RPNHead",
            in_channels=channels,
            in_indices=(index,),
            feat_channels=8,
            anchor_generator=ANCHORS,
        )
    )
    assert type(head) is RPNHead
    theirs = MMDetRPNHead(channels, feat_channels=8, anchor_generator=ANCHORS)
    theirs.load_state_dict(head.state_dict(), strict=True)
    for got, expected in zip(head(feats), theirs([feats[index]]), strict=True):
        assert len(got) == 1
        torch.testing.assert_close(got[0], expected[0])


def test_rpn_reads_all_maps_by_default() -> None:
    anchors = dict(ANCHORS, strides=[8, 16])
    feats = [torch.randn(1, 4, 5, 5), torch.randn(1, 4, 3, 3)]
    head = RPNHead(4, feat_channels=8, anchor_generator=anchors)
    assert [tuple(score.shape) for score in head(feats)[0]] == [(1, 2, 5, 5), (1, 2, 3, 3)]


def test_rpn_has_a_map_for_each_level() -> None:
    with pytest.raises(ValueError, match=r"in_indices: expected .* 1 levels .* got \(0, 1\)"):
        RPNHead(4, in_indices=(0, 1), anchor_generator=ANCHORS)


@pytest.mark.parametrize("indices", [(1,), (2, 1)])
def test_extractor_reads_the_maps_it_is_told(indices: tuple[int, ...]) -> None:
    strides = [16, 32][: len(indices)]
    feats = [torch.randn(2, 5, 6, 7) for _ in range(4)]
    rois = torch.tensor([[0, 8.0, 9, 60, 70], [1, 0, 0, 100, 90], [1, 2, 3, 50, 300]])
    ours = SingleRoIExtractor(featmap_strides=strides, in_indices=indices, **EXTRACTOR)
    theirs = MMDetSingleRoIExtractor(featmap_strides=strides, **EXTRACTOR)
    assert ours.num_inputs == max(indices) + 1
    got = ours(feats[: ours.num_inputs], rois)
    torch.testing.assert_close(got, theirs([feats[index] for index in indices], rois))


@pytest.mark.parametrize("indices", [(0, 1), (-1,), ()])
def test_extractor_has_a_map_for_each_stride(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"in_indices: expected an index .* got"):
        SingleRoIExtractor(featmap_strides=[16], in_indices=indices, **EXTRACTOR)


def test_only_the_top_is_reduced() -> None:
    neck = MODELS.build(dict(type="mmdeform.TopReduction", in_channels=6, out_channels=3))
    assert type(neck) is TopReduction
    neck.init_weights()
    weight, bias = neck.conv.weight, neck.conv.bias
    assert not bias.any()
    feats = maps()
    *others, top = neck(feats)
    assert all(a is b for a, b in zip(others, feats, strict=False)) and len(others) == 2
    expected = torch.einsum("nchw,oc->nohw", feats[2], weight[:, :, 0, 0]).relu()
    torch.testing.assert_close(top, expected)
    assert (top > 0).any() and (top == 0).any()


def test_the_top_starts_with_small_weights() -> None:
    neck = TopReduction(200, 50)
    neck.init_weights()
    assert neck.conv.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_the_top_may_be_normalised() -> None:
    neck = TopReduction(6, 3, norm_cfg=dict(type="BN"))
    assert neck.conv.bias is None
    inputs = maps()
    raw = torch.nn.functional.conv2d(inputs[2], neck.conv.weight)
    mean, var = raw.mean((0, 2, 3), keepdim=True), raw.var((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(neck(inputs)[-1], ((raw - mean) / (var + 1e-5).sqrt()).relu())
