"""Both counters, torch's and mmengine's, know every operator."""

import pytest
import torch
from mmengine.analysis import FlopAnalyzer, complexity_analysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmdeform.analysis.flops  # noqa: F401
from mmdeform.ops import dat_sample

OPERATORS = sorted(
    name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmdeform::")
)


def test_there_are_operators() -> None:
    assert {"mmdeform::dcnv4", "mmdeform::dcnv4_backward"} <= set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_mmengine_counts_every_operator(operator: str) -> None:
    assert operator in complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    assert operator in complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS


class Sample(nn.Module):
    def forward(self, input: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return dat_sample(input, positions)


def test_keys_of_dat_by_hand() -> None:
    """2 images x 6 channels x 5 keys = 60 values: four multiply-adds of the blend, one weight."""
    input = torch.randn(2, 6, 4, 3, requires_grad=True)
    positions = torch.rand(2, 3, 5, 2)  # three groups of two channels
    with FlopCounterMode(display=False) as counter:
        output = dat_sample(input, positions)
    assert output.shape == (2, 6, 5)
    assert counter.get_total_flops() == 2 * 60 * 5
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    # Four of dot products, five of the scatter.
    assert counter.get_total_flops() == 2 * 60 * 9
    counts = FlopAnalyzer(Sample(), (input.detach(), positions)).by_operator()
    assert counts == {"ms_deform_attn": 60 * 5}
