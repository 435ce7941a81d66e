"""Multi-scale deformable attention; semantics and contracts of mmdeform.ops.ms_deform_attn."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdeform.ops import ms_deform_attn, ms_deform_attn_reference

from .contracts import OperatorContract
from .contracts.operator import TYPES, Arguments, Case, off_integer_lines


def make(
    batch: int = 2,
    queries: int = 7,
    heads: int = 3,
    channels: int = 8,
    shapes: tuple[tuple[int, int], ...] = ((5, 4), (3, 6)),
    points: int = 3,
    starts: tuple[int, ...] | None = None,
    tokens: int | None = None,
) -> Arguments:
    """Random arguments; some samples lie outside. ``starts`` default to consecutive levels."""
    areas = [height * width for height, width in shapes]
    if starts is None:
        starts = tuple(sum(areas[:level]) for level in range(len(shapes)))
    size = (batch, queries, heads, 1, points)
    locations = [
        torch.stack(
            [
                (off_integer_lines(*size, low=-2, high=extent) + 0.5) / max(extent, 1)
                for extent in (width, height)
            ],
            -1,
        )
        for height, width in shapes
    ]
    return {
        "value": torch.randn(batch, tokens or sum(areas), heads, channels, dtype=torch.float64),
        "spatial_shapes": torch.tensor(shapes),
        "level_start_index": torch.tensor(starts),
        "sampling_locations": torch.cat(locations, 3),
        "attention_weights": torch.rand(
            batch, queries, heads, len(shapes), points, dtype=torch.float64
        )
        + 0.2,
    }


PYRAMID = ((8, 9), (5, 6), (3, 4), (2, 3), (1, 2))


def case(emulated: bool = True, **geometry: Any) -> Case:
    return Case(lambda: make(**geometry), emulated)


CASES = {
    # A prime number of queries with more than one image, odd numbers of everything.
    "asymmetric": case(channels=5),
    "tiny": case(queries=3, heads=2, channels=3, shapes=((4, 3), (2, 3)), points=2),
    "1-channel": case(channels=1),
    "32-channels": case(queries=5, heads=2, channels=32),
    "33-channels": case(queries=5, heads=2, channels=33),
    "64-channels": case(queries=5, heads=1, channels=64),
    "65-channels": case(False, queries=5, heads=2, channels=65),
    "256-channels": case(False, queries=5, heads=2, channels=256),
    "1-level-1-point": case(shapes=((4, 7),), points=1),
    "1-level-8-points": case(shapes=((4, 7),), points=8),
    "5-levels": case(shapes=PYRAMID, points=4),
    "5-levels-5-points": case(heads=1, channels=6, shapes=PYRAMID, points=5),
    "1-head": case(heads=1),
    "8-heads": case(queries=3, heads=8, channels=4),
    "rows-and-columns-of-pixels": case(shapes=((1, 9), (8, 1), (1, 1))),
    "levels-in-another-order": case(starts=(18, 0)),
    "levels-with-gaps": case(starts=(1, 24), tokens=43),
    "overlapping-levels": case(starts=(0, 2), tokens=20),
    "empty-level": case(shapes=((5, 4), (0, 3), (2, 2))),
    "1-image": case(batch=1),
    "33-images": case(batch=33, queries=2, heads=1, channels=4),
    "no-image": case(batch=0),
    "no-query": case(queries=0),
    "257-queries": case(False, queries=257, heads=2, channels=16, shapes=((16, 17), (8, 9))),
    "encoder": case(False, queries=1031, heads=8, channels=32, shapes=((25, 21), (13, 11)),
                    points=4),
}  # fmt: skip


class TestContract(OperatorContract):
    name = "ms_deform_attn"
    data = ("value",)
    coordinates = ("sampling_locations", "attention_weights")
    backward_returns = ("value", "sampling_locations", "attention_weights")
    cases = CASES

    @staticmethod
    def schema_arguments(arguments: Arguments) -> tuple:
        return tuple(arguments.values())

    def sized(self, size: int) -> Arguments:
        # No two sizes are equal that differ in general: torch.compile would tie them together.
        return make(batch=3 + size, queries=7 + 2 * size, shapes=((3 + size, 4), (2, 2 + size)))

    def contended(self) -> Arguments:
        arguments = make(queries=601, heads=4, channels=32, shapes=((4, 4), (2, 2)), points=4)
        arguments["sampling_locations"][:, ::2] = arguments["sampling_locations"][:, :1]
        return arguments


def brute_force(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Every pixel of a level, weighted by the tents over its rows and columns."""
    batch, _, heads, channels = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    output = torch.zeros(batch, queries, heads * channels, dtype=torch.float64)
    for n in range(batch):
        for q in range(queries):
            for m in range(heads):
                for level in range(levels):
                    height, width = spatial_shapes[level].tolist()
                    start = level_start_index[level].item()
                    for p in range(points):
                        x, y = sampling_locations[n, q, m, level, p].tolist()
                        row, column = y * height - 0.5, x * width - 0.5
                        for r in range(height):
                            for c in range(width):
                                tent = max(0, 1 - abs(row - r)) * max(0, 1 - abs(column - c))
                                tent *= attention_weights[n, q, m, level, p].item()
                                pixel = value[n, start + r * width + c, m]
                                output[n, q, m * channels : (m + 1) * channels] += tent * pixel
    return output


@pytest.mark.parametrize(
    "name", ["asymmetric", "rows-and-columns-of-pixels", "levels-with-gaps", "empty-level"]
)
def test_reference_equals_brute_force(name: str) -> None:
    arguments = CASES[name].make()
    for key in ("value", "sampling_locations", "attention_weights"):
        arguments[key] = arguments[key][:, :3] if key != "value" else arguments[key]
    expected = brute_force(**arguments)
    assert expected.abs().max() > 0.5
    actual = ms_deform_attn_reference(*arguments.values())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def run(arguments: Arguments) -> dict[str, Tensor]:
    """Output and gradients of its sum."""
    leaves = {
        key: value.detach().requires_grad_()
        for key, value in arguments.items()
        if value is not None and value.is_floating_point()
    }
    output = ms_deform_attn(**{**arguments, **leaves})
    grads = torch.autograd.grad(output.sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def ramp(height: int, width: int, device: str, positions: list[tuple[float, float]]) -> Arguments:
    """One level whose pixel (r, c) is 10 + 3 r + c, sampled at (row, column) ``positions``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    position = torch.tensor(positions, dtype=torch.float64).view(1, -1, 1, 1, 1, 2)
    size = torch.tensor([width, height], dtype=torch.float64)
    return {
        "value": (10 + 3 * rows + columns).double().view(1, -1, 1, 1).to(device),
        "spatial_shapes": torch.tensor([[height, width]], device=device),
        "level_start_index": torch.tensor([0], device=device),
        "sampling_locations": ((position.flip(-1) + 0.5) / size).to(device),
        "attention_weights": torch.ones(position.shape[:-1], dtype=torch.float64, device=device),
    }


@pytest.mark.emulated
class TestEdges:
    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.parametrize("position", [1e9, -1e9, math.nan, math.inf, -math.inf, 1e30], ids=str)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_positions_far_outside(
        self, position: float, axis: int, types: tuple, device: str
    ) -> None:
        """One such sample contributes nothing, gets no gradient and leaves the others alone."""
        operator = TestContract()
        arguments = operator.place(make(channels=5), types, device)
        outside = dict(arguments)
        outside["sampling_locations"] = arguments["sampling_locations"].detach().clone()
        outside["sampling_locations"][1, 2, 1, 0, 1, axis] = position
        without = dict(arguments)
        without["attention_weights"] = arguments["attention_weights"].detach().clone()
        without["attention_weights"][1, 2, 1, 0, 1] = 0
        actual, expected = run(outside), run(without)
        assert not actual["sampling_locations"][1, 2, 1, 0, 1].any()
        assert not actual["attention_weights"][1, 2, 1, 0, 1].any()
        expected["attention_weights"][1, 2, 1, 0, 1] = 0
        for key, tensor in expected.items():
            assert tensor.isfinite().all()
            torch.testing.assert_close(actual[key], tensor, rtol=1e-5, atol=1e-5)

    def test_all_samples_outside(self, device: str) -> None:
        arguments = TestContract().place(make(), TYPES["fp32"], device)
        arguments["sampling_locations"] = arguments["sampling_locations"].detach() + 10
        for key, tensor in run(arguments).items():
            assert not tensor.any(), key

    def test_border(self, device: str) -> None:
        """Positions strictly inside (-1, H) x (-1, W) fade to zero; -1 and H contribute nothing."""
        height, width = 4, 6
        positions = [(-1, 2), (height, 2), (1, -1), (1, width), (-0.75, 2), (height - 0.75, 2),
                     (1, -0.75), (1, width - 0.75)]  # fmt: skip
        result = run(ramp(height, width, device, positions))
        expected = [0, 0, 0, 0, 0.25 * 12, 0.75 * (10 + 9 + 2), 0.25 * 13, 0.75 * (13 + 5)]
        torch.testing.assert_close(
            result["output"].flatten().cpu(), torch.tensor(expected).double()
        )
        grads = result["sampling_locations"].flatten(0, 4).cpu()  # (x, y)
        assert not grads[:4].any()
        # Along the fading axis the gradient is the border pixel's value, times the level's size.
        torch.testing.assert_close(grads[4:6, 1], torch.tensor([12.0, -21]).double() * height)
        torch.testing.assert_close(grads[6:8, 0], torch.tensor([13.0, -18]).double() * width)

    def test_integer_positions_have_the_right_sided_gradient(self, device: str) -> None:
        arguments = ramp(3, 4, device, [(1, 2), (0, 0), (2, 3), (-1 + 2**-20, 1)])
        with torch.no_grad():
            arguments["value"].square_()
        result = run(arguments)
        pixels = arguments["value"].view(3, 4).cpu()
        torch.testing.assert_close(
            result["output"].flatten()[:3].cpu(), torch.stack([pixels[1, 2], pixels[0, 0],
                                                               pixels[2, 3]])
        )  # fmt: skip
        grads = result["sampling_locations"].flatten(0, 4).cpu()[:3].flip(-1)  # (y, x)
        right = torch.tensor([
            [pixels[2, 2] - pixels[1, 2], pixels[1, 3] - pixels[1, 2]],
            [pixels[1, 0] - pixels[0, 0], pixels[0, 1] - pixels[0, 0]],
            [-pixels[2, 3], -pixels[2, 3]],
        ])  # fmt: skip
        torch.testing.assert_close(grads, right * torch.tensor([3.0, 4.0]).double())

    def test_identical_points(self, device: str) -> None:
        arguments = TestContract().place(make(queries=31, heads=1), TYPES["fp32"], device)
        one = arguments["sampling_locations"].detach().clone()
        one[:] = one.new_tensor([0.4, 0.3])
        arguments["sampling_locations"] = one
        result = run(arguments)
        weights = arguments["attention_weights"].detach()
        # All weights of a level gather at four pixels.
        gathered = result["value"].sum((1, 2))
        torch.testing.assert_close(
            gathered, weights.sum((1, 2, 3, 4))[:, None].expand_as(gathered), rtol=1e-5, atol=1e-4
        )
        assert ((result["value"] != 0).any(3).sum(1) <= 4 * weights.shape[3]).all()

    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
    def test_bad_pixels_stay_where_they_are(self, bad: float, types: tuple, device: str) -> None:
        """A pixel that is not finite reaches exactly the samples that touch it."""
        arguments = TestContract().place(
            ramp(4, 5, device, [(1.5, 1.5), (2.5, 2.5), (2.25, 3.75), (0.5, 3.5), (9, 9)]),
            types,
            device,
            requires_grad=False,
        )
        arguments["value"][0, 1 * 5 + 1] = bad
        result = run(arguments)
        touched = torch.tensor([True, False, False, False, False])
        assert torch.equal(~result["output"].flatten().isfinite().cpu(), touched)
        for key in ("sampling_locations", "attention_weights"):
            grads = result[key].view(5, -1).cpu()
            assert torch.equal(~grads.isfinite().all(1), touched), key
        assert result["value"].isfinite().all()

    @pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
    def test_bad_pixels_at_the_far_corner_of_the_border(self, types: tuple, device: str) -> None:
        """Clamped addresses of outside corners do not pull values in."""
        positions = [(-0.5, 2.5), (3.5, 2.5), (1.5, -0.5), (1.5, 4.5), (-0.5, -0.5)]
        arguments = TestContract().place(
            ramp(4, 5, device, positions), types, device, requires_grad=False
        )
        value = arguments["value"].view(4, 5)
        value[1:3, 1:2] = value[1:3, 3:4] = math.nan
        value[2, 2] = value[1, 2] = math.nan
        result = run(arguments)
        assert result["output"].isfinite().all()
        assert result["sampling_locations"].isfinite().all()

    def test_zero_attention(self, device: str) -> None:
        arguments = TestContract().place(make(), TYPES["fp32"], device)
        arguments["attention_weights"] = torch.zeros_like(arguments["attention_weights"])
        result = run(arguments)
        assert not result["output"].any()
        assert not result["value"].any()
        assert not result["sampling_locations"].any()
        assert result["attention_weights"].abs().max() > 0.1

    def test_levels_start_one_after_another_by_default(self, device: str) -> None:
        arguments = TestContract().place(make(shapes=PYRAMID), TYPES["fp32"], device)
        given = run(arguments)
        default = run({**arguments, "level_start_index": None})
        for key, tensor in given.items():
            assert torch.equal(tensor, default[key]), key

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_coordinates_stay_fp32_beside_half_values(
        self, dtype: torch.dtype, device: str
    ) -> None:
        """At a width of 300 pixels bf16 locations would be half a pixel off."""
        width = 300
        positions = torch.tensor([254.375, 199.25, 131.625])
        value = torch.zeros(1, width, 1, 1)
        value[0, positions.ceil().long()] = 1
        locations = torch.full((1, 3, 1, 1, 1, 2), 0.5)
        locations[0, :, 0, 0, 0, 0] = (positions + 0.5) / width
        weights = torch.ones(1, 3, 1, 1, 1)
        value, locations, weights = value.to(device), locations.to(device), weights.to(device)
        shapes = torch.tensor([[1, width]], device=device)
        expected = positions.frac()[None, :, None]
        coarse = ms_deform_attn(value, shapes, None, locations.to(dtype).float(), weights)
        if dtype == torch.bfloat16:
            assert (coarse.cpu() - expected).abs().max() > 0.1
        direct = ms_deform_attn(value.to(dtype), shapes, None, locations, weights)
        torch.testing.assert_close(direct.float().cpu(), expected, rtol=0, atol=2e-3)
        with torch.autocast(device, dtype):
            cast = ms_deform_attn(value, shapes, None, locations, weights)
        assert torch.equal(cast, direct)

    def test_16_bit_coordinates_are_computed_in_fp32(self, device: str) -> None:
        """A bf16 location is exact at 0.5; its position 149.5 in bf16 would not be."""
        width = 300
        value = torch.zeros(1, width, 1, 1, dtype=torch.bfloat16, device=device)
        value[0, 150] = 1
        locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, dtype=torch.bfloat16, device=device)
        weights = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16, device=device)
        shapes = torch.tensor([[1, width]], device=device)
        assert ms_deform_attn(value, shapes, None, locations, weights).item() == 0.5


def test_sums_are_wider_than_16_bits(device: str) -> None:
    """4096 equal contributions: a bf16 or fp16 sum would stop growing at 256 or 2048."""
    arguments = ramp(1, 1, device, [(0, 0)] * 4096)
    for dtype in (torch.bfloat16, torch.float16):
        arguments = TestContract().place(arguments, (dtype, torch.float32), device)
        assert run(arguments)["value"].item() == 4096
        reshaped = {
            **arguments,
            "sampling_locations": arguments["sampling_locations"].detach().view(
                1, 1, 1, 1, 4096, 2
            ),
            "attention_weights": torch.ones(1, 1, 1, 1, 4096, device=device),
        }  # fmt: skip
        assert run(reshaped)["output"].item() == 40960


def test_compiles_without_level_start_index(device: str) -> None:
    torch._dynamo.reset()
    arguments = TestContract().place(make(), TYPES["fp32"], device, requires_grad=False)
    arguments["level_start_index"] = None
    compiled = torch.compile(ms_deform_attn, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(**arguments), ms_deform_attn(**arguments))


def test_flops_equal_the_hand_count() -> None:
    """2 images x 7 queries x 3 heads x 2 levels x 3 points x 5 channels = 1260 sampled values."""
    arguments = TestContract().place(make(channels=5))
    with FlopCounterMode(display=False) as counter:
        output = ms_deform_attn(**arguments)
    assert counter.get_total_flops() == 1260 * 10
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 1260 * 18
