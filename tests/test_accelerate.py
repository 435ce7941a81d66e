"""mmcv's layers with this package's operators, against the same layers without."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("mmcv.ops")
import mmcv.ops

from mmdeform import accelerate

ATTENTION = importlib.import_module("mmcv.ops.multi_scale_deform_attn")


@pytest.fixture(autouse=True)
def restored():
    yield
    accelerate.disable()


class Calls(TorchDispatchMode):
    """Counts the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mmdeform":
            name = function._schema.name.removeprefix("mmdeform::")
            self.count[name] = self.count.get(name, 0) + 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("cls", [mmcv.ops.DeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack])
def test_convolutions(cls):
    layer = cls(16, 8, 3, padding=1)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    x = torch.randn(2, 16, 9, 9, requires_grad=True)

    def results():
        output = layer(x)
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    accelerate.disable()
    expected = results()
    accelerate.enable()
    with Calls() as calls:
        actual = results()
    assert calls.count == {"deform_conv2d": 1, "deform_conv2d_backward": 1}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
