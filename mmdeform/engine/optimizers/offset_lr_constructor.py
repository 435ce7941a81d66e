"""Learning rates and weight decays of the layers that predict where and how to sample.

``dcn_offset_lr_mult`` of mmengine reaches mmcv's deformable convolutions alone, and ``custom_keys``
goes by parts of names; neither tells when it reaches nothing.
"""

import logging
from math import inf
from numbers import Real
from typing import Any

import torch
from mmcv import ops as mmcv
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmdeform.layers.predictors import Predictor, predictors
from mmdeform.registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ["OffsetLrConstructor"]


# Of a detector or transformer, which is known by the attention that it contains.
_REFERENCE_POINTS = ("reference_points_fc", "reference_points")
_KINDS = ("conv", "mask", "roi", "sampling_offsets", "attention_weights", "reference_points")
_SETTINGS = {"lr_mult": "lr", "decay_mult": "weight_decay"}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OffsetLrConstructor:
    """Multiplies learning rate and weight decay of offset branches, on top of another constructor.

    The other constructor makes the parameter groups first, with all other options of
    ``paramwise_cfg``. What it gave to a parameter, for whatever reason, is then multiplied: so do
    the decay of a layer, or ``custom_keys`` and ``dcn_offset_lr_mult`` that reach the same one.
    Groups of several kinds are split, in the same order each time, so that training resumes.

    Kinds follow from the class of a layer, mmcv's or this package's, and an attribute of it:

    - ``conv``: offsets of deformable convolutions: ``conv_offset`` of v1 and v2, ``offset`` of v3,
      ``offset_mask`` of v4, ``offset_s`` and ``offset_l`` of mmcv's SAConv2d; and ``conv_offset``
      of position-sensitive RoI pooling and of DAT's attention. In v2 and v4 this one layer predicts
      the mask, too.
    - ``mask``: ``mask`` of v3, ``mask_fc`` of modulated RoI pooling.
    - ``roi``: ``offset_fc`` of RoI pooling, hidden layers included. With ``head='paper'`` it
      predicts the mask, too.
    - ``sampling_offsets``, ``attention_weights``: of multi-scale deformable attention.
    - ``reference_points``: the linear layer ``reference_points_fc`` or ``reference_points`` of a
      module that contains multi-scale deformable attention.

    What heads keep beside a deformable convolution (guided anchoring, FoveaBox, DyHead) is of no
    kind: ``custom_keys`` reaches it.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with ``optimizer``.
        paramwise_cfg: ``offset`` maps kinds to ``dict(lr_mult=..., decay_mult=...)``, each 1 by
            default. ``constructor`` is the type of the other constructor, mmengine's by default.
            Everything else is the other constructor's.

    Raises:
        ValueError: ``offset`` is missing, or names an unknown kind or multiplier; at the call, a
            kind of which the model has no layer, or a ``decay_mult`` where there is no decay.

    Example:
        Deformable DETR, and layer decay with slow offset branches::

            optim_wrapper = dict(
                constructor='mmdeform.OffsetLrConstructor',
                paramwise_cfg=dict(
                    offset=dict(
                        sampling_offsets=dict(lr_mult=0.1), reference_points=dict(lr_mult=0.1)),
                    custom_keys=dict(backbone=dict(lr_mult=0.1))))

            optim_wrapper = dict(
                constructor='mmdeform.OffsetLrConstructor',
                paramwise_cfg=dict(
                    offset=dict(conv=dict(lr_mult=0.1), mask=dict(lr_mult=0.1, decay_mult=0.0)),
                    constructor='LearningRateDecayOptimizerConstructor',
                    decay_rate=0.7, decay_type='layer_wise', num_layers=6))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        base_cfg = dict(paramwise_cfg or {})
        self.multipliers = _checked_multipliers(base_cfg.pop("offset", None))
        self.base = MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(
                type=base_cfg.pop("constructor", "DefaultOptimWrapperConstructor"),
                optim_wrapper_cfg=optim_wrapper_cfg,
                paramwise_cfg=base_cfg or None,
            )
        )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the optimizer of a model, or of one in a model wrapper, and its wrapper."""
        branches = _find_branches(model)
        for kind in self.multipliers:
            if not branches[kind]:
                there = [_describe(*item) for item in branches.items() if item[1]]
                raise ValueError(
                    f"paramwise_cfg.offset.{kind}: the model has no such layer; "
                    f"it has {'; '.join(there) or 'none of any kind'}"
                )
        optim_wrapper = self.base(model)
        kinds = {
            id(parameter): kind
            for kind in self.multipliers
            for branch in branches[kind].values()
            for parameter in branch.parameters()
        }
        optimizer = optim_wrapper.optimizer
        groups = optimizer.param_groups
        pieces = [piece for group in groups for piece in self._split(group, kinds)]
        groups[:] = [group for _, group in pieces]
        if optim_wrapper.base_param_settings is None and len(groups) > 1:
            # Made by the wrapper where there are several groups: the rate before multiplication,
            # for schedulers and logs.
            optim_wrapper.base_param_settings = {"params": torch.zeros(1), **optimizer.defaults}
        for kind in self.multipliers:
            self._log(kind, branches[kind], [group for own, group in pieces if own == kind])
        return optim_wrapper

    def _split(self, group: dict, kinds: dict[int, str]) -> list[tuple[str | None, dict]]:
        """Gives each kind in a group a group of its own, with its settings multiplied."""
        members: dict[str | None, list[int]] = {}
        for index, parameter in enumerate(group["params"]):
            members.setdefault(kinds.get(id(parameter)), []).append(index)
        pieces = []
        for kind, indices in members.items():
            piece = dict(group)
            for key in {"params", "param_names"} & set(group):
                piece[key] = [group[key][index] for index in indices]
            for multiplier, factor in self.multipliers.get(kind, {}).items():
                setting = _SETTINGS[multiplier]
                if setting not in group:
                    raise ValueError(
                        f"paramwise_cfg.offset.{kind}.{multiplier}: the optimizer has no {setting}"
                    )
                piece[setting] = group[setting] * factor
            if kind is not None and "group_name" in group:
                piece["group_name"] = f"{group['group_name']}_{kind}"
            pieces.append((kind, piece))
        return pieces

    def _log(self, kind: str, branches: dict[str, nn.Module], groups: list[dict]) -> None:
        text = _describe(kind, branches)
        for multiplier, factor in self.multipliers[kind].items():
            values = sorted({float(group[_SETTINGS[multiplier]]) for group in groups})
            ends = " to ".join(f"{value:g}" for value in dict.fromkeys(values[:1] + values[-1:]))
            text += f", {_SETTINGS[multiplier]} x {factor:g} = {ends or 'nothing: all frozen'}"
        print_log(f"OffsetLrConstructor: {text}", "current")
        names = ", ".join(branches)
        print_log(f"OffsetLrConstructor: {kind}: {names}", "current", logging.DEBUG)


def _checked_multipliers(offset: Any) -> dict[str, dict[str, float]]:
    if not isinstance(offset, dict) or not offset:
        raise ValueError(
            f"paramwise_cfg.offset: expected multipliers by kind ({', '.join(_KINDS)}), "
            f"got {offset!r}"
        )
    for kind, multipliers in offset.items():
        if kind not in _KINDS:
            raise ValueError(
                f"paramwise_cfg.offset: expected kinds of {', '.join(_KINDS)}, got {kind!r}"
            )
        if not isinstance(multipliers, dict) or not multipliers:
            raise ValueError(
                f"paramwise_cfg.offset.{kind}: expected a dict of {', '.join(_SETTINGS)}, "
                f"got {multipliers!r}"
            )
        for multiplier, factor in multipliers.items():
            if multiplier not in _SETTINGS:
                raise ValueError(
                    f"paramwise_cfg.offset.{kind}: expected keys of {', '.join(_SETTINGS)}, "
                    f"got {multiplier!r}"
                )
            if isinstance(factor, bool) or not isinstance(factor, Real) or not 0 <= factor < inf:
                raise ValueError(
                    f"paramwise_cfg.offset.{kind}.{multiplier}: expected a finite number from 0 "
                    f"on, got {factor!r}"
                )
    return {kind: dict(multipliers) for kind, multipliers in offset.items()}


def _find_branches(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Name and module of all branches of each kind, in the order of the model."""
    found: dict[str, dict[str, nn.Module]] = {kind: {} for kind in _KINDS}
    for name, module in model.named_modules():
        for predictor in predictors(module):
            kind = _kind(module, predictor)
            found[kind][f"{name}.{predictor.name}".lstrip(".")] = predictor.module
        for attribute in _REFERENCE_POINTS:
            child = getattr(module, attribute, None)
            if isinstance(child, nn.Linear) and _has_attention(module):
                found["reference_points"][f"{name}.{attribute}".lstrip(".")] = child
    return found


def _kind(layer: nn.Module, predictor: Predictor) -> str:
    if isinstance(layer, mmcv.MultiScaleDeformableAttention):
        return predictor.name
    if not predictor.is_offset.any():
        return "mask"
    return "roi" if isinstance(layer, mmcv.DeformRoIPool) else "conv"


def _has_attention(module: nn.Module) -> bool:
    return any(isinstance(m, mmcv.MultiScaleDeformableAttention) for m in module.modules())


def _describe(kind: str, branches: dict[str, nn.Module]) -> str:
    parameters = sum(len(list(branch.parameters())) for branch in branches.values())
    return f"{kind}: {len(branches)} layer{'s'[: len(branches) - 1]}, {parameters} parameters"
