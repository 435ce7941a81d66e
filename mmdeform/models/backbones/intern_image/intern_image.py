"""The backbones InternImage (DCNv3) and FlashInternImage (DCNv4).

Source: Wang et al., "InternImage" (2023), https://arxiv.org/abs/2211.05778, published as
https://github.com/OpenGVLab/InternImage; Xiong et al., "Efficient Deformable ConvNets" (2024),
https://arxiv.org/abs/2401.06197, published as https://github.com/OpenGVLab/DCNv4.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mmdeform.layers import DCNv3, DCNv4
from mmdeform.registry import MODELS

from ..base import Backbone, rising_rates
from ..loading import PublishedFormat
from .arch import FLASH_INTERN_IMAGE, INTERN_IMAGE, Arch, make_arch
from .blocks import Stage, Stem, linear

__all__ = ["FlashInternImage", "InternImage"]

# EMA weights are those whose accuracy is published; 'module' is DeepSpeed's name for weights.
CONTAINERS = ("state_dict", "model_ema", "model", "module")
CLASSIFIER = ("conv_head", "head")
CLASSIFIER_SCALE = 1.5


@MODELS.register_module()
class InternImage(Backbone):
    """A convolutional network of four stages whose core is DCNv3, as a backbone or a classifier.

    State dicts have the published names. Images may have any size; feature maps have the size of
    the image divided by 4, 8, 16 and 32, rounded up.

    Args:
        arch: Size of the model: 'tiny', 'small', 'base', 'large' or 'xlarge'. Default: 'tiny'.
        in_channels: Channels of images. Default: 3.
        num_classes: Makes a classifier with so many classes; 0: a backbone. Default: 0.
        out_indices: Stages whose maps are returned. Later stages are not built. Default: all.
        with_cp: Recompute blocks in the backward pass instead of keeping what is inside them.
            Default: False.
        frozen_stages: Freezes the stem and so many stages, with their norms and what lies between
            them; -1: nothing, 0: the stem. Default: -1.
        offset_range: Limits offsets smoothly, in the unit of the layer. Default: none.
        offset_clamp: Limits them sharply. Default: none.
        init_cfg: Of mmengine. ``dict(type='Pretrained', checkpoint=...)`` loads checkpoints of
            classifiers and detectors, also the published ones. Default: random weights.
        **settings: Replace those of the architecture.

            - ``channels``: of the first stage; they double from stage to stage.
            - ``depths``, ``groups``: blocks, and groups of channels with offsets of their own, of
              each stage.
            - ``mlp_ratio``: hidden channels of MLPs per channel.
            - ``drop_path_rate``: rate at which residuals of the last block are left out; those of
              the blocks before it less often, from 0 on.
            - ``post_norm``: norms behind DCN and MLP instead of in front of them and of the end of
              stages.
            - ``layer_scale``: initial scale of residuals; None: they have none. The published
              configs of detectors have 1.0; those that train classifiers from scratch have none
              for 'tiny' and 1e-5 for the others.
            - ``offset_scale``: stretches the kernels, offsets included.
            - ``dw_kernel_size``: kernel of the depthwise convolution in front of the prediction of
              offsets. None: 3 for DCNv3, no such convolution for DCNv4.
            - ``dcn_output_bias``, ``mlp_fc2_bias``: whether the last projection of DCNs and MLPs
              has a bias.

    Raises:
        ValueError: A name or value is unknown, or settings contradict each other.

    Example:
        >>> model = InternImage("tiny", drop_path_rate=0.0, out_indices=(1, 2, 3))
        >>> [tuple(y.shape) for y in model(torch.rand(1, 3, 64, 96))]
        [(1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    archs: ClassVar[Mapping[str, Arch]] = INTERN_IMAGE
    dcn: ClassVar[type[nn.Module]] = DCNv3
    published = PublishedFormat(CLASSIFIER, "head", CONTAINERS)

    def __init__(
        self,
        arch: str = "tiny",
        in_channels: int = 3,
        num_classes: int = 0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        with_cp: bool = False,
        frozen_stages: int = -1,
        offset_range: float | None = None,
        offset_clamp: float | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_classes, out_indices, frozen_stages, init_cfg)
        self.arch = model = make_arch(self.archs, arch, settings)
        self.patch_embed = Stem(in_channels, model.channels)
        rates = iter(rising_rates(model.drop_path_rate, sum(model.depths)))
        self.levels = nn.ModuleList()
        for index in range(self.built_stages):
            channels = model.channels * 2**index
            make_dcn = functools.partial(
                self.dcn,
                channels,
                channels,
                kernel_size=3,
                padding=1,
                bias=model.dcn_output_bias,
                group=model.groups[index],
                offset_scale=model.offset_scale,
                dw_kernel_size=model.dw_kernel_size,
                channels_last=True,
                offset_range=offset_range,
                offset_clamp=offset_clamp,
            )
            last = index == self.built_stages - 1
            stage_rates = list(itertools.islice(rates, model.depths[index]))
            self.levels.append(Stage(make_dcn, channels, model, stage_rates, not last, with_cp))
        if num_classes:
            width = int(channels * CLASSIFIER_SCALE)
            self.conv_head = nn.Sequential(
                nn.Conv2d(channels, width, 1, bias=False),
                nn.Sequential(nn.BatchNorm2d(width)),  # the names of the published state dict
                nn.GELU(),
            )
            self.head = linear(width, num_classes)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Feature maps, or logits of classes.

        Args:
            x: Images, shape (N, in_channels, H, W).

        Returns:
            The maps of ``out_indices``, stage i of shape (N, channels * 2**i, H / s, W / s),
            s = 4 * 2**i, rounded up; with ``num_classes`` logits of shape (N, num_classes).
        """
        x = self.patch_embed(x)
        maps = []
        for level in self.levels:
            y, x = level(x)
            maps.append(y.permute(0, 3, 1, 2))
        if self.num_classes:
            return self.head(self.conv_head(maps[-1]).mean((2, 3)))
        return tuple(maps[index].contiguous() for index in self.out_indices)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The layer of a parameter, for :class:`mmdeform.engine.LayerDecayConstructor`.

        Layer 0 is the stem, each block is one, and what stands behind the stages is the last. What
        lies between two stages counts as the first block of the next one; the norm at the end of
        the last stage, as published, as that stage's first block.

        Args:
            param_name: Name of the parameter, with ``prefix``.
            prefix: Name of the backbone in the model, and a dot.

        Returns:
            The layer and the number of layers.
        """
        depths = self.arch.depths[: self.built_stages]
        count = sum(depths) + 2
        parts = param_name.removeprefix(prefix).split(".")
        if not param_name.startswith(prefix) or parts[0] not in ("patch_embed", "levels"):
            return count - 1, count
        if parts[0] == "patch_embed":
            return 0, count
        stage = int(parts[1])
        if parts[2] == "blocks":
            return 1 + sum(depths[:stage]) + int(parts[3]), count
        return 1 + sum(depths[: min(stage + 1, len(depths) - 1)]), count

    def _frozen_modules(self, stages: int) -> list[nn.Module]:
        return [self.patch_embed, *self.levels[:stages]]


@MODELS.register_module()
class FlashInternImage(InternImage):
    """InternImage on DCNv4, of four stages, as a backbone or a classifier.

    Args: those of :class:`InternImage`; ``arch`` is 'tiny', 'small', 'base' or 'large'.
    """

    archs = FLASH_INTERN_IMAGE
    dcn = DCNv4
