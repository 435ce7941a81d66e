"""R-CNN feature mimicking: both losses by hand, who learns from them, and nothing at inference."""

import contextlib
import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import get_state_dict
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdeform.models.roi_heads import mimicking_roi_head
from mmdeform.models.roi_heads.crops import crop_boxes
from mmdeform.models.roi_heads.feature_mimicking import FeatureMimicking

BASES = Path(__file__).parents[2] / "configs/_base_/models"
CLASSIFIER = {f"roi_head.mimicking.fc_cls.{name}" for name in ("weight", "bias")}
LOSSES = ("loss_mimic", "loss_rcnn_cls")
MDPOOL = dict(
    type="mmdeform.ModulatedDeformRoIPoolPack",
    output_size=7,
    output_channels=64,
    deform_fc_channels=8,
    head="paper",
)


@pytest.fixture(autouse=True)
def mmdet_scope() -> None:
    init_default_scope("mmdet")


@pytest.fixture(autouse=True)
def no_run() -> Iterator[None]:
    """A training that stopped with an error leaves behind that it runs."""
    with patch.object(MessageHub, "_instance_dict", OrderedDict()):
        yield


def config(
    kind: str = "faster", fpn: bool = False, roi_layer: dict | None = None, **mimicking: Any
) -> dict:
    """The small detectors of the configs on a thin ResNet-18; without options plain ones."""
    cfg = Config.fromfile(BASES / f"{kind}-rcnn_r50{'' if fpn else '-dc5'}-small.py").model
    cfg.backbone.update(depth=18, base_channels=8, stem_channels=8)
    if fpn:
        cfg.neck.in_channels = [8, 16, 32, 64]
    else:
        cfg.neck.in_channels = 64
        cfg.rpn_head.in_channels = 32
    if roi_layer is not None:
        extractor = cfg.roi_head.bbox_roi_extractor
        extractor.update(type="mmdeform.SingleRoIExtractor", roi_layer=roi_layer)
    if mimicking:
        cfg.type = f"mmdeform.{cfg.type}"
        cfg.roi_head.update(type="mmdeform.MimickingRoIHead", mimicking=mimicking)
    return cfg


def detector(*args: Any, crop_size: int = 40, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS.build(config(*args, crop_size=crop_size, **kwargs))
    model.init_weights()
    for parameter in model.parameters():
        if not parameter.any():  # what starts as zero, such as offsets, would hide mistakes
            nn.init.normal_(parameter, std=0.05)
    return model


def plain_twin(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    twin = MODELS.build(config(*args, **kwargs))
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k not in CLASSIFIER})
    return twin


def batch(model: nn.Module, items: tuple[int, int] = (2, 3)) -> dict[str, Any]:
    """Two images of different size, padded to a common one."""
    shapes = [(3, 80, 112), (3, 96, 70)]
    data = demo_mm_inputs(2, shapes, list(items), num_classes=5, with_mask=True)
    return model.data_preprocessor(data, training=True)


def losses_of(model: nn.Module, data: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return model(**copy.deepcopy(data), mode="loss")


@contextlib.contextmanager
def recorded(module: nn.Module, method: str) -> Iterator[list]:
    """The positional arguments of each call of a method."""
    calls: list = []
    original = getattr(module, method)

    def call(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    with patch.object(module, method, call):
        yield calls


def proposals_around(boxes: Tensor, count: int, shift: float) -> InstanceData:
    """Proposals next to each of the boxes, all shifted differently."""
    shifts = torch.rand(count, 1, 4, generator=torch.Generator().manual_seed(3)) * shift
    return InstanceData(bboxes=(boxes + shifts).reshape(-1, 4))


# Crops.


@pytest.mark.parametrize("size", [5, 8, 40])
def test_crop_is_the_patch_resized(size: int) -> None:
    image = torch.randn(3, 30, 40)
    boxes = torch.tensor([[4.0, 7, 21, 15], [0, 0, 40, 30], [39, 2, 40, 30]])
    expected = [
        F.interpolate(
            image[None, :, int(y1) : int(y2), int(x1) : int(x2)], (size, size), mode="bilinear"
        )
        for x1, y1, x2, y2 in boxes.tolist()
    ]
    torch.testing.assert_close(crop_boxes(image, boxes, size), torch.cat(expected))


def sampled_by_hand(image: Tensor, box: list[float], size: int) -> Tensor:
    """Bilinear samples at the centres of size x size cells of a box that lies in the image."""
    weights = []
    for start, end, length in ((box[1], box[3], image.shape[1]), (box[0], box[2], image.shape[2])):
        axis = torch.zeros(size, length, dtype=image.dtype)
        for i in range(size):
            at = start + (i + 0.5) * (end - start) / size
            at = min(max(at, start + 0.5), end - 0.5) - 0.5  # pixel i has its centre at i + 0.5
            low = min(int(at), length - 1)
            axis[i, low] += 1 - (at - low)
            if at > low:
                axis[i, low + 1] += at - low
        weights.append(axis)
    return torch.einsum("yh,chw,xw->cyx", weights[0], image, weights[1])


def test_crop_of_a_fractional_box() -> None:
    image = torch.randn(2, 20, 30, dtype=torch.float64)
    box = [3.3, 2.8, 17.6, 19.9]
    got = crop_boxes(image, torch.tensor([box], dtype=torch.float64), 9)
    torch.testing.assert_close(got[0], sampled_by_hand(image, box, 9))


@pytest.mark.parametrize(
    ("box", "remains"),
    [
        ([-50, -9, 100, 900], [0, 0, 30, 20]),
        ([-50, 3, -40, 8], [0, 3, 1, 8]),
        ([31, 22, 40, 40], [29, 19, 30, 20]),
        ([7, 5, 7, 5], [7, 5, 8, 6]),
        ([9, 5, 2, 1], [9, 5, 10, 6]),  # upside down
        ([29.8, 19.9, 30, 20], [29, 19, 30, 20]),
    ],
)
def test_boxes_end_at_the_image_and_have_a_pixel(box: list[float], remains: list[float]) -> None:
    image = torch.randn(3, 20, 30)
    got, expected = (crop_boxes(image, torch.tensor([b]).float(), 6) for b in (box, remains))
    torch.testing.assert_close(got, expected)
    assert got.isfinite().all() and got.any()


def test_no_boxes_no_crops() -> None:
    assert crop_boxes(torch.randn(3, 20, 30), torch.zeros(0, 4), 6).shape == (0, 3, 6, 6)


# Losses.


def head_features(head: nn.Module, pooled: Tensor) -> Tensor:
    feats = pooled.flatten(1)
    for fc in head.bbox_head.shared_fcs:
        feats = (feats @ fc.weight.T + fc.bias).clamp(min=0)
    return feats


VARIANTS = {
    "dc5": dict(kind="faster"),
    "dc5-mdpool": dict(kind="faster", roi_layer=MDPOOL),
    "fpn": dict(kind="faster", fpn=True),
    "mask-fpn-mdpool": dict(kind="mask", fpn=True, roi_layer=MDPOOL),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_losses_by_hand(variant: dict) -> None:
    size = 40
    model = detector(**variant, crop_size=size, num_proposals=100, loss_weight=0.3)
    data, head = batch(model), model.roi_head
    with recorded(head, "bbox_loss") as calls:
        losses = losses_of(model, data)
    ((maps, sampling_results),) = calls

    boxes = [(i, box) for i, r in enumerate(sampling_results) for box in r.pos_priors.tolist()]
    labels = torch.cat([result.pos_gt_labels for result in sampling_results])
    crops = []
    for i, (x1, y1, x2, y2) in boxes:
        height, width = data["data_samples"][i].img_shape
        box = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
        crops.append(sampled_by_hand(data["inputs"][i, :, :height, :width], box, size))
    crop_maps = model.neck(model.backbone(torch.stack(crops)))

    layers = head.bbox_roi_extractor.roi_layers
    crop_level = level_of(math.sqrt(size * size), len(layers))
    offset = 0 if variant.get("fpn") else 1  # c5 is the second map
    feats, crop_feats = [], []
    for n, (i, (x1, y1, x2, y2)) in enumerate(boxes):
        level = level_of(math.sqrt((x2 - x1) * (y2 - y1)), len(layers))
        roi = torch.tensor([[i, x1, y1, x2, y2]])
        feats.append(head_features(head, layers[level](maps[level + offset], roi)))
        roi = torch.tensor([[n, 0.0, 0, size, size]])
        pooled = layers[crop_level](crop_maps[crop_level + offset], roi)
        crop_feats.append(head_features(head, pooled))
    feats, crop_feats = torch.cat(feats), torch.cat(crop_feats)

    cosine = (feats * crop_feats).sum(1) / (feats.norm(dim=1) * crop_feats.norm(dim=1))
    assert len(boxes) >= 5 and cosine.min() > 0 and cosine.max() < 0.999
    classifier = head.mimicking.fc_cls
    scores = (crop_feats @ classifier.weight.T + classifier.bias).exp()
    chances = scores[range(len(labels)), labels] / scores.sum(1)
    tolerances = dict(atol=1e-5, rtol=1e-4)
    expected = 0.3 * (1 - cosine).sum() / 2
    torch.testing.assert_close(losses["loss_mimic"], expected, **tolerances)
    expected = -0.1 * chances.log().mean()
    torch.testing.assert_close(losses["loss_rcnn_cls"], expected, **tolerances)


def level_of(scale: float, levels: int) -> int:
    return 0 if levels == 1 else min(max(math.floor(math.log2(scale / 32 + 1e-6)), 0), levels - 1)


def test_other_losses_are_those_of_mmdet() -> None:
    model = detector("mask", fpn=True)
    twin = plain_twin(model, "mask", fpn=True)
    data = batch(model)
    # Proposals are chosen last: until then both draw the same random numbers.
    ours, theirs = losses_of(model, data), losses_of(twin, data)
    assert set(ours) - set(theirs) == set(LOSSES)
    for name, loss in theirs.items():
        assert str(ours[name]) == str(loss), name
    # Running statistics, which inference uses, have not seen the crops.
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert model.backbone.bn1.num_batches_tracked == 1


def test_mimicking_sums_over_an_image_and_averages_over_images() -> None:
    mimicking = FeatureMimicking(4, 3, loss_weight=0.5)
    feats, crop_feats, labels = torch.rand(6, 4), torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    cosine = (feats * crop_feats).sum(1) / feats.norm(dim=1) / crop_feats.norm(dim=1)
    got = mimicking(feats, crop_feats, labels, 3)
    torch.testing.assert_close(got["loss_mimic"], 0.5 * (1 - cosine).sum() / 3)
    logits = mimicking.fc_cls(crop_feats)
    torch.testing.assert_close(got["loss_rcnn_cls"], 0.1 * F.cross_entropy(logits, labels))


def test_settings_of_the_paper_are_the_defaults() -> None:
    mimicking = FeatureMimicking(1024, 80)
    assert mimicking.num_proposals == 32 and mimicking.crop_size == 224
    assert mimicking.loss_weight == 0.1 and mimicking.loss_cls.loss_weight == 0.1
    assert mimicking.fc_cls.weight.shape == (81, 1024)
    mimicking.init_weights()
    assert mimicking.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_loss_of_the_classifier_is_chosen_by_config() -> None:
    loss = dict(type="CrossEntropyLoss", loss_weight=2.0, class_weight=[1.0, 0.0, 1.0])
    mimicking = FeatureMimicking(4, 2, loss_cls=loss)
    feats, labels = torch.rand(2, 4), torch.tensor([0, 1])
    got = mimicking(feats, feats, labels, 1)["loss_rcnn_cls"]
    torch.testing.assert_close(got, F.cross_entropy(mimicking.fc_cls(feats[:1]), labels[:1]))


# Gradients.


def gradients_of(model: nn.Module, loss: Tensor) -> set[str]:
    """Names of the parameters that get a gradient other than zero."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, parameters.values(), retain_graph=True, allow_unused=True)
    return {
        name
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None and gradient.any()
    }


@pytest.mark.parametrize("roi_layer", [None, MDPOOL], ids=["align", "mdpool"])
def test_who_learns_from_what(roi_layer: dict | None) -> None:
    model = detector(roi_layer=roi_layer)
    losses = losses_of(model, batch(model))
    features = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("backbone", "neck", "roi_head.bbox_roi_extractor"))
        or "shared_fcs" in name
    }
    assert gradients_of(model, losses["loss_mimic"]) == features
    assert gradients_of(model, losses["loss_rcnn_cls"]) == features | CLASSIFIER
    others = {name: loss for name, loss in losses.items() if name not in LOSSES}
    assert not gradients_of(model, model.parse_losses(others)[0]) & CLASSIFIER


def test_both_branches_learn() -> None:
    model = detector()
    with recorded(model.roi_head.mimicking, "forward") as calls:
        losses = losses_of(model, batch(model))
    ((feats, crop_feats, *_),) = calls
    for gradient in torch.autograd.grad(losses["loss_mimic"], [feats, crop_feats]):
        assert (gradient.abs().sum(1) > 0).all()


def test_features_without_length_have_no_gradient_that_explodes() -> None:
    mimicking = FeatureMimicking(4, 2)
    inputs = torch.full((2, 4), -1.0, requires_grad=True)
    losses = mimicking(inputs.relu(), torch.rand(2, 4), torch.tensor([0, 1]), 1)
    assert losses["loss_mimic"].item() == pytest.approx(0.1 * 2)
    losses["loss_mimic"].backward()
    assert not inputs.grad.any()


@pytest.mark.parametrize("roi_layer", [None, MDPOOL], ids=["align", "mdpool"])
@pytest.mark.parametrize("fpn", [False, True], ids=["dc5", "fpn"])
def test_no_positive_gives_zero_and_reaches_everything(fpn: bool, roi_layer: dict | None) -> None:
    model = detector(fpn=fpn, roi_layer=roi_layer)
    losses = losses_of(model, batch(model, items=(0, 0)))
    assert all(losses[name] == 0 for name in LOSSES)
    total, _ = model.parse_losses(losses)
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name in CLASSIFIER:
        assert not model.get_parameter(name).grad.any()


def test_image_without_positives_beside_one_with() -> None:
    model = detector(num_proposals=1)
    with recorded(model.roi_head.mimicking, "forward") as calls:
        losses = losses_of(model, batch(model, items=(0, 3)))
    ((feats, crop_feats, labels, num_images),) = calls
    assert len(feats) == len(crop_feats) == len(labels) == 1 and num_images == 2
    assert losses["loss_mimic"] > 0


# Proposals.


def chosen_boxes(model: nn.Module, seed: int) -> tuple[list[Tensor], list[Any]]:
    """Boxes of each image that are cropped, of many positives and negatives, and the samples."""
    data = batch(model)
    maps = model.extract_feat(data["inputs"])
    proposals = []
    for sample in data["data_samples"]:
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[5.0, 6, 45, 50], [30, 20, 65, 75]]), labels=torch.tensor([1, 4])
        )
        near = proposals_around(sample.gt_instances.bboxes, 20, shift=6)
        far = proposals_around(torch.tensor([[0.0, 60, 12, 70]]), 30, shift=6)
        proposals.append(InstanceData.cat([near, far]))
    torch.manual_seed(seed)
    head = model.roi_head
    boxes: list[Tensor] = []

    def spy(image: Tensor, own: Tensor, size: int) -> Tensor:
        boxes.append(own)
        return crop_boxes(image, own, size)

    with (
        recorded(head, "bbox_loss") as calls,
        patch.object(mimicking_roi_head, "crop_boxes", spy),
        head.watching(model, data["inputs"], data["data_samples"]),
    ):
        head.loss(maps, proposals, data["data_samples"])
    return boxes, calls[0][1]


def test_few_positives_are_chosen_at_random() -> None:
    model = detector(num_proposals=3)
    chosen, sampling_results = chosen_boxes(model, seed=0)
    for boxes, result in zip(chosen, sampling_results, strict=True):
        assert len(result.pos_priors) == 16 and len(result.neg_priors) > 16
        positives = {tuple(box) for box in result.pos_priors.tolist()}
        assert len({tuple(box) for box in boxes.tolist()} & positives) == 3 == len(boxes)

    again, _ = chosen_boxes(model, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))
    picks = [FeatureMimicking.choose(model.roi_head.mimicking, 16).tolist() for _ in range(40)]
    assert len({tuple(pick) for pick in picks}) > 20
    assert {index for pick in picks for index in pick} == set(range(16))


def test_labels_belong_to_their_proposals() -> None:
    model = detector(num_proposals=6)
    with recorded(model.roi_head.mimicking, "forward") as calls:
        chosen, sampling_results = chosen_boxes(model, seed=1)
    labels = iter(calls[0][2].tolist())
    for boxes, result in zip(chosen, sampling_results, strict=True):
        for box in boxes:
            (index,) = (result.pos_priors == box).all(1).nonzero()
            assert next(labels) == result.pos_gt_labels[index]
    assert len({1, 4} & set(calls[0][2].tolist())) == 2


def head_losses(
    model: nn.Module, maps: list[Tensor], images: Tensor, data: dict[str, Any]
) -> dict[str, Tensor]:
    """Losses of the RoI head alone; ground truth is what is positive."""
    torch.manual_seed(0)
    samples = copy.deepcopy(data["data_samples"])
    proposals = [InstanceData(bboxes=torch.tensor([[0.0, 0, 4, 4]])) for _ in samples]
    with model.roi_head.watching(model, images, samples):
        return model.roi_head.loss(maps, proposals, samples)


def test_padding_is_not_read() -> None:
    model = detector(num_proposals=100)
    data = batch(model)
    dirty = data["inputs"].clone()
    for image, sample in zip(dirty, data["data_samples"], strict=True):
        height, width = sample.img_shape
        assert (height, width) != tuple(image.shape[1:])
        image[:, height:], image[:, :, width:] = torch.nan, torch.nan
        # Boxes up to the border of the image and beyond.
        sample.gt_instances.bboxes[0] = torch.tensor([10.0, 10, width + 9, height + 9])
    maps = model.extract_feat(data["inputs"])
    clean, unclean = (head_losses(model, maps, images, data) for images in (data["inputs"], dirty))
    for name in LOSSES:
        assert torch.equal(clean[name], unclean[name]) and clean[name] > 0


# Inference and state dicts.


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_inference_is_that_of_the_plain_detector(variant: dict) -> None:
    model = detector(**variant)
    losses_of(model, batch(model))  # moves running statistics
    twin = plain_twin(model, **variant)
    model.eval(), twin.eval()
    assert list(model.state_dict()) == list(twin.state_dict())
    data = batch(model)
    results, calls = [], []
    for net in (model, twin):
        counts: Counter[str] = Counter()
        for name, module in net.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name, c=counts: c.update([name]))
        with torch.no_grad():
            results.append(net(**copy.deepcopy(data), mode="predict"))
        calls.append(counts)
    assert calls[0] == calls[1] and not any("mimicking" in name for name in calls[0])
    for ours, theirs in zip(*results, strict=True):
        assert len(theirs.pred_instances) > 0
        for key, value in theirs.pred_instances.items():
            assert torch.equal(ours.pred_instances[key], value), key


def test_state_dict_holds_the_classifier_while_it_is_trained() -> None:
    model = detector()
    plain = set(plain_twin(model).state_dict())
    for state_dict in (nn.Module.state_dict, get_state_dict):  # torch's and mmengine's
        assert set(state_dict(model.train())) - plain == CLASSIFIER
        assert set(state_dict(model.eval())) == plain
    model.train().roi_head.mimicking.requires_grad_(False)
    assert set(model.state_dict()) == plain


@pytest.mark.parametrize(("stage", "held"), [("train", True), ("val", True), ("test", False)])
def test_evaluation_within_a_run_keeps_the_classifier(stage: str, held: bool) -> None:
    model = detector().eval()
    MessageHub.get_current_instance().update_info("loop_stage", stage)
    assert len(CLASSIFIER & set(model.state_dict())) == (2 if held else 0)


@pytest.mark.parametrize("training", [True, False])
def test_state_dicts_load_strictly(training: bool) -> None:
    source, model = detector(seed=1), detector().train(training)
    mimicking = model.roi_head.mimicking
    before = copy.deepcopy(mimicking.fc_cls)
    model.load_state_dict(source.eval().state_dict(), strict=True)
    assert torch.equal(mimicking.fc_cls.weight, before.weight)
    assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight)
    model.load_state_dict(source.train().state_dict(), strict=True)
    assert torch.equal(mimicking.fc_cls.weight, source.roi_head.mimicking.fc_cls.weight)
    assert torch.equal(mimicking.fc_cls.bias, source.roi_head.mimicking.fc_cls.bias)
    half = source.state_dict()
    del half["roi_head.mimicking.fc_cls.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*mimicking\.fc_cls\.bias"):
        model.load_state_dict(half, strict=True)


def test_moving_average_is_a_plain_detector() -> None:
    model = detector()
    average = ExponentialMovingAverage(model, momentum=0.5, update_buffers=True)
    average.update_parameters(model)
    expected = {f"module.{name}" for name in plain_twin(model).state_dict()}
    assert set(average.state_dict()) == expected | {"steps"}


class Score(BaseMetric):
    """The same score after every epoch."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return dict(score=1.0)


class SeedEpochs(Hook):
    """mmengine does not resume the state of random numbers."""

    def before_train_epoch(self, runner: Runner) -> None:
        torch.manual_seed(runner.epoch)


def train(work_dir: Path, epochs: int, resume: bool = False) -> nn.Module:
    model = detector()
    data = demo_mm_inputs(2, (3, 64, 64), [2, 2], num_classes=5, with_mask=True)
    loader = DataLoader(
        list(zip(data["inputs"], data["data_samples"], strict=True)),
        batch_size=1,
        # Copies: mmdet writes into the samples.
        collate_fn=lambda items: dict(
            zip(("inputs", "data_samples"), copy.deepcopy([*zip(*items, strict=True)]), strict=True)
        ),
    )
    with patch("mmengine.runner.runner.collect_env", return_value={}):  # it takes a second
        runner = Runner(
            model,
            str(work_dir),
            train_dataloader=loader,
            val_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            val_cfg=dict(),
            val_evaluator=[Score()],
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9)),
            default_hooks=dict(
                checkpoint=dict(
                    type="CheckpointHook", interval=1, save_best="score", rule="greater"
                )
            ),
            custom_hooks=[SeedEpochs(), dict(type="EMAHook", momentum=0.5)],
            resume=resume,
            experiment_name=f"{work_dir.name}{epochs}{resume}",
            default_scope="mmdet",
        )
        runner.train()
    return model


def test_interrupted_training_loses_nothing(tmp_path: Path) -> None:
    trained = train(tmp_path / "whole", 2)
    train(tmp_path / "interrupted", 1)
    train(tmp_path / "interrupted", 2, resume=True)
    names = ["whole/epoch_2", "interrupted/epoch_2", "whole/epoch_1", "whole/best_score_epoch_1"]
    whole, resumed, first, best = (
        torch.load(tmp_path / f"{name}.pth", weights_only=False) for name in names
    )
    for kind in ("state_dict", "ema_state_dict"):
        assert set(resumed[kind]) == set(whole[kind])
        for name, value in whole[kind].items():
            assert torch.equal(resumed[kind][name], value), name
    for name in CLASSIFIER:  # has learned in the second epoch
        assert not torch.equal(first["state_dict"][name], whole["state_dict"][name])
    states = [checkpoint["optimizer"]["state"] for checkpoint in (resumed, whole)]
    assert len(states[0]) == len(states[1]) == len(list(trained.parameters()))
    for index, state in states[1].items():
        assert torch.equal(states[0][index]["momentum_buffer"], state["momentum_buffer"])

    # What has the best score is saved in evaluation mode, and its epoch's checkpoint once more.
    twin = MODELS.build(config())
    plain = set(twin.state_dict())
    for name, checkpoint in zip(names, (whole, resumed, first, best), strict=True):
        assert set(checkpoint["state_dict"]) == plain | CLASSIFIER
        load_checkpoint(twin, str(tmp_path / f"{name}.pth"))
        for key, value in twin.state_dict().items():
            assert torch.equal(value, checkpoint["state_dict"][key]), key
    assert set(trained.eval().state_dict()) == plain


# Mistakes.


def test_plain_detector_is_refused() -> None:
    cfg = config(crop_size=24)
    cfg.type = "FasterRCNN"
    model = MODELS.build(cfg)
    with pytest.raises(RuntimeError, match=r"type mmdeform\.FasterRCNN or mmdeform\.MaskRCNN"):
        losses_of(model, batch(model))


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_detector_without_mimicking_is_mmdets(kind: str) -> None:
    model = plain_twin(detector(kind, fpn=True), kind, fpn=True)
    ours = config(kind, fpn=True)
    ours.type = f"mmdeform.{ours.type}"
    twin = MODELS.build(ours)
    twin.load_state_dict(model.state_dict())
    data = batch(model)
    assert str(losses_of(model, data)) == str(losses_of(twin, data))


def test_head_needs_shared_layers() -> None:
    cfg = config(crop_size=24)
    cfg.roi_head.bbox_head.update(type="ConvFCBBoxHead", num_cls_fcs=1)
    with pytest.raises(ValueError, match=r"shared fully connected layers .* got ConvFCBBoxHead"):
        MODELS.build(cfg)


def test_cascade_is_refused() -> None:
    cfg = config(crop_size=24)
    cfg.roi_head.bbox_head = [cfg.roi_head.bbox_head] * 3
    with pytest.raises(ValueError, match="expects one head, got 3 of a cascade"):
        MODELS.build(cfg)


def test_nothing_is_left_behind() -> None:
    model = detector()
    data = batch(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    losses_of(model, data)
    with (
        patch.object(FeatureMimicking, "forward", side_effect=ArithmeticError),
        pytest.raises(ArithmeticError),
    ):
        losses_of(model, data)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    names = [name for name, _ in model.named_modules()]
    assert len(names) == len(set(names))
    with pytest.raises(RuntimeError, match="needs the images"):
        model.roi_head.bbox_loss((), [])


def test_mixed_precision() -> None:
    model = detector(roi_layer=MDPOOL, num_proposals=100)
    data = batch(model)
    losses = []
    for enabled in (False, True):  # without the RPN, whose NMS does not know bf16
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            maps = model.extract_feat(data["inputs"])
            losses.append(head_losses(model, maps, data["inputs"], data))
    for name in LOSSES:
        assert losses[1][name].dtype == torch.float32
        torch.testing.assert_close(losses[1][name], losses[0][name], rtol=0.05, atol=0.0)
    sum(losses[1][name] for name in LOSSES).backward()
    for parameter in model.roi_head.mimicking.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any()
