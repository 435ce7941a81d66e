"""Numbers that depend on a name and a shape alone: on no generator, version of torch or thread."""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

MASK = 2**32 - 1


def uniform(name: str, shape: Sequence[int]) -> Tensor:
    """Numbers in [-1, 1) of this shape, fp64: element i is a hash of CRC-32 of the name, and of i.

    The hash is 32-bit integer arithmetic (two rounds of multiply and xor-shift), so that it has the
    same bits everywhere.
    """
    bits = torch.arange(math.prod(shape), dtype=torch.int64)
    bits.add_(zlib.crc32(name.encode())).bitwise_and_(MASK)
    for multiplier in (0x45D9F3B, 0x2C1B3C6D):
        bits.bitwise_xor_(bits >> 16).mul_(multiplier).bitwise_and_(MASK)
    bits.bitwise_xor_(bits >> 16)
    return bits.double().div_(2**31).sub_(1).reshape(tuple(shape))


def fill_parameters(model: nn.Module) -> None:
    """Gives each parameter the numbers that belong to its name and shape, all of a useful size.

    Weights of norms and scales of residuals lie around 1, other vectors are small, tables of
    position biases are of order 1 (those that are freshly initialised are too small to be seen),
    and the rest keeps the variance of what it multiplies.
    """
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = uniform(name, parameter.shape)
            if name in norms or name.endswith(("gamma1", "gamma2")):
                values = 1 + values.mul_(0.2)
            elif name.endswith(("table", "rpb")):
                pass
            elif parameter.ndim > 1:
                values.mul_(math.sqrt(3 / math.prod(parameter.shape[1:])))
            else:
                values.mul_(0.2)
            parameter.copy_(values)


def statistics(output: Tensor) -> list[float]:
    """Mean, mean magnitude, and the mean of the product with ``uniform("probe", shape)``."""
    probe = uniform("probe", output.shape).to(output)
    return [output.mean().item(), output.abs().mean().item(), (output * probe).mean().item()]
