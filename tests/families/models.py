"""mmdet's own models, reduced in size only, and data for them."""

from pathlib import Path
from typing import Any

import mmdet
import torch
from mmcv.cnn import ConvAWS2d
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from .language import WordModel

CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"
CHANNELS = ("channels", "embed_dims", "num_feats", "num_deconv_filters", "rfp_inplanes")
# Settings of size, and what they become at most.
LIMITS = dict(
    num_layers=2,  # of encoders and decoders
    num_blocks=2,  # of DyHead
    num_dyhead_blocks=2,
    stacked_convs=2,
    num_convs=2,
    num_stacks=1,  # of Hourglass
    num_queries=30,
    num_matching_queries=30,
    num_dn_queries=10,
    num=16,  # samples of two-stage training
    nms_pre=100,
    max_per_img=20,
)
# Heads whose width is a default, not a setting.
WIDE_HEADS = ("DeformableDETRHead", "DINOHead", "DDQDETRHead", "GroundingDINOHead")


def reduced_model(config: str, shrink: int = 4, **overrides: Any) -> nn.Module:
    """Builds the detector of one of mmdet's configs with fewer channels, layers and queries.

    Its weights are random, and its offsets are not zero.

    Args:
        config: File below mmdet's folder of configs.
        shrink: What channels are divided by.
        **overrides: Further settings of ``model``, e.g. ``{'neck.num_outs': 3}``.
    """
    cfg = Config.fromfile(CONFIGS / config)
    init_default_scope("mmdet")
    cfg = Config(dict(model=_reduced(cfg.model, shrink)))
    cfg.merge_from_dict({f"model.{key}": value for key, value in overrides.items()})
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.05)  # they start as zero
        elif parameter.dim() > 1 and parameter.std() < 0.02:
            # What starts that small would hide the operators behind it.
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            # Zero would hide the block's convolutions; one doubles what 16 blocks pass on.
            last = module.norm3 if isinstance(module, Bottleneck) else module.norm2
            nn.init.constant_(last.weight, 0.3)
        if isinstance(module, ConvAWS2d):
            module.weight_gamma.fill_(module.weight[0].numel() ** -0.5)  # from a checkpoint
    return model


def _reduced(cfg: Any, shrink: int, key: str = "") -> Any:
    """A copy of a config in which everything that is a size is smaller."""
    if isinstance(cfg, dict):
        if cfg.get("type") == "BertModel":
            return dict(type=WordModel, padded=not cfg.get("use_sub_sentence_represent", False))
        cfg = {name: _reduced(value, shrink, name) for name, value in cfg.items()}
        for name in ("init_cfg", "pretrained", "batch_augments", "num_cp", "with_cp"):
            cfg.pop(name, None)
        if cfg.get("type") in ("ResNet", "DetectoRS_ResNet"):
            cfg.update(base_channels=64 // shrink, frozen_stages=-1, depth=min(cfg["depth"], 50))
        if cfg.get("type") in WIDE_HEADS:
            cfg["embed_dims"] = 256 // shrink
        if "score_thr" in cfg:
            cfg["score_thr"] = 0.0  # random weights score low
        return cfg
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_reduced(value, shrink, key) for value in cfg)
    if type(cfg) is int:
        return (
            cfg // shrink
            if key.endswith(CHANNELS) and cfg >= 32
            else min(cfg, LIMITS.get(key, cfg))
        )
    return cfg


def samples(model: nn.Module, size: int = 64, **kinds: Any) -> dict[str, Any]:
    """Two images of different width with boxes, as the model's data preprocessor gives them.

    Args:
        model: The detector.
        size: Height of the images in pixels.
        **kinds: Options of mmdet's ``demo_mm_inputs``, e.g. ``with_mask=True``.
    """
    shapes = [(3, size, size + 32), (3, size, size)]
    kinds.setdefault("num_classes", 3)
    data = demo_mm_inputs(2, shapes, num_items=[3, 2], **kinds)
    return model.data_preprocessor(data, training=True)
