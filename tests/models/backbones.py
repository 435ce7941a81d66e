"""What tests of backbones do with them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gradients(model: nn.Module, image: Tensor) -> tuple[list[Tensor], int]:
    """Outputs and gradients, and how many bytes were kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = model(image)
    grads = torch.autograd.grad(sum(y.square().mean() for y in maps), [*model.parameters()])
    return [*maps, *grads], sum(kept.values())


def cast(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], tuple[Tensor, ...]]:
    return lambda model, image: model.to(dtype)(image.to(dtype))


def autocast(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], tuple[Tensor, ...]]:
    def call(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype):
            return model(image)

    return call
