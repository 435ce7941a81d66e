"""Attention of DAT where it is easy to get wrong."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmdeform.ops import dat_attn

from .contracts.operator import TYPES
from .dat import assert_close, make, place, run


@pytest.mark.emulated
class TestEdges:
    @pytest.mark.parametrize("types", TYPES)
    @pytest.mark.parametrize("position", [1e9, -1e9, math.nan, math.inf, -math.inf, 30], ids=str)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_positions_far_outside(
        self, position: float, axis: int, types: str, device: str
    ) -> None:
        """Such a key is attended to without a bias, and its position gets no gradient."""
        arguments = place(make(), types, device)
        arguments["positions"][1, 0, 3, axis] = position
        actual = run(arguments)
        assert not actual["positions"][1, 0, 3].any()
        # A key that is outside along the other axis has no bias either.
        arguments["positions"][1, 0, 3] = 9
        expected = run(arguments)
        for key, tensor in expected.items():
            assert tensor.isfinite().all(), key
            assert torch.equal(actual[key], tensor), key
        assert expected["key"][1, 0, :, 3].abs().max() > 1e-4

    def test_all_positions_outside(self, device: str) -> None:
        """What is left is plain attention."""
        arguments = place(make(), "fp32", device)
        arguments["positions"] += 10
        result = run(arguments)
        assert not result["positions"].any()
        assert not result["table"].any()
        query = arguments["query"].flatten(3).transpose(2, 3)
        expected = F.scaled_dot_product_attention(
            query, arguments["key"].transpose(2, 3), arguments["value"].transpose(2, 3)
        )
        torch.testing.assert_close(result["output"].flatten(3).transpose(2, 3), expected)

    @pytest.mark.parametrize("position", [math.nan, 30], ids=str)
    def test_a_table_of_one_cell(self, position: float, device: str) -> None:
        """Every finite displacement, however large, reads the one cell."""
        arguments = place(make(table=(1, 1), channels=3), "fp64", device)
        arguments["positions"][0, 0, 0, 0] = position
        bias = torch.zeros(2, 4, 11, dtype=torch.float64, device=device)
        bias += arguments["table"][None, :, :, 0]
        if math.isnan(position):
            bias[0, :2, 0] = 0  # the heads of group 0
        logits = torch.einsum("bmdij,bmdn->bmijn", arguments["query"], arguments["key"])
        weights = (logits * 3**-0.5 + bias[:, :, None, None]).softmax(-1)
        expected = torch.einsum("bmijn,bmdn->bmdij", weights, arguments["value"])
        torch.testing.assert_close(run(arguments)["output"], expected)

    @pytest.mark.parametrize(
        ("row", "weights"),
        [(-1, []), (-0.75, [(0, 0.25)]), (0, [(0, 1)]), (1.25, [(1, 0.75), (2, 0.25)]),
         (2, [(2, 1)]), (2.75, [(2, 0.25)]), (3, [])],
    )  # fmt: skip
    @pytest.mark.parametrize("axis", [0, 1])
    def test_border(self, row: float, weights: list, axis: int, device: str) -> None:
        """Biases fade to zero outside the table; -1 and its size contribute nothing."""
        # One query at 0, two keys; the other axis reads the middle of three cells.
        table = torch.randn(1, 3, 3, dtype=torch.float64)
        line = table[0, :, 1] if axis == 0 else table[0, 1]
        positions = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
        positions[0, 0, 0, axis] = -2 * (row - 1)
        positions[0, 0, 1] = 50
        zeros = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
        arguments = {
            "query": zeros[..., :1, None],
            "key": zeros,
            "value": torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64),
            "positions": positions,
            "table": table,
        }
        arguments = {key: tensor.to(device) for key, tensor in arguments.items()}
        leaves = {key: tensor.requires_grad_() for key, tensor in arguments.items()}
        output = dat_attn(**leaves)
        bias = sum(weight * line[cell].item() for cell, weight in weights)
        torch.testing.assert_close(output.item(), 1 / (1 + math.exp(-bias)))
        output.backward()
        softmax_gradient = output.item() * (1 - output.item())
        grad = leaves["table"].grad[0].cpu()
        grad_line = grad[:, 1] if axis == 0 else grad[1]
        expected = torch.zeros(3, dtype=torch.float64)
        for cell, weight in weights:
            expected[cell] = weight * softmax_gradient
        torch.testing.assert_close(grad_line, expected)
        torch.testing.assert_close(grad.sum(), expected.sum())
        # The derivative along the axis is the right-sided one.
        low = math.floor(row)
        cells = [line[cell].item() if 0 <= cell < 3 else 0.0 for cell in (low, low + 1)]
        slope = cells[1] - cells[0] if -1 < row < 3 else 0.0
        grad_position = leaves["positions"].grad[0, 0, 0, axis].item()
        assert grad_position == pytest.approx(-0.5 * slope * softmax_gradient, abs=1e-12)

    @pytest.mark.parametrize("types", ["fp64", "fp32", "bf16-fp32"])
    @pytest.mark.parametrize("order", ["rising", "falling"])
    def test_large_logits(self, order: str, types: str, device: str) -> None:
        """exp of these logits would overflow; only their distance from the largest one counts."""
        arguments = place(make(channels=4, keys=67, size=(3, 19)), types, device)
        # A common logit of 4000 per key step: keys come in rising or falling order.
        arguments["query"][:] = 100
        keys = torch.linspace(1, 20, 67, device=device).to(arguments["key"])
        arguments["key"][:] = keys if order == "rising" else keys.flip(0)
        result = run(arguments)
        assert all(tensor.isfinite().all() for tensor in result.values())
        best = -1 if order == "rising" else 0
        expected = arguments["value"][..., best, None, None].expand_as(result["output"])
        torch.testing.assert_close(result["output"], expected, rtol=1e-5, atol=1e-5)
        weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype, device=device)
        total = weights.double().view(expected.shape).sum((3, 4))
        torch.testing.assert_close(result["value"][..., best].double(), total, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize(("types", "tolerance"), [("fp64", 2e-15), ("fp32", 1e-6)])
    def test_small_weights_are_exact(self, types: str, tolerance: float, device: str) -> None:
        """Softmax over two keys, whose logits differ by up to 80."""
        logits = torch.linspace(-80, 0, 1001, dtype=TYPES[types][0], device=device)
        keys = torch.tensor([[[[1.0, 0.0]]]], dtype=logits.dtype, device=device)
        positions = torch.full((1, 1, 2, 2), 50.0, dtype=logits.dtype, device=device)
        table = torch.zeros(1, 2, 2, dtype=logits.dtype, device=device)
        actual = dat_attn(logits.view(1, 1, 1, 7, -1), keys, keys, positions, table, scale=1.0)
        expected = logits.double().sigmoid().view(actual.shape)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)

    @pytest.mark.parametrize("shift", [-500, 500])
    def test_a_common_logit_changes_nothing(self, shift: float, device: str) -> None:
        arguments = place(make(table=(1, 1)), "fp64", device)
        expected = run(arguments)
        arguments["table"] += shift
        assert_close(run(arguments), expected, 1e-11)

    @pytest.mark.parametrize("types", TYPES)
    def test_one_key(self, types: str, device: str) -> None:
        """Whatever its logit, the output is its value."""
        arguments = place(make(keys=1), types, device)
        result = run(arguments)
        expected = arguments["value"][..., None].expand_as(result["output"])
        assert torch.equal(result["output"], expected)
        for key in ("query", "key", "positions", "table"):
            assert result[key].abs().max() < 1e-5, key
        assert result["value"].abs().max() > 0.5

    @pytest.mark.parametrize("types", TYPES)
    def test_equal_keys(self, types: str, device: str) -> None:
        """All keys in one place: the output is the mean of the values."""
        arguments = place(make(far=0.7, keys=37), types, device)
        arguments["key"][:] = arguments["key"][..., :1]
        arguments["positions"][:] = arguments["positions"][:, :, :1]
        mean = arguments["value"].double().mean(-1)[..., None, None]
        output = run(arguments)["output"].double()
        torch.testing.assert_close(output, mean.expand_as(output), rtol=1e-2, atol=1e-2)

    def test_heads_use_their_own_group_and_table(self, device: str) -> None:
        """Each head alone gives what it gives among others."""
        arguments = place(make(heads=6, groups=3), "fp64", device)
        together = dat_attn(**arguments)
        for head in range(6):
            one, group = slice(head, head + 1), slice(head // 2, head // 2 + 1)
            alone = {key: arguments[key][:, one] for key in ("query", "key", "value")}
            alone["positions"] = arguments["positions"][:, group]
            alone["table"] = arguments["table"][one]
            torch.testing.assert_close(dat_attn(**alone), together[:, one])

    def test_bad_queries_stay_where_they_are(self, device: str) -> None:
        arguments = place(make(size=(3, 37)), "fp32", device)
        arguments["query"][0, 1, 2, 1, 30] = math.nan
        bad = ~dat_attn(**arguments).isfinite()
        assert bad[0, 1, :, 1, 30].all()
        assert bad.sum() == bad.shape[2]

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    def test_positions_stay_fp32_beside_half_data(self, dtype: str, device: str) -> None:
        """In a table of 201 columns a bf16 position near 1 would be off by half a column."""
        table = torch.linspace(-10, 10, 201, dtype=torch.float32).view(1, 1, 201).to(device)
        positions = torch.tensor([[[[0.0, 0.9139], [0.0, 50.0]]]], device=device)
        data = TYPES[dtype][0]
        zeros = torch.zeros(1, 1, 1, 2, dtype=data, device=device)
        value = torch.tensor([[[[1.0, 0.0]]]], dtype=data, device=device)
        output = dat_attn(zeros[..., :1, None], zeros, value, positions, table)
        expected = 1 / (1 + math.exp(10 * 0.9139 / 2))
        assert output.item() == pytest.approx(expected, rel=4e-3)

    def test_sums_are_wider_than_16_bits(self, device: str) -> None:
        """4096 equal contributions: a bf16 or fp16 sum would stop growing at 256 or 2048."""
        for dtype in (torch.bfloat16, torch.float16):
            zeros = torch.zeros(1, 1, 2, 64, 64, dtype=dtype, device=device)
            value = torch.ones(1, 1, 2, 1, dtype=dtype, device=device).requires_grad_()
            table = torch.zeros(1, 1, 1, device=device)
            positions = torch.zeros(1, 1, 1, 2, device=device)
            output = dat_attn(zeros, zeros[..., :1, 0], value, positions, table)
            output.sum().backward()
            assert (value.grad == 4096).all()
