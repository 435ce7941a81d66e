"""mmdet's models compute with ``mmdeform.accelerate`` what they compute without.

Each model is that of a config of mmdet, reduced in size only. It runs twice in one process, first
as mmcv made it: losses, the gradients of all parameters and predictions agree to fp32 rounding,
and the operators are called as often as mmcv's.
"""

import collections
import contextlib
import copy
import dataclasses
import importlib
import logging
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
import mmdet
from mmdet.models.dense_heads import atss_vlfusion_head
from mmengine.logging import MessageHub
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdeform import accelerate, ops

from .language import WordConfig
from .models import reduced_model, samples


@dataclasses.dataclass(frozen=True)
class Case:
    """A config of mmdet.

    Attributes:
        config: File below mmdet's folder of configs.
        operator: What it calls.
        size: Height of the images.
        kinds: Annotations beside boxes.
        model: Settings beside the general reduction.
        predicts: False where mmdet cannot predict on the CPU.
    """

    config: str
    operator: str = "deform_conv2d"
    size: int = 64
    kinds: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    predicts: bool = True

    def __str__(self) -> str:
        return self.config.removesuffix(".py")


# Position embeddings of two-stage transformers are made for 256 channels.
WIDE = dict(shrink=1)
# GLIP compares texts of up to 256 tokens with as many channels.
THIN_SWIN = {**WIDE, "backbone.embed_dims": 24, "neck.in_channels": [48, 96, 192]}
MASKS = dict(with_mask=True)
WORDS = dict(texts=[("cat", "dog", "car")] * 2, custom_entities=True)

CASES = [
    Case("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", "ms_deform_attn"),
    Case("deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py", "ms_deform_attn"),
    Case(
        "deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py",
        "ms_deform_attn",
        model=WIDE,
    ),
    Case("dino/dino-4scale_r50_8xb2-12e_coco.py", "ms_deform_attn", model=WIDE),
    Case("ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py", "ms_deform_attn"),
    Case(
        "grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py",
        "ms_deform_attn",
        kinds=WORDS,
        model=WIDE,
    ),
    Case("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", "ms_deform_attn", kinds=MASKS),
    Case("tood/tood_r50_fpn_1x_coco.py"),
    Case("tood/tood_r50_fpn_anchor-based_1x_coco.py"),
    Case("reppoints/reppoints-moment_r50_fpn_1x_coco.py"),
    Case("vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py"),
    Case("guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py", predicts=False),
    Case("guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py", predicts=False),
    Case("foveabox/fovea_r50_fpn_gn-head-align_4xb4-2x_coco.py"),
    Case("dyhead/atss_r50_fpn_dyhead_1x_coco.py"),
    Case("cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py"),
    Case("centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py"),
    Case("detectors/detectors_cascade-rcnn_r50_1x_coco.py", size=96),
    Case("detectors/cascade-rcnn_r50-sac_1x_coco.py", size=96),
    Case(
        "solov2/solov2-light_r50-dcn_fpn_ms-3x_coco.py",
        size=96,
        kinds=MASKS,
        model={"mask_head.num_grids": [12, 8, 6, 4, 4]},
    ),
    Case(
        "ddod/ddod_r50_fpn_1x_coco.py",
        size=96,
        # mmcv's deformable convolution v1 refuses maps smaller than its kernel.
        model={"neck.num_outs": 3, "bbox_head.anchor_generator.strides": [8, 16, 32]},
    ),
    Case(
        "centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py",
        size=128,
        # A box is a pair of corners of one class that agree on its centre: rare at random.
        model={
            "backbone.feat_channel": 64,
            "bbox_head.num_classes": 3,
            "test_cfg.distance_threshold": 100.0,
        },
    ),
    Case("dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py", size=96),
    Case("dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py", size=96, kinds=MASKS),
    Case("dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py"),
    Case("dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py", kinds=MASKS),
    Case("dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py", "deform_roi_pool"),
    # The gradient by a position jumps at every pixel; on images of 64 one sample is that near.
    Case("dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py", "deform_roi_pool", size=96),
    Case("fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py"),
    Case(
        "glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco.py",
        kinds=WORDS,
        model={**THIN_SWIN, "bbox_head.num_dyhead_blocks": 2},
    ),
    Case(
        "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py",
        "ms_deform_attn",
        kinds=dict(with_mask=True, with_semantic=True),
    ),
    Case(
        "mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365.py",
        "ms_deform_attn",
        kinds=WORDS,
        model=THIN_SWIN,
    ),
    Case("gfl/gfl_r101-dconv-c3-c5_fpn_ms-2x_coco.py", size=96),
    Case("nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py", size=96),
]


@pytest.fixture(autouse=True)
def stock() -> Iterator[None]:
    """Leaves mmcv's functions as they were."""
    enabled = accelerate.is_enabled()
    accelerate.disable()
    hub = MessageHub.get_current_instance()
    hub.update_info("epoch", 100)  # TOOD changes its assigner during the training
    logging.disable(logging.INFO)  # mmengine lists how each parameter was initialised
    with mock.patch.object(atss_vlfusion_head, "BertConfig", WordConfig):
        yield
    logging.disable(logging.NOTSET)
    hub.pop_info("epoch")
    accelerate.enable() if enabled else accelerate.disable()


class OurCalls(TorchDispatchMode):
    """Counts the calls of this package's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count = collections.Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.namespace == "mmdeform":
            self.count[function._schema.name.removeprefix("mmdeform::")] += 1
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def stock_calls() -> Iterator[collections.Counter[str]]:
    """Counts the calls of mmcv's functions by the name of our operator."""
    count = collections.Counter[str]()

    def counting(operator: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            count[operator] += 1
            return function(*args, **kwargs)

        return wrapper

    with contextlib.ExitStack() as stack:
        for module, name, method, operator in (
            ("deform_conv", "DeformConv2dFunction", "forward", "deform_conv2d"),
            ("deform_conv", "DeformConv2dFunction", "backward", "deform_conv2d_backward"),
            ("modulated_deform_conv", "ModulatedDeformConv2dFunction", "forward", "deform_conv2d"),
            (
                "modulated_deform_conv",
                "ModulatedDeformConv2dFunction",
                "backward",
                "deform_conv2d_backward",
            ),
        ):
            function = getattr(importlib.import_module(f"mmcv.ops.{module}"), name)
            wrapped = staticmethod(counting(operator, getattr(function, method)))
            stack.enter_context(mock.patch.object(function, method, wrapped))
        # mmcv has no pooling on the CPU: its module computes with our reference.
        pooling = importlib.import_module("mmcv.ops.deform_roi_pool")
        wrapped = counting("deform_roi_pool", pooling_reference)
        stack.enter_context(mock.patch.object(pooling, "deform_roi_pool", wrapped))
        attention = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
        wrapped = counting("ms_deform_attn", attention.multi_scale_deformable_attn_pytorch)
        name = "multi_scale_deformable_attn_pytorch"
        stack.enter_context(mock.patch.object(attention, name, wrapped))
        yield count


def pooling_reference(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    """``mmcv.ops.deform_roi_pool`` by the specification of our operator."""
    return ops.deform_roi_pool_reference(
        input, rois, offset, None, output_size, spatial_scale, sampling_ratio, gamma
    )


def seed() -> None:
    """Dropout, samplers and denoising queries draw the same numbers in both runs."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


def train(model: nn.Module, data: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Losses, and gradients by parameter."""
    seed()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # its running statistics would change from run to run
    model.zero_grad()
    data = copy.deepcopy(data)
    losses = model.loss(data["inputs"], data["data_samples"])
    total, parsed = model.parse_losses(losses)
    total.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return dict(losses=dict(parsed), gradients=named)


def predict(model: nn.Module, data: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of the predictions."""
    seed()
    model.eval()
    data = copy.deepcopy(data)
    with torch.no_grad():
        results = model.predict(data["inputs"], data["data_samples"])
    tensors = {}
    for index, sample in enumerate(results):
        for kind, element in sample.items():
            if kind.startswith("pred_") and isinstance(element, BaseDataElement):
                for name, value in element.items():
                    if isinstance(value, Tensor):
                        tensors[f"{index}.{kind}.{name}"] = value
    assert sum(len(tensor) for tensor in tensors.values()), "nothing was detected"
    return tensors


def assert_same_predictions(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Boxes, scores and labels agree; of binary masks a few pixels at thresholds may not."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.bool:
            assert actual[name].shape == tensor.shape
            assert (actual[name] != tensor).float().mean() < 1e-4, name
        else:
            torch.testing.assert_close(
                actual[name], tensor, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
            )


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each gradient agrees relative to its own largest number.

    Some are zero but for rounding (a bias before a normalisation), hence a part of the largest
    gradient of the model.
    """
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        atol = 1e-4 * gradient.abs().max().item() + 1e-6 * largest
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def influence(gradients: dict[str, Tensor]) -> float:
    """Share of the largest gradient that reaches what predicts offsets."""
    of_offsets = [g.abs().max().item() for name, g in gradients.items() if "offset" in name]
    return max(of_offsets, default=1.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_results(case: Case) -> None:
    if "grounding_dino" in case.config and mmdet.__version__ == "3.5.1":
        # Without mmdeform too: 1024 numbers per position, and a head that still takes 512.
        pytest.skip("onedl-mmdetection 3.5.1 widened DINO's positions and forgot Grounding DINO's")
    model = reduced_model(case.config, **case.model)
    data = samples(model, case.size, **case.kinds)

    with stock_calls() as expected_calls:
        expected = train(model, data)
    accelerate.enable()
    with OurCalls() as calls:
        actual = train(model, data)
    accelerate.disable()
    operator = case.operator
    assert expected_calls[operator] > 0
    assert calls.count[operator] == expected_calls[operator]
    # Attention in PyTorch has no function for its gradient to be counted.
    backward = expected_calls[f"{operator}_backward" if "conv" in operator else operator]
    assert calls.count[f"{operator}_backward"] == backward
    assert influence(expected["gradients"]) > 0
    torch.testing.assert_close(actual["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
    assert_same_gradients(actual["gradients"], expected["gradients"])

    if not case.predicts:
        return
    with stock_calls() as expected_calls:
        expected = predict(model, data)
    accelerate.enable()
    with OurCalls() as calls:
        actual = predict(model, data)
    assert calls.count[operator] == expected_calls[operator]
    assert_same_predictions(actual, expected)
