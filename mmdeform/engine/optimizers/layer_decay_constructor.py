"""Learning rates that fall from the end of a backbone to its beginning.

mmdet's ``LearningRateDecayOptimizerConstructor`` knows the layers of ConvNeXt alone, by names of
parameters. Here a backbone says to which of its layers a parameter belongs.
"""

from math import inf
from numbers import Real
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmdeform.registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ["LayerDecayConstructor"]

_OPTIONS = ("decay_rate", "decay_type", "custom_keys")
_MULTIPLIERS = ("lr_mult", "decay_mult")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise decay of the learning rate, with which detectors of InternImage are published.

    What stands behind the backbone learns at ``lr``, its last layer at ``lr * decay_rate``, the
    layer before at ``lr * decay_rate ** 2``. Vectors, which are biases, norms and scales, have no
    weight decay. Frozen parameters are left out.

    A backbone tells its layers by a method ``get_layer_depth(param_name, prefix)``, which returns
    the layer of a parameter, 0 for the stem, and the number of layers; the last of these is what
    stands behind the backbone. ``param_name`` starts with ``prefix``, the backbone's name in the
    model and a dot. This is mmpretrain's convention, whose backbones will do as well.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with ``optimizer`` and its ``lr``.
        paramwise_cfg: ``decay_rate``, above 0 and at most 1, is the one option needed.
            ``decay_type`` may say 'layer_wise', as for mmdet's constructor. ``custom_keys`` maps
            parts of names of parameters to ``dict(lr_mult=..., decay_mult=...)``, each 1 by
            default, which multiply what the parameters would have; of keys that fit one, the
            longest counts.

    Raises:
        ValueError: An option is unknown or out of range; at the call, no part of the model tells
            its layers, or a custom key fits no parameter.

    Example:
        DINO, whose sampling offsets do not decay, and a detector whose offsets learn slowly::

            optim_wrapper = dict(
                constructor='mmdeform.LayerDecayConstructor',
                paramwise_cfg=dict(
                    decay_rate=0.9, custom_keys=dict(sampling_offsets=dict(decay_mult=0.0))))

            optim_wrapper = dict(
                constructor='mmdeform.OffsetLrConstructor',
                paramwise_cfg=dict(
                    offset=dict(conv=dict(lr_mult=0.01)),
                    constructor='mmdeform.LayerDecayConstructor', decay_rate=0.9))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        _check_options(self.paramwise_cfg)
        if self.base_lr is None:
            raise ValueError("optim_wrapper.optimizer.lr: expected a learning rate, got None")
        self.decay_rate = self.paramwise_cfg["decay_rate"]
        keys = self.paramwise_cfg.get("custom_keys", {})
        self.custom_keys = {key: keys[key] for key in sorted(keys, key=len, reverse=True)}

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Appends groups of the parameters that have learning rate and weight decay in common.

        Args:
            params: Groups of parameters.
            module: The model.
        """
        backbones = _find_backbones(module)
        names = [name for name, _ in module.named_parameters()]
        for key in self.custom_keys:
            if not any(key in name for name in names):
                raise ValueError(f"paramwise_cfg.custom_keys: no parameter has {key!r} in its name")
        groups: dict[tuple[int, float, float | None], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            steps = _steps_from_the_end(name, backbones)
            custom = next((self.custom_keys[key] for key in self.custom_keys if key in name), {})
            lr = self.base_lr * self.decay_rate**steps * custom.get("lr_mult", 1.0)
            decay = self.base_wd
            if decay is not None:
                decay = decay * custom.get("decay_mult", 1.0) if parameter.ndim > 1 else 0.0
            groups.setdefault((steps, lr, decay), []).append(parameter)
        for (_, lr, decay), parameters in groups.items():
            settings = dict(lr=lr) if decay is None else dict(lr=lr, weight_decay=decay)
            params.append(dict(params=parameters, **settings))
        print_log(
            f"LayerDecayConstructor: lr = {self.base_lr:g} * {self.decay_rate:g} ** steps\n"
            + _table(groups),
            "current",
        )


def _check_options(options: dict) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"paramwise_cfg: expected keys of {', '.join(_OPTIONS)}, got {name!r}")
    rate = options.get("decay_rate")
    if not _is_number(rate) or not 0 < rate <= 1:
        raise ValueError(
            f"paramwise_cfg.decay_rate: expected a number above 0 and at most 1, got {rate!r}"
        )
    if options.get("decay_type", "layer_wise") != "layer_wise":
        raise ValueError(
            f"paramwise_cfg.decay_type: expected 'layer_wise', got {options['decay_type']!r}"
        )
    for key, multipliers in options.get("custom_keys", {}).items():
        for name, factor in multipliers.items():
            if name not in _MULTIPLIERS or not _is_number(factor) or not 0 <= factor < inf:
                raise ValueError(
                    f"paramwise_cfg.custom_keys.{key}: expected {' and '.join(_MULTIPLIERS)}, "
                    f"finite numbers from 0 on, got {name}={factor!r}"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _find_backbones(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that tell their layers, by the prefix of their parameters' names."""
    found = {
        f"{name}.": module
        for name, module in model.named_modules()
        if name and hasattr(module, "get_layer_depth")  # mmpretrain's classifiers only pass it on
    }
    if not found:
        parts = ", ".join(f"{name} ({type(m).__name__})" for name, m in model.named_children())
        raise ValueError(
            "LayerDecayConstructor: expected a backbone with a method get_layer_depth, "
            f"got {type(model).__name__} of {parts or 'no parts'}"
        )
    return found


def _steps_from_the_end(name: str, backbones: dict[str, nn.Module]) -> int:
    """How often the learning rate of a parameter is multiplied by the rate of decay."""
    for prefix, backbone in backbones.items():
        if name.startswith(prefix):
            layer, count = backbone.get_layer_depth(name, prefix)
            return count - 1 - layer
    return 0


def _table(groups: dict[tuple[int, float, float | None], list[nn.Parameter]]) -> str:
    """A row for each group, from the beginning of the backbone to what stands behind it."""
    lines = ["steps         lr  weight_decay  tensors     values"]
    order = sorted(groups, key=lambda key: (-key[0], -key[1], -(key[2] or 0.0)))
    for steps, lr, decay in order:
        parameters = groups[steps, lr, decay]
        values = sum(parameter.numel() for parameter in parameters)
        lines.append(
            f"{steps:5}  {lr:9.4g}  {'-' if decay is None else f'{decay:g}':>12}"
            f"  {len(parameters):7}  {values:9}"
        )
    return "\n".join(lines)
