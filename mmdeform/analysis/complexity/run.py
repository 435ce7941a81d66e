"""Runs a model and leaves it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluation"]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients while the block runs.

    Afterwards each module is in its own mode again, and random numbers go on as if nothing had
    happened.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    gpus = [device for device in devices if device.type == "cuda"]
    model.eval()
    try:
        with torch.random.fork_rng(gpus), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
