"""Attention of DAT; semantics and contracts of mmdeform.ops.dat_attn."""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.ops import dat_attn, dat_attn_reference
from mmdeform.ops._library import has_kernel

from .contracts import OperatorContract
from .contracts.operator import TYPES, Arguments, Case
from .dat import DATA, assert_close, make, place, query_places, run


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
    data = DATA
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
