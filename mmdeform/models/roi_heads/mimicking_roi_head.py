"""A RoI head that learns to see a proposal as if nothing were around it.

Source: Zhu et al., "Deformable ConvNets v2" (2018), https://arxiv.org/abs/1811.11168, section 3.3;
the head itself is mmdet's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox2roi, get_box_tensor
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdeform.registry import MODELS

from .crops import crop_boxes
from .feature_mimicking import FeatureMimicking

__all__ = ["MimickingRoIHead"]


@dataclass(frozen=True)
class _Source:
    """Where crops come from and what looks at them; a dataclass is no submodule of its owner."""

    detector: TwoStageDetector
    images: Tensor
    img_shapes: list[Sequence[int]]


@MODELS.register_module()
class MimickingRoIHead(StandardRoIHead):
    """mmdet's RoI head with R-CNN feature mimicking in training.

    Of each image some positive proposals are cropped out of the network's input and resized. The
    detector's own backbone, neck, RoI pooling over the whole crop and shared fully connected layers
    make features of them, and a loss pulls those and the features of the proposals in the image
    towards each other: what surrounds an object is not to matter. A classifier of its own keeps the
    crops' features discriminative.

    Works in ``mmdeform.FasterRCNN`` and ``mmdeform.MaskRCNN``, which show it the images. At
    inference it is mmdet's head: same modules run, same results, same state dict; checkpoints are
    described in ``FeatureMimicking``.

    - Proposals are the positives of the RoI sampler, ground-truth boxes among them where it adds
      them.
    - Crops do not reach into the padding of a batch.
    - All crops go through the network at once: of several batches as much would have to be kept
      for the backward pass. ``with_cp`` of the backbone saves memory.
    - BatchNorm that is trained normalises crops by their own statistics, but its running statistics
      remain those of whole images, as at inference.

    Args: those of mmdet's ``StandardRoIHead``, and
        mimicking: Arguments of ``FeatureMimicking``: ``num_proposals``, ``crop_size``,
            ``loss_cls``, ``loss_weight``. Default: those of the paper.

    Raises:
        ValueError: ``bbox_head`` is not one head with shared fully connected layers.
        RuntimeError: In training, no detector has shown the images.
    """

    def __init__(self, *args: Any, mimicking: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mimicking = FeatureMimicking(
            self.bbox_head.shared_out_channels, self.bbox_head.num_classes, **(mimicking or {})
        )
        self._source: _Source | None = None

    def init_bbox_head(self, bbox_roi_extractor: dict[str, Any], bbox_head: dict[str, Any]) -> None:
        """Builds RoI extractor and box head, as mmdet does.

        Args:
            bbox_roi_extractor: Config of the RoI extractor.
            bbox_head: Config of the box head.

        Raises:
            ValueError: It is not one head with shared fully connected layers.
        """
        if isinstance(bbox_head, (list, tuple)):
            raise ValueError(
                f"bbox_head: feature mimicking expects one head, got {len(bbox_head)} of a cascade"
            )
        super().init_bbox_head(bbox_roi_extractor, bbox_head)
        if not getattr(self.bbox_head, "shared_fcs", None):
            raise ValueError(
                f"bbox_head: feature mimicking expects a head with shared fully connected layers "
                f"such as Shared2FCBBoxHead, got {bbox_head['type']} without"
            )

    @contextmanager
    def watching(
        self, detector: TwoStageDetector, images: Tensor, batch_data_samples: SampleList
    ) -> Iterator[None]:
        """Lets the head see images and detector while losses are computed.

        Args:
            detector: What this head belongs to.
            images: The network's input, shape (N, 3, H, W).
            batch_data_samples: For the size of each image without padding.
        """
        shapes = [sample.img_shape for sample in batch_data_samples]
        self._source = _Source(detector, images, shapes)
        try:
            yield
        finally:
            self._source = None

    def bbox_loss(
        self, x: tuple[Tensor, ...], sampling_results: list[SamplingResult]
    ) -> dict[str, Any]:
        """Losses of the box head, mimicking included.

        Args:
            x: Feature maps of the images, shape (N, C, H, W) each.
            sampling_results: Positive and negative proposals of each image.

        Returns:
            What mmdet's head returns; ``loss_bbox`` also holds ``loss_mimic`` and
            ``loss_rcnn_cls``.

        Raises:
            RuntimeError: No detector has shown the images.
        """
        if self._source is None:
            raise RuntimeError(
                "mmdeform.MimickingRoIHead needs the images: expected a detector of type "
                "mmdeform.FasterRCNN or mmdeform.MaskRCNN, got one that does not show them"
            )
        chosen = [self.mimicking.choose(len(result.pos_priors)) for result in sampling_results]
        boxes, labels = [], []
        for result, index in zip(sampling_results, chosen, strict=True):
            boxes.append(get_box_tensor(result.pos_priors)[index])
            labels.append(result.pos_gt_labels[index])
        with _outputs_of(self.bbox_head.shared_fcs[-1]) as outputs:
            results = super().bbox_loss(x, sampling_results)
            self._look_at_crops(boxes)
        # Proposals of an image follow each other, positives first.
        feats = outputs[0].relu().split([len(result.priors) for result in sampling_results])
        feats = torch.cat([own[index] for own, index in zip(feats, chosen, strict=True)])
        crop_feats = outputs[1].relu()[: len(feats)]
        results["loss_bbox"].update(
            self.mimicking(feats, crop_feats, torch.cat(labels), len(sampling_results))
        )
        return results

    def _look_at_crops(self, boxes: list[Tensor]) -> None:
        """Runs the detector up to this head on the boxes, shape (R, 4) for each image."""
        source, size = self._source, self.mimicking.crop_size
        if not any(len(own) for own in boxes):
            # Whatever other devices wait for, a gradient or synchronised statistics, needs a crop.
            boxes = [boxes[0].new_tensor([[0, 0, size, size]]), *boxes[1:]]
        crops = torch.cat(
            [
                crop_boxes(image[:, :height, :width], own, size)
                for image, (height, width, *_), own in zip(
                    source.images, source.img_shapes, boxes, strict=True
                )
            ]
        )
        rois = bbox2roi([crops.new_tensor([[0, 0, size, size]])] * len(crops))
        with _running_statistics_kept(source.detector):
            self._bbox_forward(source.detector.extract_feat(crops), rois)


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list of what the module returns in each call."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Normalises as in training, but without an effect on later inference."""
    norms = [
        norm
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
