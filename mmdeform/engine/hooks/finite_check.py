"""Finds the deformable layer in which numbers stop being finite."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmdeform.layers.predictors import Predictor, predictors
from mmdeform.layers.sampling import call_arguments

__all__ = ["FiniteCheck"]

# From cause to effect.
_ORDER = ("input", "weights", "offset", "mask", "output")


class FiniteCheck:
    """Looks at inputs, predicted offsets and masks, and output of every call of some layers.

    Each tensor is reduced to its extremes, which are NaN or infinite if anything in it is; on the
    device, without waiting. An output alone would not show it: where an offset is not finite the
    operators read nothing, and the output stays finite.

    Args:
        layers: Layers by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        # Layer, what was looked at, its extremes, and to which of them the name applies.
        self._seen: list[tuple[str, str, Tensor, Tensor | None]] = []

    def watch(self) -> list[RemovableHandle]:
        """Starts to look; returns the handles of the hooks, to be removed by the caller."""
        handles = []
        for name, layer in self._layers.items():
            handles += [
                predictor.module.register_forward_hook(
                    functools.partial(self._after_predictor, name, predictor)
                )
                for predictor in predictors(layer)
            ]
            handles.append(
                layer.register_forward_hook(
                    functools.partial(self._after_layer, name), with_kwargs=True
                )
            )
        return handles

    def _after_predictor(
        self, name: str, predictor: Predictor, module: nn.Module, args: Any, output: Tensor
    ) -> None:
        if output.numel() == 0:
            return
        output = output.detach()
        channel_dim = output.dim() + predictor.channel_dim
        others = [dim for dim in range(output.dim()) if dim != channel_dim]
        extremes = torch.stack([output.amax(others), output.amin(others)])
        for what, channels in (("offset", predictor.is_offset), ("mask", ~predictor.is_offset)):
            if channels.any():
                self._seen.append((name, what, extremes.flatten(), channels.repeat(2)))

    def _after_layer(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        tensors = call_arguments(module, args, kwargs) | {"output": output}
        for argument, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                what = argument if argument in ("offset", "mask", "output") else f"input {argument}"
                extremes = torch.stack(tensor.detach().aminmax())
                self._seen.append((name, what, extremes, None))

    def report(self) -> str | None:
        """Says what is not finite in the first such layer; waits for the device, once.

        Returns:
            A sentence, or None where everything is finite.
        """
        if not self._seen:
            return None
        device = self._seen[0][2].device
        finite = torch.cat([extremes.to(device) for _, _, extremes, _ in self._seen]).isfinite()
        if finite.all():
            return None
        # In the order in which the layers finished, and in each of them as it saw its tensors.
        found: dict[str, dict[str, bool]] = {}
        sizes = [extremes.numel() for _, _, extremes, _ in self._seen]
        pieces = finite.cpu().split(sizes)
        for (name, what, _, channels), piece in zip(self._seen, pieces, strict=True):
            whole = bool((piece if channels is None else piece[channels]).all())
            of_layer = found.setdefault(name, {})
            of_layer[what] = of_layer.get(what, True) and whole
        first, *later = [name for name, parts in found.items() if not all(parts.values())]
        layer = self._layers[first]
        weights = {
            f"weights {name}": False
            for name, parameter in layer.named_parameters()
            if not parameter.isfinite().all()
        }
        found[first].update(weights or {"weights": True})
        parts = sorted(found[first].items(), key=lambda item: _ORDER.index(item[0].split()[0]))
        bad = ", ".join(what for what, whole in parts if not whole)
        good = ", ".join(what for what, whole in parts if whole)
        text = f"NaN or infinite in layer '{first}' ({type(layer).__name__}): {bad}"
        if good:
            text += f"; finite: {good}"
        if later:
            text += f". {len(later)} of the layers after it are affected, too"
        return text
