"""Records what the deformable layers of a model sample, without changing the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmdeform.layers.sampling import call_arguments, deformable_layers, sampled

from .calls import LayerCall, call_of
from .pixel_grid import GridTracer

__all__ = ["Recording", "record"]


class Recording(Sequence[LayerCall]):
    """Calls of deformable layers in the order in which they ran.

    ``recording[i]`` is the i-th call, ``recording[name]`` the last call of a layer,
    ``recording.calls(name)`` all of a layer: a head that all levels share is called for each level,
    RoI pooling once for each level that has RoIs.

    Attributes:
        without_place: Names of layers that ran on maps of which there were not as many as images,
            in a mask head for example: those of RoIs. Their pixels have no place in the image that
            the layer knows of, so that these calls are not recorded.
    """

    def __init__(self) -> None:
        self._calls: list[LayerCall] = []
        self.without_place: list[str] = []

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, key: Any) -> Any:
        """A call by its index, calls by a slice, or the last call of a layer by its name."""
        return self.calls(key)[-1] if isinstance(key, str) else self._calls[key]

    @property
    def names(self) -> list[str]:
        """Names of the layers that ran, in the order of their last calls."""
        return list(dict.fromkeys(call.name for call in reversed(self._calls)))[::-1]

    def calls(self, name: str) -> list[LayerCall]:
        """All calls of a layer.

        Raises:
            KeyError: No layer of this name ran.
        """
        calls = [call for call in self._calls if call.name == name]
        if not calls:
            there = ", ".join(self.names) or "none"
            raise KeyError(f"no call of {name!r} was recorded; recorded layers: {there}")
        return calls

    def of_kind(self, kind: str) -> list[LayerCall]:
        """All calls of a family of layers; see :class:`LayerCall`."""
        return [call for call in self._calls if call.kind == kind]


@contextmanager
def record(model: nn.Module, layers: str | Sequence[str] = "**") -> Iterator[Recording]:
    """Records where deformable layers of a model sample while the block runs.

        with record(detector) as recording:
            detector.test_step(batch)
        recording["backbone.layer4.2.conv2"].locations  # (N, D, K, Ho, Wo, 2), (x, y) in the image

    Works for every layer that :mod:`mmdeform.layers.sampling` knows, ours and mmcv's. The model's
    outputs, gradients, buffers and random numbers stay as they are; offsets are predicted once more
    for the record. What it holds has no gradients and keeps the inputs of the layers alive.

    Args:
        model: A model that is called with a batch of images, shape (N, C, H, W), as its first
            argument or as ``inputs``, as mmdet's detectors call themselves. Positions refer to
            these images, after resizing and padding.
        layers: A pattern or several, of which a layer's name has to match one; see
            :func:`mmdeform.layers.sampling.deformable_layers`. Default: all deformable layers.

    Yields:
        The calls, empty until the model has been called.

    Raises:
        ValueError: The model has no deformable layer, or a pattern matches none.
        TypeError: When the model is called with something else than a batch of images.
    """
    recording, tracer = Recording(), GridTracer()

    def see(name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = call_arguments(layer, args, kwargs)
        call = call_of(layer, name, _detached(inputs), sampled(layer, args, kwargs), tracer)
        if call.kind in ("convolution", "keys") and len(call.locations) != tracer.images:
            recording.without_place.append(name)
        else:
            recording._calls.append(call)

    with tracer.attached(model):
        handles = [
            layer.register_forward_hook(
                lambda layer, args, kwargs, output, name=name: see(name, layer, args, kwargs),
                with_kwargs=True,
            )
            for name, layer in deformable_layers(model, layers).items()
        ]
        try:
            yield recording
        finally:
            for handle in handles:
                handle.remove()


def _detached(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
