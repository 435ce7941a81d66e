"""The backbones DAT and DAT++.

Source: Xia et al., "Vision Transformer with Deformable Attention" (2022),
https://arxiv.org/abs/2201.00520, and "DAT++" (2023), https://arxiv.org/abs/2309.01430; published as
https://github.com/LeapLabTHU/DAT.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from mmdeform.layers.layer_norm import LayerNorm2d
from mmdeform.registry import MODELS

from ..base import Backbone, rising_rates
from .arch import make_arch
from .checkpoint import DAT_FORMAT
from .resize import downsample, stem
from .stage import DATStage

__all__ = ["DAT"]


@MODELS.register_module()
class DAT(Backbone):
    """Vision transformer with deformable attention, four stages, as a backbone or a classifier.

    State dicts have the published names. Images may have any size; feature maps have the size of
    the image divided by 4, 8, 16 and 32, rounded up. Tables of position biases keep the size that
    ``img_size`` gives them and are stretched over other maps.

    Args:
        arch: Size of the model: 'tiny', 'small' or 'base'. Default: 'tiny'.
        version: 'v1', the model of the first paper (CVPR 2022), or 'pp', that of the second, DAT++.
            They place reference points and scale offsets differently. Default: 'v1'.
        img_size: Size of images, or (height, width), for which tables of position biases are made.
            Default: 224.
        in_channels: Channels of images. Default: 3.
        num_classes: Makes a classifier with so many classes; 0: a backbone. Default: 0.
        out_indices: Stages whose maps are returned. Later stages are not built. Default: all.
        drop_rate: Dropout of projections and MLPs. Default: 0.0.
        attn_drop_rate: Dropout of attention weights. Default: 0.0.
        drop_path_rate: Rate at which residuals of the last block are left out; those of the blocks
            before it less often, from 0 on. Default: the architecture's.
        with_cp: Recompute blocks in the backward pass instead of keeping what is inside them.
            Default: False.
        frozen_stages: Freezes the stem and so many stages, with their norms and what lies between
            them; -1: nothing, 0: the stem. Default: -1.
        backend: Of deformable attention: 'auto', 'fused' or 'reference'. Default: 'auto'.
        init_cfg: Of mmengine. ``dict(type='Pretrained', checkpoint=...)`` loads checkpoints of
            classifiers and detectors, also the published ones. Default: random weights.
        **settings: Replace those of the architecture; a single value, or a sequence of one for each
            stage where 'per stage' is said.

            - ``stem_dims``: channels behind the stem.
            - ``conv_stem``: convolutions instead of patches in the stem and between stages.
            - ``stage_specs``: per stage, a string with one letter per block: L (window attention),
              S (shifted windows), D (deformable), N (neighbourhood), P (to a smaller map).
            - ``depths``: per stage, the lengths of ``stage_specs`` once more.
            - ``dims``, ``num_heads``: per stage, channels and heads.
            - ``num_groups``, ``strides``, ``kernel_sizes``, ``offset_range_factors``,
              ``position_bias``, ``use_offsets``: per stage, arguments of
              :class:`mmdeform.layers.DeformableAttention2d` for the blocks D.
            - ``window_sizes`` (L, S), ``neighborhood_sizes`` (N), ``sr_ratios`` (P): per stage.
            - ``lpu``: per stage, a local perception unit in front of each block.
            - ``dwc_mlp``: per stage, a depthwise convolution in MLPs.
            - ``layer_scale``: per stage, initial scale of residuals; None: they have none.
            - ``mlp_ratio``: per stage, hidden channels of MLPs per channel.

    Raises:
        ValueError: A name or value is unknown, or settings contradict each other.

    Example:
        >>> model = DAT("tiny", "pp", drop_path_rate=0.0, out_indices=(1, 2, 3))
        >>> [tuple(y.shape) for y in model(torch.rand(1, 3, 64, 96))]
        [(1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    published = DAT_FORMAT

    def __init__(
        self,
        arch: str = "tiny",
        version: str = "v1",
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        num_classes: int = 0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        with_cp: bool = False,
        frozen_stages: int = -1,
        backend: str = "auto",
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_classes, out_indices, frozen_stages, init_cfg)
        if drop_path_rate is not None:
            settings["drop_path_rate"] = drop_path_rate
        model = make_arch(arch, version, settings)
        specs = model.stages[: self.built_stages]

        self.patch_proj = stem(in_channels, model.stem_dims, model.conv_stem)
        rates = iter(
            rising_rates(model.drop_path_rate, sum(len(s.stage_specs) for s in model.stages))
        )
        feat_size = [length // 4 for length in _pair(img_size)]
        self.stages = nn.ModuleList()
        for index, spec in enumerate(specs):
            self.stages.append(
                DATStage(
                    specs[index].dims if index else model.stem_dims,
                    spec,
                    (feat_size[0], feat_size[1]),
                    version,
                    [next(rates) for _ in spec.stage_specs],
                    drop_rate,
                    attn_drop_rate,
                    backend,
                    with_cp,
                )
            )
            feat_size = [max(1, length // 2) for length in feat_size]
        self.down_projs = nn.ModuleList(
            downsample(before.dims, after.dims, model.conv_stem)
            for before, after in itertools.pairwise(specs)
        )
        if num_classes:
            self.cls_norm = LayerNorm2d(specs[-1].dims)
            self.cls_head = nn.Linear(specs[-1].dims, num_classes)
        else:
            self.norms = nn.ModuleList(
                LayerNorm2d(spec.dims) if index in self.out_indices else nn.Identity()
                for index, spec in enumerate(specs)
            )
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Feature maps, or logits of classes.

        Args:
            x: Images, shape (B, in_channels, H, W).

        Returns:
            The normalised maps of ``out_indices``, stage i of shape (B, dims[i], H / s, W / s),
            s = 4 * 2**i, rounded up; with ``num_classes`` logits of shape (B, num_classes).
        """
        x = self.patch_proj(x)
        outputs = []
        for index, stage in enumerate(self.stages):
            if index:
                x = self.down_projs[index - 1](x)
            x = stage(x)
            if not self.num_classes and index in self.out_indices:
                outputs.append(self.norms[index](x).contiguous())
        if self.num_classes:
            return self.cls_head(self.cls_norm(x).mean((2, 3)))
        return tuple(outputs)

    def _frozen_modules(self, stages: int) -> list[nn.Module]:
        modules = [self.patch_proj, *self.stages[:stages], *self.down_projs[: max(0, stages - 1)]]
        return modules if self.num_classes else [*modules, *self.norms[:stages]]
