"""What R-CNN feature mimicking adds to a RoI head: two losses and a classifier.

Source: Zhu et al., "Deformable ConvNets v2" (2018), https://arxiv.org/abs/1811.11168, section 3.3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdeform.registry import MODELS

__all__ = ["FeatureMimicking"]


class FeatureMimicking(BaseModule):
    """Compares what a detector makes of a proposal with what it makes of the cropped proposal.

    The classifier of the crops is the only thing that is not shared with the detector, and only
    training needs it. State dicts hold it in training mode, and in evaluation mode as long as
    mmengine's runner trains, or stopped training with an error: validation may overwrite the
    checkpoint of an epoch. In all other state dicts it is left out, and from those of a moving
    average, which needs no gradients: they are the plain detector's. They load as strictly as any
    other, and the classifier stays as it is.

    Args:
        in_features: Length of the features, C.
        num_classes: Number of classes without the background.
        num_proposals: Largest number of proposals per image. Default: 32, as in the paper.
        crop_size: Height and width of the crops. Default: 224, as in the paper.
        loss_cls: Config of the loss of the classifier. Default: cross-entropy with weight 0.1.
        loss_weight: Weight of the loss between the features. Default: 0.1, as in the paper.
        init_cfg: Of mmengine. Default: normal with standard deviation 0.01, as mmdet's.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_proposals: int = 32,
        crop_size: int = 224,
        loss_cls: dict[str, Any] | None = None,
        loss_weight: float = 0.1,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type="Normal", layer="Linear", std=0.01))
        self.num_proposals = num_proposals
        self.crop_size = crop_size
        self.loss_weight = loss_weight
        self.fc_cls = nn.Linear(in_features, num_classes + 1)
        self.loss_cls = MODELS.build(
            loss_cls or dict(type="mmdet.CrossEntropyLoss", loss_weight=0.1)
        )
        self.register_state_dict_post_hook(_leave_out_unless_trained)
        self.register_load_state_dict_pre_hook(_keep_where_missing)

    def choose(self, count: int) -> Tensor:
        """Chooses proposals at random, all of them where there are few.

        Args:
            count: Number of positive proposals of an image.

        Returns:
            Indices in any order, int64 on the CPU, shape (min(count, num_proposals),). They follow
            from torch's seed on every device.
        """
        return torch.randperm(count)[: self.num_proposals]

    def forward(
        self, detector_feats: Tensor, crop_feats: Tensor, labels: Tensor, num_images: int
    ) -> dict[str, Tensor]:
        """Both losses.

        Gradients reach both kinds of features: neither is the teacher of the other.

        Args:
            detector_feats: Features of the proposals in their images, shape (R, C).
            crop_feats: Features of the cropped proposals, shape (R, C).
            labels: Class of each proposal, int64, shape (R,).
            num_images: Number of images that the proposals come from.

        Returns:
            ``loss_mimic``, the sum of 1 - cosine over the proposals of an image, in the mean over
            the images, and ``loss_rcnn_cls``, in the mean over all proposals; both are weighted,
            and zero where there are no proposals. fp32 under mixed precision, shape ().
        """
        cosine = F.cosine_similarity(_at_least_fp32(detector_feats), _at_least_fp32(crop_feats))
        return dict(
            loss_mimic=self.loss_weight * (1 - cosine).sum() / num_images,
            loss_rcnn_cls=self.loss_cls(self.fc_cls(crop_feats), labels, avg_factor=len(labels)),
        )


def _at_least_fp32(feats: Tensor) -> Tensor:
    return feats.to(torch.promote_types(feats.dtype, torch.float32))


def _leave_out_unless_trained(
    module: FeatureMimicking, state_dict: dict[str, Any], prefix: str, _: dict
) -> None:
    if not _is_trained(module):
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]


def _is_trained(module: FeatureMimicking) -> bool:
    # Where a new best score is found, CheckpointHook saves once more, in evaluation mode.
    runs = MessageHub.get_current_instance().get_info("loop_stage") in ("train", "val")
    return (module.training or runs) and module.fc_cls.weight.requires_grad


def _keep_where_missing(
    module: FeatureMimicking, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    if not any(key.startswith(prefix) for key in state_dict):
        print_log(
            f"{prefix}fc_cls: not in the checkpoint, stays as it is; only training needs it",
            "current",
        )
        state_dict.update(
            (prefix + name, parameter) for name, parameter in module.named_parameters()
        )
