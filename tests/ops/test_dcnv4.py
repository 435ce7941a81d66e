"""DCNv4; semantics and contracts of mmdeform.ops.dcnv4."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.ops import dcnv4, dcnv4_reference

from . import dcn
from .contracts import OperatorContract
from .contracts.operator import TYPES, Arguments
from .dcn_edges import Edges


class TestContract(OperatorContract):
    name = "dcnv4"
    data = ("input",)
    coordinates = ("offset_mask",)
    backward_returns = ("input", "offset_mask")
    cases = dcn.cases(dcn.merged)

    @staticmethod
    def schema_arguments(arguments: Arguments) -> tuple:
        return tuple(list(v) if isinstance(v, tuple) else v for v in arguments.values())

    def sized(self, size: int) -> Arguments:
        return dcn.merged(dcn.sized(size))

    def contended(self) -> Arguments:
        return dcn.merged(dcn.contended())


@pytest.mark.parametrize("name", ["asymmetric", "remove-center", "1-channel"])
def test_reference_equals_brute_force(name: str) -> None:
    """The layout is a test's own: per group 2K offsets, then K weights."""
    arguments = dcn.make(**dcn.GEOMETRIES[name])
    expected = dcn.brute_force(arguments)
    assert expected.abs().max() > 0.5
    groups = arguments["groups"]
    taps = arguments["mask"].shape[3] // groups
    channels = -(-3 * groups * taps // 8) * 8
    offset_mask = torch.zeros(*arguments["mask"].shape[:3], channels, dtype=torch.float64)
    for g in range(groups):
        for k in range(taps):
            for axis in range(2):
                source = arguments["offset"][..., (g * taps + k) * 2 + axis]
                offset_mask[..., g * 3 * taps + 2 * k + axis] = source
            offset_mask[..., g * 3 * taps + 2 * taps + k] = arguments["mask"][..., g * taps + k]
    rest = TestContract.schema_arguments(arguments)[3:]
    actual = dcnv4_reference(arguments["input"], offset_mask, *rest)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class TestEdges(Edges):
    @staticmethod
    def call(arguments: Arguments) -> Tensor:
        rest = {key: value for key, value in arguments.items() if key not in ("offset", "mask")}
        groups = arguments.get("groups", 1)
        return dcnv4(offset_mask=dcn.merge(arguments["offset"], arguments["mask"], groups), **rest)

    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.usefixtures("poisoned")
    def test_padding_channels_do_not_matter(self, types: tuple, device: str) -> None:
        """They may hold anything; their gradient is zero."""
        contract = TestContract()
        arguments = contract.place(dcn.merged(dcn.make()), types, device)
        points = 3 * 6
        assert arguments["offset_mask"].shape[3] == 56  # 54, to the next multiple of 8
        bad = {**arguments, "offset_mask": arguments["offset_mask"].detach().clone()}
        bad["offset_mask"][..., 3 * points :] = math.nan
        bad["offset_mask"].requires_grad_()
        grad_output = contract.grad_output(arguments)
        expected = contract.run(contract.call, arguments, grad_output)
        actual = contract.run(contract.call, bad, grad_output)
        assert not actual["offset_mask"][..., 3 * points :].any()
        for key, tensor in expected.items():
            assert torch.equal(actual[key], tensor), key


def test_flops_equal_the_hand_count() -> None:
    """2 images x (3 x 5) pixels x 6 taps x 15 channels = 2700 sampled values."""
    arguments = TestContract().place(dcn.merged(dcn.make()))
    with FlopCounterMode(display=False) as counter:
        output = dcnv4(**arguments)
    assert counter.get_total_flops() == 2700 * 10
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2700 * 18
