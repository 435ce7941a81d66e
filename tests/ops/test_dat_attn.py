"""DAT's attention and its sampling; semantics and contracts of mmdeform.ops.dat_attn."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.ops import dat_attn, dat_attn_reference, dat_sample
from mmdeform.ops._library import has_kernel

from .contracts import OperatorContract
from .contracts.operator import TYPES, Arguments, Case, off_integer_lines


def query_places(size: int, align_corners: bool) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    if not align_corners:
        return (2 * index + 1) / size - 1
    return 2 * index / (size - 1) - 1 if size > 1 else torch.zeros(1, dtype=torch.float64)


def off_cells(shape: tuple, size: int, table_size: int, align_corners: bool, far: float) -> Tensor:
    """Random coordinates in [-far, far] that keep all queries away from the table's cells.

    Numbers that bf16 holds exactly, the best of many; cells are where gradients jump.
    """
    candidates = (far * (2 * torch.rand(200, *shape) - 1)).bfloat16().double()
    displacement = (query_places(size, align_corners) - candidates[..., None]) / 2
    place = (displacement + 1) / 2 * (table_size - 1)
    if table_size == 1 or not candidates.numel() * size:  # everything lies on the one cell
        return candidates[0]
    best = (place - place.round()).abs().amin(-1).max(0)
    assert best.values.min() > 1e-3
    return candidates.gather(0, best.indices[None])[0]


def make(
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    channels: int = 8,
    size: tuple[int, int] = (5, 7),
    keys: int = 11,
    table: tuple[int, int] = (9, 13),
    align_corners: bool = True,
    scale: float | None = None,
    far: float = 1.3,
) -> Arguments:
    """Random arguments; ``far`` > 1: some biases are read outside the table."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    positions = [
        off_cells((batch, groups, keys), size[axis], table[axis], align_corners, 2 * far - 1)
        for axis in (0, 1)
    ]
    return {
        "query": 1.5 * randn(batch, heads, channels, *size),
        "key": 1.5 * randn(batch, heads, channels, keys),
        "value": randn(batch, heads, channels, keys),
        "positions": torch.stack(positions, -1),
        "table": randn(heads, *table),
        "scale": scale,
        "align_corners": align_corners,
    }


def case(emulated: bool = True, **geometry: Any) -> Case:
    return Case(lambda: make(**geometry), emulated)


def one_cell() -> Arguments:
    """A table of one cell, which all keys read but one."""
    arguments = make(table=(1, 1))
    arguments["positions"][:, :, 3, 1] = math.nan
    return arguments


CASES = {
    "asymmetric": case(channels=5),
    "tiny": case(batch=1, heads=2, groups=1, channels=2, size=(2, 3), keys=3, table=(3, 4)),
    "half-pixel-queries": case(channels=6, align_corners=False),
    "given-scale": case(scale=0.7),
    "1-group": case(groups=1, channels=4),
    "a-group-for-each-head": case(heads=3, groups=3),
    "1-head": case(heads=1, groups=1),
    "1-channel": case(channels=1),
    "32-channels": case(heads=2, channels=32),
    "33-channels": case(heads=2, channels=33, keys=7),
    "64-channels": case(heads=1, groups=1, channels=64),
    "96-channels": case(False, heads=2, channels=96),
    "200-channels": case(batch=1, heads=1, groups=1, channels=200, size=(2, 5), keys=19),
    "256-channels": case(False, heads=2, channels=256, keys=5),
    "many-keys": case(batch=1, heads=2, groups=1, channels=3, size=(7, 23), keys=139),
    "row-of-keys": case(keys=13, size=(1, 17), table=(1, 33)),
    "row-of-queries": case(size=(1, 19)),
    "column-of-queries": case(size=(17, 1), align_corners=False),
    "1-query": case(size=(1, 1)),
    "table-of-1-cell": Case(one_cell),
    "table-of-1-row": case(table=(1, 5)),
    "table-of-1-column": case(table=(6, 1), align_corners=False),
    "small-table": case(table=(2, 3), size=(7, 11)),
    "large-table": case(table=(23, 37), size=(3, 5)),
    "wide-table": case(table=(5, 83), size=(3, 19), heads=2),
    "few-biases-inside": case(far=3.0),
    "33-images": case(batch=33, heads=2, channels=3, size=(2, 3), keys=3),
    "no-image": case(batch=0),
    "no-query": case(size=(0, 3)),
    "prime-sizes": case(False, heads=3, groups=1, channels=13, size=(17, 23), keys=67,
                        table=(31, 43)),
    "as-trained": case(False, batch=1, heads=6, groups=3, channels=32, size=(14, 14), keys=49,
                       table=(27, 27)),
    "larger-than-trained": case(False, batch=1, heads=4, groups=2, channels=32, size=(25, 42),
                                keys=263, table=(27, 27), align_corners=False),
}  # fmt: skip


class TestContract(OperatorContract):
    name = "dat_attn"
    data = ("query", "key", "value")
    coordinates = ("positions", "table")
    backward_returns = ("query", "key", "value", "positions", "table")
    cases = CASES

    @staticmethod
    def schema_arguments(arguments: Arguments) -> tuple:
        *tensors, scale, align_corners = arguments.values()
        return (*tensors, tensors[0].shape[2] ** -0.5 if scale is None else scale, align_corners)

    def backward_arguments(
        self, grad_output: Tensor, arguments: Arguments, deterministic: bool = False
    ) -> tuple:
        *tensors, scale, align_corners = self.schema_arguments(arguments)
        with torch.no_grad():
            outputs = self.schema(*tensors, scale, align_corners)
        return (grad_output, *tensors, *outputs, scale, align_corners, deterministic)

    def reference(self, arguments: Arguments) -> Tensor:
        return dat_attn_reference(*self.schema_arguments(arguments))[0]

    def sized(self, size: int) -> Arguments:
        # No two sizes are equal that differ in general: torch.compile would tie them together.
        return make(
            batch=2 + size, channels=13, size=(4 + 2 * size, 15 + size), keys=23 + 2 * size,
            table=(9 + size, 28 + size),
        )  # fmt: skip

    def contended(self) -> Arguments:
        arguments = make(heads=4, channels=16, size=(23, 19), keys=83, table=(7, 9))
        arguments["positions"][:, :, ::2] = arguments["positions"][:, :, :1]
        return arguments

    def test_matches_fp64_reference(self, case: Case, types: tuple, device: str) -> None:
        arguments = self.place(case.make(), types, device)
        expected = self.check(arguments, types[0])
        if not expected["output"].numel():
            return
        for key, tensor in expected.items():
            if key == "positions" and arguments["table"].shape[1:] == (1, 1):
                assert not tensor.any()  # there is only one bias to read
            else:
                assert tensor.abs().max() > 0.1, key


def brute_force(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float | None,
    align_corners: bool,
) -> Tensor:
    """One query and head at a time; every cell of the table, weighted by tents."""
    batch, heads, channels, height, width = query.shape
    groups, keys = positions.shape[1:3]
    scale = channels**-0.5 if scale is None else scale
    output = torch.zeros_like(query)
    for b in range(batch):
        for m in range(heads):
            for i in range(height):
                for j in range(width):
                    logits = torch.zeros(keys, dtype=torch.float64)
                    for n in range(keys):
                        tents = []
                        for axis, (at, size) in enumerate(((i, height), (j, width))):
                            place = (2 * at + 1) / size - 1
                            if align_corners:
                                place = 2 * at / (size - 1) - 1 if size > 1 else 0
                            moved = place - positions[b, m * groups // heads, n, axis].item()
                            cells = torch.arange(table.shape[1 + axis], dtype=torch.float64)
                            place = (moved / 2 + 1) / 2 * (len(cells) - 1)
                            tents.append((1 - (place - cells).abs()).clamp(min=0))
                        bias = tents[0] @ table[m] @ tents[1]
                        logits[n] = scale * (query[b, m, :, i, j] @ key[b, m, :, n]) + bias
                    weights = (logits - logits.max()).exp()
                    output[b, m, :, i, j] = value[b, m] @ (weights / weights.sum())
    return output


@pytest.mark.parametrize(
    "name",
    ["asymmetric", "half-pixel-queries", "given-scale", "1-query", "table-of-1-column",
     "small-table", "few-biases-inside"],
)  # fmt: skip
def test_reference_equals_brute_force(name: str) -> None:
    arguments = CASES[name].make()
    arguments = {
        key: tensor[:1] if key in ("query", "key", "value", "positions") else tensor
        for key, tensor in arguments.items()
    }
    expected = brute_force(**arguments)
    assert expected.abs().max() > 0.5
    actual = dat_attn_reference(*TestContract.schema_arguments(arguments))[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def grid_sample_composition(arguments: Arguments) -> Tensor:
    """The published form: displacements of all queries from all keys, sampled by F.grid_sample."""
    query, positions, table = (arguments[key] for key in ("query", "positions", "table"))
    batch, heads, channels, height, width = query.shape
    groups = positions.shape[1]
    places = [query_places(size, arguments["align_corners"]) for size in (height, width)]
    grid = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).flatten(0, 1)  # (H*W, 2)
    displacement = (grid[:, None] - positions.flatten(0, 1)[:, None]) * 0.5
    tables = table.unflatten(0, (groups, -1)).repeat(batch, 1, 1, 1)
    bias = F.grid_sample(tables, displacement.flip(-1), align_corners=True)
    bias = bias.view(batch, heads, height * width, -1)
    logits = query.flatten(3).transpose(2, 3) @ arguments["key"] * channels**-0.5 + bias
    output = logits.softmax(-1) @ arguments["value"].transpose(2, 3)
    return output.transpose(2, 3).reshape(query.shape)


@pytest.mark.parametrize("align_corners", [False, True])
def test_equals_the_published_form(align_corners: bool) -> None:
    contract = TestContract()
    arguments = contract.place(make(align_corners=align_corners), TYPES["fp64"])
    grad_output = contract.grad_output(arguments)
    expected = contract.run(grid_sample_composition, arguments, grad_output)
    for key, tensor in contract.run(contract.call, arguments, grad_output).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-10, atol=1e-10)


def run(arguments: Arguments, function: Callable = dat_attn) -> dict[str, Tensor]:
    """Output, and gradients of a weighted sum of it."""
    leaves = {
        key: value.detach().requires_grad_()
        for key, value in arguments.items()
        if isinstance(value, Tensor)
    }
    output = function(**{**arguments, **leaves})
    # The sum alone would have no gradient with respect to logits where values are equal.
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    grads = torch.autograd.grad((output * weights.view(output.shape)).sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def place(arguments: Arguments, name: str, device: str) -> Arguments:
    return TestContract().place(arguments, TYPES[name], device, requires_grad=False)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for key, tensor in expected.items():
        limit = tolerance * max(1.0, tensor.double().abs().max().item())
        torch.testing.assert_close(
            actual[key].double(), tensor.double(), rtol=0, atol=limit, msg=lambda t, k=key: k + t
        )


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


def test_logsumexp(device: str) -> None:
    """The second result of the schema; without a gradient."""
    contract = TestContract()
    arguments = contract.schema_arguments(contract.place(make(), TYPES["fp32"], device))
    output, logsumexp = torch.ops.mmdeform.dat_attn(*arguments)
    assert output.requires_grad
    assert not logsumexp.requires_grad
    wide = [a.detach().double().cpu() if isinstance(a, Tensor) else a for a in arguments]
    expected = dat_attn_reference(*wide)[1]
    torch.testing.assert_close(logsumexp.cpu(), expected.float(), rtol=1e-6, atol=1e-5)
    assert logsumexp.is_contiguous()


@pytest.mark.skipif(not has_kernel("dat_attn", "cpu"), reason="needs the compiled library")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    arguments = place(TestContract().contended(), "fp32", "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(arguments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for key, tensor in results[0].items():
            assert torch.equal(result[key], tensor), key


def test_flops_equal_the_hand_count() -> None:
    """2 images x 4 heads x 35 queries x 11 keys x 5 channels = 15 400 multiply-adds a product."""
    arguments = TestContract().place(make(channels=5))
    with FlopCounterMode(display=False) as counter:
        output = dat_attn(**arguments)
    assert counter.get_total_flops() == 2 * 2 * 15400
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * 5 * 15400


class TestBackends:
    @pytest.mark.parametrize("types", TYPES)
    def test_reference(self, types: str, device: str) -> None:
        arguments = place(make(channels=6), types, device)
        expected = run({**arguments, "backend": "auto"})
        actual = run({**arguments, "backend": "reference"})
        dtype = TYPES[types][0]
        assert all(tensor.dtype == expected[key].dtype for key, tensor in actual.items())
        assert_close(actual, expected, 20 * torch.finfo(dtype).eps)

    def test_reference_can_be_differentiated_twice(self) -> None:
        arguments = CASES["tiny"].make()
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}

        def function(*leaves: Tensor) -> Tensor:
            given = dict(zip(tensors, leaves, strict=True))
            return dat_attn(**{**arguments, **given}, backend="reference")

        leaves = [tensor.requires_grad_() for tensor in tensors.values()]
        assert torch.autograd.gradgradcheck(function, leaves, atol=1e-6, rtol=1e-5)

    def test_fused_wants_a_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = place(make(), "fp32", "cpu")
        monkeypatch.setattr(sys.modules["mmdeform.ops.dat_attn"], "has_kernel", lambda *_: False)
        dat_attn(**arguments)
        with pytest.raises(RuntimeError, match="backend: expected a kernel for 'fused', dat_attn"):
            dat_attn(**arguments, backend="fused")

    @pytest.mark.parametrize("compiled", [False, True])
    def test_fused_is_the_kernel(self, compiled: bool, kernel_device: str) -> None:
        arguments = place(make(), "fp32", kernel_device)
        function = dat_attn
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(dat_attn, backend="aot_eager", fullgraph=True)
        assert torch.equal(function(**arguments, backend="fused"), dat_attn(**arguments))


class TestSample:
    """mmdeform.ops.dat_sample."""

    def arguments(self, types: str, device: str, size: tuple[int, int] = (5, 7)) -> tuple:
        data, coordinates = TYPES[types]
        pixels = off_integer_lines(2, 3, 11, 2, low=-2, high=max(size))
        extent = torch.tensor(size) - 1
        positions = torch.where(extent > 0, 2 * pixels / extent.clamp(min=1) - 1, 0.25)
        input = torch.randn(2, 6, *size, dtype=torch.float64)
        return input.to(device, data), positions.to(device, coordinates)

    @pytest.mark.parametrize("size", [(5, 7), (1, 7), (6, 1), (1, 1)], ids=str)
    @pytest.mark.parametrize("types", TYPES)
    def test_equals_grid_sample(self, types: str, size: tuple[int, int], device: str) -> None:
        arguments = self.arguments(types, device, size)
        results = []
        for backend in ("auto", "reference"):
            input, positions = (tensor.detach().requires_grad_() for tensor in arguments)
            samples = dat_sample(input, positions, backend)
            assert samples.shape == (2, 6, 11)
            assert samples.dtype == input.dtype
            assert samples.is_contiguous()
            weights = torch.linspace(-1, 1, 11, dtype=samples.dtype, device=device)
            grads = torch.autograd.grad((samples * weights).sum(), (input, positions))
            results.append(
                dict(zip(("output", "input", "positions"), (samples, *grads), strict=True))
            )
        # Positions of a 16-bit dtype may round to a pixel's edge, where gradients jump.
        if types in ("fp16", "bf16"):
            results = [{**result, "positions": torch.zeros(1)} for result in results]
        assert results[0]["output"].abs().max() > 0.5
        assert_close(*results, 20 * torch.finfo(TYPES[types][0]).eps)

    def test_groups_sample_their_own_channels(self, device: str) -> None:
        input, positions = self.arguments("fp64", device)
        together = dat_sample(input, positions)
        for group in range(3):
            own = slice(2 * group, 2 * group + 2)
            alone = dat_sample(input[:, own], positions[:, group : group + 1])
            torch.testing.assert_close(together[:, own], alone)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
    def test_bad_positions(self, bad: float, backend: str, device: str) -> None:
        for size in ((5, 7), (1, 1)):
            input, positions = self.arguments("fp32", device, size)
            expected = dat_sample(input, positions)
            positions[1, 2, 3, 0] = bad
            expected[1, 4:, 3] = 0
            positions.requires_grad_()
            output = dat_sample(input, positions, backend)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            output.sum().backward()
            assert positions.grad.isfinite().all()
            assert not positions.grad[1, 2, 3].any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_autocast(self, dtype: torch.dtype, device: str) -> None:
        input, positions = self.arguments("fp32", device)
        with torch.autocast(device, dtype):
            output = dat_sample(input, positions)
        assert torch.equal(output, dat_sample(input.to(dtype), positions))

    def test_compiles(self, device: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(dat_sample, backend="aot_eager", fullgraph=True, dynamic=True)
        for size in ((5, 7), (6, 9)):
            arguments = self.arguments("fp32", device, size)
            torch.testing.assert_close(compiled(*arguments), dat_sample(*arguments))

    @pytest.mark.parametrize(
        ("input", "positions", "message"),
        [
            ((6, 5, 7), (2, 3, 11, 2), r"input: expected shape \(B, C, H, W\), got \(6, 5, 7\)"),
            ((2, 6, 5, 7), (1, 3, 11, 2), r"positions: expected .*2, G, Ns, 2.* got \(1, 3, 11, 2"),
            ((2, 6, 5, 7), (2, 3, 11, 3), r"positions: expected .*2, G, Ns, 2.* got \(2, 3, 11, 3"),
            ((2, 6, 5, 7), (2, 4, 11, 2), r"positions: expected groups .* 6 channels .*, got 4"),
            ((2, 6, 5, 7), (2, 0, 11, 2), r"positions: expected groups .*, got 0"),
        ],
    )
    def test_refuses(self, input: tuple, positions: tuple, message: str) -> None:
        with pytest.raises(ValueError, match="^" + message):
            dat_sample(torch.zeros(input), torch.zeros(positions))

    def test_refuses_types(self) -> None:
        zeros = torch.zeros(1, 1, 2, 2)
        with pytest.raises(ValueError, match=r"positions: expected a floating.* got torch.int64"):
            dat_sample(zeros, zeros.long())
        with pytest.raises(ValueError, match=r"input: expected a floating.* got torch.int64"):
            dat_sample(zeros.long(), zeros)
        with pytest.raises(ValueError, match=r"positions: expected on cpu as input, got meta"):
            dat_sample(zeros, zeros.to("meta"))
        with pytest.raises(ValueError, match=r"backend: expected one of auto, .* got 'cpu'"):
            dat_sample(zeros, zeros, "cpu")
