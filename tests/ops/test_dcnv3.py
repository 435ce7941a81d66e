"""DCNv3; semantics and contracts of mmdeform.ops.dcnv3."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.ops import dcnv3, dcnv3_reference

from . import dcn
from .contracts import OperatorContract
from .contracts.operator import Arguments
from .dcn_edges import Edges


class TestContract(OperatorContract):
    name = "dcnv3"
    data = ("input",)
    coordinates = ("offset", "mask")
    backward_returns = ("input", "offset", "mask")
    cases = dcn.cases()

    @staticmethod
    def schema_arguments(arguments: Arguments) -> tuple:
        return tuple(list(v) if isinstance(v, tuple) else v for v in arguments.values())

    def sized(self, size: int) -> Arguments:
        return dcn.sized(size)

    def contended(self) -> Arguments:
        return dcn.contended()


@pytest.mark.parametrize(
    "name",
    ["asymmetric", "even-kernel-odd-dilation", "negative-scale", "remove-center", "one-pixel",
     "remove-center-5x5"],
)  # fmt: skip
def test_reference_equals_brute_force(name: str) -> None:
    arguments = dcn.make(**{**dcn.GEOMETRIES[name], "batch": 2, "group_channels": 2})
    expected = dcn.brute_force(arguments)
    assert expected.abs().max() > 0.5
    actual = dcnv3_reference(*TestContract.schema_arguments(arguments))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class TestEdges(Edges):
    @staticmethod
    def call(arguments: Arguments) -> Tensor:
        return dcnv3(**arguments)


def test_flops_equal_the_hand_count() -> None:
    """2 images x (3 x 5) pixels x 6 taps x 15 channels = 2700 sampled values."""
    arguments = TestContract().place(dcn.make())
    with FlopCounterMode(display=False) as counter:
        output = dcnv3(**arguments)
    assert counter.get_total_flops() == 2700 * 10
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2700 * 18
