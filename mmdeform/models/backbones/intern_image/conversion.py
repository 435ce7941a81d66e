"""What a state dict tells of its model, and InternImage's weights in FlashInternImage."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmdeform.ops.dcnv4 import padded_channels

from ..base import STAGES
from .intern_image import FlashInternImage, InternImage

__all__ = ["FlashWeights", "arguments_of", "published_size", "to_flash"]

TAPS = 9  # all kernels are 3 x 3
_PREDICTOR = (  # what predicts offsets and masks in a DCNv3, behind its depthwise convolution
    "dw_conv.1.1.weight",
    "dw_conv.1.1.bias",
    "offset.weight",
    "offset.bias",
    "mask.weight",
    "mask.bias",
)


def arguments_of(state: Mapping[str, Tensor]) -> tuple[type[InternImage], dict[str, Any]]:
    """The class of a model and its arguments, as far as names and shapes tell them.

    They do not tell ``offset_scale``, nor what matters in training alone.

    Args:
        state: Weights of an :class:`InternImage` or :class:`FlashInternImage`.

    Raises:
        ValueError: They are of something else.
    """
    block = "levels.0.blocks.0"
    needed = {f"patch_embed.conv{index}.weight" for index in (1, 2)}
    needed |= {f"{block}.dcn.output_proj.weight", f"{block}.mlp.fc1.weight"}
    missing = needed - set(state)
    if missing:
        raise ValueError(
            f"expected weights of InternImage, such as {min(missing)!r}, "
            f"got {str(list(state)[:5])[1:-1]}"
        )
    flash = f"{block}.dcn.value_proj.weight" in state
    predictor, points = ("offset_mask", 3 * TAPS) if flash else ("mask", TAPS)
    depthwise = "offset_mask_dw" if flash else "dw_conv.0"
    depths, groups = [], []
    for level in range(STAGES):
        name = re.compile(rf"levels\.{level}\.blocks\.\d+\.dcn\.{predictor}\.bias")
        biases = [value for key, value in state.items() if name.fullmatch(key)]
        depths.append(len(biases))
        groups.append(len(biases[0]) // points if biases else 0)
    built = sum(depth > 0 for depth in depths)
    channels = len(state["patch_embed.conv2.weight"])
    kernel = state.get(f"{block}.dcn.{depthwise}.weight")
    kernel_size = None if kernel is None else kernel.shape[-1]
    arguments: dict[str, Any] = dict(
        in_channels=state["patch_embed.conv1.weight"].shape[1],
        num_classes=len(state.get("head.weight", ())),
        out_indices=tuple(range(built)),
        channels=channels,
        depths=tuple(max(1, depth) for depth in depths),  # of stages that are not built any
        groups=tuple(max(1, group) for group in groups),
        mlp_ratio=len(state[f"{block}.mlp.fc1.weight"]) / channels,
        post_norm="levels.0.norm.0.weight" not in state,
        layer_scale=1.0 if f"{block}.gamma1" in state else None,
        dw_kernel_size=None if kernel_size == 3 and not flash else kernel_size,
        dcn_output_bias=f"{block}.dcn.output_proj.bias" in state,
        mlp_fc2_bias=f"{block}.mlp.fc2.bias" in state,
    )
    return FlashInternImage if flash else InternImage, arguments


def published_size(kind: type[InternImage], arguments: Mapping[str, Any]) -> str | None:
    """The ``arch`` that has these channels and depths, if there is one."""
    for size, arch in kind.archs.items():
        if (arch.channels, arch.depths) == (arguments["channels"], arguments["depths"]):
            return size
    return None


@dataclasses.dataclass(frozen=True)
class FlashWeights:
    """Weights of InternImage as those of FlashInternImage.

    Attributes:
        state: The state dict.
        exact: Entries of it that are entries of InternImage as they are.
        approximate: Entries that are computed from those of InternImage.
        left_out: Entries of InternImage of which nothing remains.
    """

    state: dict[str, Tensor]
    exact: list[str]
    approximate: list[str]
    left_out: list[str]


def to_flash(state: Mapping[str, Tensor], depthwise: bool) -> FlashWeights:
    """Gives FlashInternImage the weights of InternImage.

    All that the two have in common stays as it is. What predicts offsets and weights of samples is
    not the same function: DCNv3 normalises and activates what its depthwise convolution finds, and
    softmaxes the weights; DCNv4 is linear. There, ``offset_mask`` predicts at every pixel what
    DCNv3 predicts for average features, with features before their activation normally distributed
    as the norm says: its bias is set, its weight is zero. So a converted model starts with
    convolutions that are deformed everywhere in the same way, and has to be trained on.

    Args:
        state: Of an :class:`InternImage`, as a backbone or a classifier.
        depthwise: Whether the model has depthwise convolutions (``dw_kernel_size``) like DCNv3's,
            which are kept; else they are left out.
    """
    kept: dict[str, Tensor] = {}
    approximate: dict[str, Tensor] = {}
    left_out: list[str] = []
    for key, value in state.items():
        block, dcn, name = key.partition(".dcn.")
        if name == "mask.bias":
            predictor = {part: state[block + dcn + part] for part in _PREDICTOR}
            bias = _average_prediction(predictor)
            weight = bias.new_zeros(len(bias), predictor["mask.weight"].shape[1])
            approximate[f"{block}.dcn.offset_mask.weight"] = weight
            approximate[f"{block}.dcn.offset_mask.bias"] = bias
        if name in _PREDICTOR:
            continue
        if name.startswith("dw_conv.0.") and not depthwise:
            left_out.append(key)
            continue
        name = name.replace("input_proj", "value_proj").replace("dw_conv.0", "offset_mask_dw")
        kept[block + dcn + name] = value
    return FlashWeights(kept | approximate, list(kept), list(approximate), left_out)


def _average_prediction(dcn: Mapping[str, Tensor]) -> Tensor:
    """DCNv3's offsets and weights for average features, as the bias of ``offset_mask``, (P,)."""
    features = _mean_of_gelu(dcn["dw_conv.1.1.bias"].double(), dcn["dw_conv.1.1.weight"].double())
    offset = dcn["offset.weight"].double() @ features + dcn["offset.bias"]
    mask = dcn["mask.weight"].double() @ features + dcn["mask.bias"]
    points = len(mask)
    mask = mask.view(-1, TAPS).softmax(-1)
    bias = torch.zeros(padded_channels(points), dtype=torch.float64)
    bias[: 3 * points] = torch.cat((offset.view(-1, 2 * TAPS), mask), 1).flatten()
    return bias.to(dcn["mask.bias"].dtype)


def _mean_of_gelu(mean: Tensor, std: Tensor) -> Tensor:
    """The expectation of GELU over a normal distribution."""
    spread = (1 + std.square()).sqrt()
    scaled = mean / spread
    density = torch.exp(-scaled.square() / 2) / math.sqrt(2 * math.pi)
    return mean * torch.special.ndtr(scaled) + std.square() / spread * density
