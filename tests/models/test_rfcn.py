"""R-FCN: position-sensitive votes, hard examples, and the detector around them."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdeform.layers import DeformPSRoIPool, DeformPSRoIPoolPack
from mmdeform.layers.sampling import deformable_layers
from mmdeform.models import RFCN, RFCNBBoxHead, RFCNRoIHead

MODEL = Path(__file__).parents[2] / "configs/_base_/models/rfcn_r50-small.py"
STRIDE, CELLS, SAMPLES, CLASSES = 4, 3, 2, 3
SHIFT = 0.7  # offset of a bin in units of trans_std * size
ROIS = torch.tensor(
    [
        [0, 3.0, 4.0, 40.4, 30.6],
        [1, 0.0, 5.5, 23.0, 14.0],
        [1, 30.0, 20.0, 50.0, 47.0],
        [0, -6.0, 3.0, 13.0, 60.0],  # beyond the map on two sides
    ],
    dtype=torch.float64,
)
META = dict.fromkeys(("img_shape", "ori_shape", "batch_input_shape", "pad_shape"), (64, 96))
META["scale_factor"] = (1.0, 1.0)


@pytest.fixture(autouse=True)
def mmdet_scope() -> None:
    init_default_scope("mmdet")


def make_head(pool: str = "DeformPSRoIPool", agnostic: bool = True, **options) -> RFCNBBoxHead:
    layer = dict(type=f"mmdeform.{pool}", output_size=CELLS, sample_per_part=SAMPLES)
    layer.update(options.pop("roi_layer", {}))
    config = dict(
        type="mmdeform.RFCNBBoxHead",
        in_channels=5,
        num_classes=CLASSES,
        featmap_stride=STRIDE,
        roi_layer=layer,
        reg_class_agnostic=agnostic,
    )
    head = MODELS.build(dict(config, **options)).double()
    assert type(head) is RFCNBBoxHead
    for parameter in head.parameters():
        if parameter.dim() > 1 and parameter.any():  # all but the offsets
            nn.init.normal_(parameter)
    return head


def feature_map() -> Tensor:
    return torch.randn(2, 5, 12, 13, dtype=torch.float64)


def interpolate(map: Tensor, x: float, y: float) -> float | None:
    """Bilinear value of one map, shape (H, W); None where the operator leaves a sample out."""
    height, width = map.shape
    if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
        return None
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    value = 0.0
    for row, column in itertools.product((0, 1), (0, 1)):
        i, j = min(int(y) + row, height - 1), min(int(x) + column, width - 1)
        weight = (1 - abs(y - int(y) - row)) * (1 - abs(x - int(x) - column))
        value += weight * float(map[i, j])
    return value


def vote(maps: Tensor, roi: Tensor, shift: tuple[float, float] = (0.0, 0.0)) -> float:
    """What the CELLS * CELLS maps of one prediction say about a RoI, bin by bin."""
    rounded = [math.floor(abs(v) + 0.5) * (1 if v >= 0 else -1) for v in roi[1:].tolist()]
    x1, y1 = (v / STRIDE - 0.5 for v in rounded[:2])
    x2, y2 = ((v + 1) / STRIDE - 0.5 for v in rounded[2:])
    width, height = x2 - x1, y2 - y1
    bins = []
    for row, column in itertools.product(range(CELLS), range(CELLS)):
        samples = []
        for i, j in itertools.product(range(SAMPLES), range(SAMPLES)):
            x = x1 + width * (column + j / SAMPLES) / CELLS + 0.1 * shift[0] * width
            y = y1 + height * (row + i / SAMPLES) / CELLS + 0.1 * shift[1] * height
            samples.append(interpolate(maps[row * CELLS + column], x, y))
        found = [sample for sample in samples if sample is not None]
        bins.append(sum(found) / len(found) if found else 0.0)
    return sum(bins) / len(bins)


def expected_votes(
    conv: nn.Conv2d, features: Tensor, shift=lambda prediction: (0.0, 0.0)
) -> Tensor:
    weight, bias = conv.weight[:, :, 0, 0], conv.bias[:, None, None]
    maps = [torch.einsum("oc,chw->ohw", weight, image) + bias for image in features]
    count = conv.out_channels // CELLS**2
    rows = [
        [
            vote(maps[int(roi[0])][n * CELLS**2 : (n + 1) * CELLS**2], roi, shift(n))
            for n in range(count)
        ]
        for roi in ROIS
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("pool", ["DeformPSRoIPool", "DeformPSRoIPoolPack"])
@torch.no_grad()
def test_every_cell_of_a_region_votes_with_its_own_map(pool: str, agnostic: bool) -> None:
    head, features = make_head(pool, agnostic), feature_map()
    scores, boxes = head(features, ROIS)
    assert scores.shape == (4, CLASSES + 1)
    assert boxes.shape == (4, 4 if agnostic else 4 * CLASSES)
    torch.testing.assert_close(scores, expected_votes(head.fc_cls.conv, features))
    torch.testing.assert_close(boxes, expected_votes(head.fc_reg.conv, features))


def shift_bins(pool: DeformPSRoIPoolPack, offset_class: int) -> None:
    """Moves all bins of a class by SHIFT of its units in x and by twice as much back in y."""
    bias = pool.conv_offset.bias.view(pool.num_classes, 2, -1)
    bias[offset_class, 0], bias[offset_class, 1] = SHIFT, -2 * SHIFT


@pytest.mark.parametrize("moved", range(CLASSES + 1))
@torch.no_grad()
def test_a_class_moves_its_own_bins_only(moved: int) -> None:
    """The last one is the background."""
    head, features = make_head("DeformPSRoIPoolPack"), feature_map()
    before, boxes = head(features, ROIS)
    assert head.fc_cls.pool.num_classes == CLASSES + 1
    shift_bins(head.fc_cls.pool, moved)
    scores, same_boxes = head(features, ROIS)
    others = [n for n in range(CLASSES + 1) if n != moved]
    assert torch.equal(scores[:, others], before[:, others])
    assert torch.equal(same_boxes, boxes)
    expected = expected_votes(head.fc_cls.conv, features, lambda n: (SHIFT, -2 * SHIFT))
    # The RoIs that the sampled offsets are pooled from lie inside the map, but for the last.
    torch.testing.assert_close(scores[:3, moved], expected[:3, moved])
    assert ((scores - before)[:, moved].abs() > 1e-3).all()


@pytest.mark.parametrize("agnostic", [True, False])
@torch.no_grad()
def test_all_numbers_of_a_box_move_together(agnostic: bool) -> None:
    head, features = make_head("DeformPSRoIPoolPack", agnostic), feature_map()
    scores, before = head(features, ROIS)
    assert head.fc_reg.pool.num_classes == 1
    shift_bins(head.fc_reg.pool, 0)
    same_scores, boxes = head(features, ROIS)
    assert torch.equal(same_scores, scores)
    expected = expected_votes(head.fc_reg.conv, features, lambda n: (SHIFT, -2 * SHIFT))
    torch.testing.assert_close(boxes[:3], expected[:3])
    assert ((boxes - before).abs() > 1e-4).all()


def test_parameters_by_name() -> None:
    convs = [
        f"{owner}.conv.{kind}" for owner in ("fc_cls", "fc_reg") for kind in ("weight", "bias")
    ]
    rigid = make_head()
    assert list(rigid.state_dict()) == convs
    assert rigid.fc_cls.conv.weight.shape == (CELLS**2 * (CLASSES + 1), 5, 1, 1)
    deformable = make_head("DeformPSRoIPoolPack")
    offsets = {name.replace("conv", "pool.conv_offset") for name in convs}
    assert set(deformable.state_dict()) == {*convs, *offsets}
    missing = deformable.load_state_dict(rigid.state_dict(), strict=False).missing_keys
    assert set(missing) == offsets
    features = feature_map()
    for got, expected in zip(deformable(features, ROIS), rigid(features, ROIS), strict=True):
        torch.testing.assert_close(got, expected)


def test_initial_values() -> None:
    head = make_head("DeformPSRoIPoolPack")
    head.init_weights()
    for branch in (head.fc_cls, head.fc_reg):
        assert branch.conv.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert not branch.conv.bias.any()
        assert not branch.pool.conv_offset.weight.any()
        assert not branch.pool.conv_offset.bias.any()


def test_options_reach_the_pooling() -> None:
    options = dict(offset_range=2.0, trans_std=0.3, group_size=2)
    head = make_head("DeformPSRoIPoolPack", roi_layer=options)
    for branch in (head.fc_cls, head.fc_reg):
        assert {name: getattr(branch.pool, name) for name in options} == options
        assert branch.pool.spatial_scale == 1 / STRIDE
        assert branch.pool.output_size == (CELLS, CELLS)
    assert head.fc_cls.conv.out_channels == 2**2 * (CLASSES + 1)
    scores, boxes = head(feature_map(), ROIS)
    assert scores.shape == (4, CLASSES + 1) and boxes.shape == (4, 4)
    head = make_head("DeformPSRoIPoolPack", roi_layer=dict(offset_clamp=1.0))
    assert head.fc_cls.pool.offset_clamp == head.fc_reg.pool.offset_clamp == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ohem=0), "ohem: expected a positive number of RoIs or None, got 0"),
        (dict(roi_layer=dict(type="RoIAlign")), "roi_layer.type: expected .* got 'RoIAlign'"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(**options)


@pytest.mark.parametrize("pool", ["DeformPSRoIPool", "DeformPSRoIPoolPack"])
@torch.no_grad()
def test_coordinates_stay_precise_in_bf16(pool: str) -> None:
    """At 1300 pixels bf16 knows every eighth only."""
    head = make_head(pool).float()
    nn.init.constant_(head.fc_cls.conv.weight, 0.2)
    nn.init.constant_(head.fc_reg.conv.weight, 0.2)
    features = torch.zeros(1, 5, 4, 340)
    features[..., 320:] = torch.arange(20.0)
    rois = torch.tensor([[0, 1301.0, 0.0, 1310.0, 9.0], [0, 1303.0, 0.0, 1313.0, 9.0]])
    precise = head(features, rois)
    with torch.autocast("cpu", torch.bfloat16):
        halves = head(features, rois)
    for got, expected in zip(halves, precise, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.1)
        assert ((expected[0] - expected[1]).abs() > 0.3).all()


# Hard examples


def examples(count: int, head: RFCNBBoxHead) -> tuple[Tensor, ...]:
    """Predictions and targets of RoIs; every third is of image 0, the others of image 1."""
    image = (torch.arange(count) % 3 > 0).double()
    rois = torch.cat([image[:, None], torch.rand(count, 4).double()], 1)
    scores = (3 * torch.randn(count, CLASSES + 1).double()).requires_grad_()
    width = 4 if head.reg_class_agnostic else 4 * CLASSES
    boxes = torch.randn(count, width).double().requires_grad_()
    labels = torch.randint(CLASSES + 1, (count,))
    weights = torch.ones(count).double()
    targets = torch.randn(count, 4).double()
    positive = (labels < CLASSES).double()[:, None].expand(count, 4)
    return scores, boxes, rois, labels, weights, targets * positive, positive


def brute_force_losses(inputs: tuple[Tensor, ...], kept: int) -> tuple[Tensor, Tensor, set[int]]:
    """Mean losses of class and box over the hardest RoIs of each image, and which these are."""
    scores, boxes, rois, labels, _, targets, _ = inputs
    of_class, of_box = [], []
    for n in range(len(rois)):
        of_class.append(-scores[n].log_softmax(0)[labels[n]])
        predicted = boxes[n].view(-1, 4)
        predicted = predicted[0 if len(predicted) == 1 else min(int(labels[n]), CLASSES - 1)]
        loss = F.smooth_l1_loss(predicted, targets[n], reduction="sum")
        of_box.append(loss if labels[n] < CLASSES else loss * 0)
    chosen: set[int] = set()
    for image in (0, 1):
        own = [n for n in range(len(rois)) if rois[n, 0] == image]
        own.sort(key=lambda n: float(of_class[n] + of_box[n]), reverse=True)
        chosen.update(own[:kept])
    return (
        sum(of_class[n] for n in chosen) / len(chosen),
        sum(of_box[n] for n in chosen) / len(chosen),
        chosen,
    )


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize(("count", "kept"), [(31, 5), (31, 1), (9, 5), (6, 128)])
def test_only_the_hardest_of_each_image_count(count: int, kept: int, agnostic: bool) -> None:
    head = make_head(agnostic=agnostic, ohem=kept)
    inputs = examples(count, head)
    losses = head.loss(*inputs)
    cls_loss, box_loss, chosen = brute_force_losses(inputs, kept)
    torch.testing.assert_close(losses["loss_cls"], cls_loss)
    torch.testing.assert_close(losses["loss_bbox"], box_loss)
    of_first = (count + 2) // 3
    assert len(chosen) == min(of_first, kept) + min(count - of_first, kept)
    gradients = torch.autograd.grad(losses["loss_cls"] + losses["loss_bbox"], inputs[:2])
    expected = torch.autograd.grad(cls_loss + box_loss, inputs[:2])
    torch.testing.assert_close(gradients, expected)
    learned = {n for n in range(count) if gradients[0][n].any()}
    assert learned == chosen
    hit = [int((inputs[3][n] == inputs[0][n].argmax()).item()) for n in chosen]
    assert losses["acc"].item() == pytest.approx(100 * sum(hit) / len(hit))


def test_boxes_decide_as_well_as_classes() -> None:
    head = make_head(ohem=1)
    scores, boxes, rois, labels, weights, targets, positive = examples(3, head)
    rois[:, 0], labels[:], positive = 0, torch.tensor([0, 1, CLASSES]), positive.clone()
    positive[:] = torch.tensor([1.0, 1.0, 0.0])[:, None]
    scores = torch.zeros_like(scores).requires_grad_()
    targets = torch.zeros_like(targets)
    targets[1], targets[2] = 3.0, 9.0  # the background has no box
    inputs = (scores, torch.zeros_like(boxes), rois, labels, weights, targets, positive)
    assert head.loss(*inputs)["loss_bbox"].item() == pytest.approx(4 * 2.5)


def test_without_hard_examples_losses_are_mmdets() -> None:
    head = make_head()
    inputs = examples(12, head)
    losses, theirs = head.loss(*inputs), super(RFCNBBoxHead, head).loss(*inputs)
    assert losses.keys() == theirs.keys()
    assert all(torch.equal(losses[key], theirs[key]) for key in theirs)


# The head and the detector


def test_head_reads_the_map_it_is_told() -> None:
    config = dict(
        type="mmdeform.RFCNRoIHead",
        bbox_head=dict(
            type="mmdeform.RFCNBBoxHead",
            in_channels=5,
            roi_layer=dict(type="mmdeform.DeformPSRoIPool", output_size=CELLS),
        ),
    )
    maps = [feature_map().float() for _ in range(3)]
    proposals = [InstanceData(bboxes=ROIS[ROIS[:, 0] == i, 1:].float()) for i in (0, 1)]
    rois = torch.cat([ROIS[ROIS[:, 0] == i] for i in (0, 1)]).float()
    for index, options in ((2, {}), (0, dict(in_index=0)), (1, dict(in_index=1))):
        head = MODELS.build(dict(config, **options))
        assert type(head) is RFCNRoIHead
        expected = head.bbox_head(maps[index], rois)
        torch.testing.assert_close(head(maps, proposals), expected)


def decided(head: RFCNBBoxHead, scores: list[float], boxes: list[float]) -> RFCNBBoxHead:
    """A head that says the same of every RoI."""
    for branch, values in ((head.fc_cls, scores), (head.fc_reg, boxes)):
        nn.init.zeros_(branch.conv.weight)
        branch.conv.bias.data = torch.tensor(values).repeat_interleave(CELLS**2).double()
    return head


def detect(bbox_head: RFCNBBoxHead, proposals: Tensor) -> InstanceData:
    head = RFCNRoIHead(
        bbox_head=dict(
            type="mmdeform.RFCNBBoxHead",
            in_channels=5,
            roi_layer=dict(type="mmdeform.DeformPSRoIPool", output_size=CELLS),
        ),
        test_cfg=ConfigDict(
            score_thr=0.05, nms=dict(type="nms", iou_threshold=0.3), max_per_img=10
        ),
    )
    head.bbox_head = bbox_head.float()  # mmcv's NMS knows no other dtype
    sample = DetDataSample(metainfo=META)
    with torch.no_grad():
        (result,) = head.predict(
            [torch.zeros(1, 5, 16, 24)], [InstanceData(bboxes=proposals)], [sample], rescale=False
        )
    return result


PROPOSALS = torch.tensor([[8.0, 8, 28, 28], [9, 8, 29, 28], [50, 20, 80, 60]])


def test_detections_are_decoded_and_thinned_out() -> None:
    head = decided(make_head(), [0.0, 0.0, 9.0, 0.0], [1.0, 0.0, 0.0, 0.0])  # dx = 0.1 widths
    result = detect(head, PROPOSALS)
    assert result.labels.tolist() == [2, 2]
    expected = torch.tensor([[10.0, 8, 30, 28], [53, 20, 83, 60]])
    torch.testing.assert_close(result.bboxes, expected)
    likely = torch.tensor([0.0, 0, 9, 0]).softmax(0)[2].item()
    assert result.scores.tolist() == pytest.approx([likely] * 2, rel=1e-4)


def test_the_last_score_is_the_backgrounds() -> None:
    head = decided(make_head(), [0.0, 0.0, 0.0, 9.0], [0.0] * 4)
    assert len(detect(head, PROPOSALS).scores) == 0


def test_boxes_of_a_class_are_its_own() -> None:
    deltas = [[0.0] * 4, [0.0, 0.0, 5 * math.log(2), 0.0], [0.0] * 4]
    scores = [0.0, 9.0, 0.0, 0.0]
    head = decided(make_head(agnostic=False), scores, [number for box in deltas for number in box])
    result = detect(head, PROPOSALS[2:])
    assert result.labels.tolist() == [1]
    torch.testing.assert_close(result.bboxes, torch.tensor([[35.0, 20, 95, 60]]))


def detector(pool: str, **bbox_head) -> RFCN:
    cfg = Config.fromfile(MODEL).model
    cfg.backbone.base_channels = cfg.backbone.stem_channels = 4
    cfg.neck.update(in_channels=128, out_channels=16)
    cfg.rpn_head.update(in_channels=64, feat_channels=8)
    cfg.roi_head.bbox_head.update(in_channels=16, **bbox_head)
    cfg.roi_head.bbox_head.roi_layer.type = f"mmdeform.{pool}"
    model = MODELS.build(cfg)
    assert type(model) is RFCN
    return model


def batch(boxes: list[list[float]]) -> dict:
    samples = []
    for _ in range(2):
        instances = InstanceData(
            bboxes=torch.tensor(boxes).view(-1, 4), labels=torch.zeros(len(boxes), dtype=torch.long)
        )
        samples.append(DetDataSample(metainfo=META, gt_instances=instances))
    return dict(batch_inputs=torch.randn(2, 3, 64, 96), batch_data_samples=samples)


def total(losses: dict) -> Tensor:
    return sum(sum(v) if isinstance(v, list) else v for k, v in losses.items() if "loss" in k)


@pytest.mark.parametrize("boxes", [[[5.0, 8.0, 30.0, 40.0]], []], ids=["objects", "empty"])
@pytest.mark.parametrize("pool", ["DeformPSRoIPool", "DeformPSRoIPoolPack"])
def test_losses_reach_everything(pool: str, boxes: list) -> None:
    model = detector(pool)
    model.init_weights()
    total(model.loss(**batch(boxes))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    head = model.roi_head.bbox_head
    assert head.fc_cls.conv.weight.grad.any()
    assert head.fc_reg.conv.weight.grad.any() == bool(boxes)
    if pool == "DeformPSRoIPoolPack":
        assert head.fc_cls.pool.conv_offset.weight.grad.any()
        assert head.fc_reg.pool.conv_offset.weight.grad.any() == bool(boxes)


@pytest.mark.parametrize("ohem", [None, 4])
def test_no_proposals_keep_the_graph(ohem: int | None) -> None:
    model = detector("DeformPSRoIPoolPack", ohem=ohem)
    inputs = batch([])
    maps = model.extract_feat(inputs["batch_inputs"])
    nothing = [InstanceData(bboxes=torch.zeros(0, 4)) for _ in range(2)]
    losses = model.roi_head.loss(maps, nothing, inputs["batch_data_samples"])
    assert losses["loss_cls"] == losses["loss_bbox"] == 0
    total(losses).backward()
    for name, parameter in model.roi_head.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    nothing = [InstanceData(bboxes=torch.zeros(0, 4)) for _ in range(2)]
    with torch.no_grad():
        results = model.roi_head.predict(maps, nothing, inputs["batch_data_samples"])
    assert [len(result.bboxes) for result in results] == [0, 0]


def test_sampler_of_the_config_keeps_all_proposals_and_objects() -> None:
    model = detector("DeformPSRoIPool", ohem=None)
    seen = []
    hook = model.roi_head.bbox_head.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    boxes = [[5.0, 8.0, 30.0, 40.0], [50.0, 8.0, 80.0, 40.0]]
    inputs = batch(boxes)
    maps = model.extract_feat(inputs["batch_inputs"])
    proposals = torch.rand(40, 4) * 30
    proposals[:, 2:] += proposals[:, :2] + 5
    regions = [InstanceData(bboxes=proposals.clone()) for _ in range(2)]
    model.roi_head.loss(maps, regions, inputs["batch_data_samples"])
    hook.remove()
    (rois,) = seen
    rows = {tuple(row) for row in rois[rois[:, 0] == 1, 1:].tolist()}
    assert len(rois) == 2 * 42
    assert rows == {tuple(row) for row in [*proposals.tolist(), *torch.tensor(boxes).tolist()]}


def test_layers_tell_where_they_sample() -> None:
    found = deformable_layers(detector("DeformPSRoIPoolPack"))
    prefix = "roi_head.bbox_head."
    assert list(found) == [f"{prefix}fc_cls.pool", f"{prefix}fc_reg.pool"]
    assert all(isinstance(layer, DeformPSRoIPool) for layer in found.values())
