"""The attention that keeps to the level of each query, against a loop and against masked MSDA."""

import math

import pytest
import torch
from torch.nn.functional import linear

from mmdeform.layers import MultiScaleDeformableAttention, SingleLevelDeformableAttention

SHAPES = [(5, 4), (3, 2), (1, 1)]
SIZES = [20, 6, 1]
TOKENS = sum(SIZES)
CONFIG = dict(embed_dims=16, num_heads=2, num_points=3, dropout=0.0, batch_first=True)


def make_layer(**changes) -> SingleLevelDeformableAttention:
    torch.manual_seed(0)
    layer = SingleLevelDeformableAttention(**CONFIG | changes).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def make_inputs(reference_size: int = 2) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)

    def tokens() -> torch.Tensor:
        return torch.randn(2, TOKENS, 16, generator=random, dtype=torch.float64)

    points = torch.rand(2, TOKENS, 3, reference_size, generator=random, dtype=torch.float64)
    return dict(
        query=tokens(),
        value=tokens(),
        query_pos=tokens(),
        key_padding_mask=torch.rand(2, TOKENS, generator=random) < 0.2,
        reference_points=points,
        spatial_shapes=torch.tensor(SHAPES),
        level_start_index=torch.tensor([0, 20, 26]),
    )


def bilinear(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Samples an image (H, W, C), whose pixel i has its centre at i, with zeros outside."""
    left, top = math.floor(x), math.floor(y)
    result = torch.zeros(image.shape[2], dtype=image.dtype)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                weight = (1 - abs(x - column)) * (1 - abs(y - row))
                result += weight * image[row, column]
    return result


def loop(layer: SingleLevelDeformableAttention, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The definition, token by token."""
    heads, points = layer.num_heads, layer.num_points
    queries = inputs["query"] + inputs["query_pos"]
    values = linear(inputs["value"], layer.value_proj.weight, layer.value_proj.bias)
    values = values.masked_fill(inputs["key_padding_mask"][..., None], 0)
    output = torch.zeros_like(queries)
    for image in range(len(queries)):
        start = 0
        for level, (height, width) in enumerate(SHAPES):
            stop = start + height * width
            level_map = values[image, start:stop].view(height, width, heads, -1)
            for token in range(start, stop):
                query = queries[image, token]
                offsets = layer.sampling_offsets(query).view(heads, points, 2)
                weights = layer.attention_weights(query).view(heads, points).softmax(-1)
                point = inputs["reference_points"][image, token, level]
                parts = []
                for head in range(heads):
                    total = torch.zeros(level_map.shape[-1], dtype=queries.dtype)
                    for k in range(points):
                        if len(point) == 2:
                            place = point + offsets[head, k] / torch.tensor([width, height])
                        else:
                            place = point[:2] + offsets[head, k] / points * point[2:] / 2
                        x, y = place[0] * width - 0.5, place[1] * height - 0.5
                        sample = bilinear(level_map[:, :, head], float(x), float(y))
                        total += weights[head, k] * sample
                    parts.append(total)
                output[image, token] = layer.output_proj(torch.cat(parts))
            start = stop
    return output + inputs["query"]


@pytest.mark.parametrize("num_points", [1, 3])
@pytest.mark.parametrize("reference_size", [2, 4])
def test_is_the_loop_over_tokens(reference_size: int, num_points: int) -> None:
    layer = make_layer(num_points=num_points)
    inputs = make_inputs(reference_size)
    with torch.no_grad():
        torch.testing.assert_close(layer(**inputs), loop(layer, inputs), rtol=1e-10, atol=1e-10)


def gradients(output: torch.Tensor, wanted: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), wanted)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("reference_size", [2, 4])
def test_is_multi_scale_attention_with_the_weights_of_other_levels_masked(
    reference_size: int, batch_first: bool
) -> None:
    layer = make_layer(batch_first=batch_first)
    other = MultiScaleDeformableAttention(**CONFIG | dict(num_levels=3)).double()
    with torch.no_grad():
        for name in ("value_proj", "output_proj"):
            getattr(other, name).load_state_dict(getattr(layer, name).state_dict())
        for name in ("sampling_offsets", "attention_weights"):  # the same to every level
            for key, parameter in getattr(layer, name).named_parameters():
                rows = parameter.view(2, 1, -1, *parameter.shape[1:])  # (M, 1, ...)
                rows = rows.expand(2, 3, *rows.shape[2:]).reshape(-1, *parameter.shape[1:])
                getattr(getattr(other, name), key).copy_(rows)
    own = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
    masked = torch.arange(3) != own[:, None]  # (S, L)
    plain_prediction = other.predict_sampling

    def predict_own_level(*args) -> tuple[torch.Tensor, torch.Tensor]:
        locations, weights = plain_prediction(*args)
        weights = weights.masked_fill(masked[None, :, None, :, None], 0)
        return locations, weights / weights.sum((3, 4), keepdim=True)

    other.predict_sampling = predict_own_level
    inputs = make_inputs(reference_size)
    names = ("query", "value", "query_pos", "reference_points")
    leaves = {name: inputs[name].requires_grad_() for name in names}
    expected = other(**inputs)
    shared = [leaves[name] for name in names] + [
        other.value_proj.weight,
        other.output_proj.weight,
    ]
    expected_gradients = gradients(expected, shared)
    shared[4:] = [layer.value_proj.weight, layer.output_proj.weight]
    if batch_first:
        got = layer(**inputs)
    else:
        tokens = {k: inputs[k].transpose(0, 1) for k in ("query", "value", "query_pos")}
        got = layer(**inputs | tokens).transpose(0, 1)
    torch.testing.assert_close(got, expected)
    for name, a, b in zip(
        [*names, "value_proj", "output_proj"],
        gradients(got, shared),
        expected_gradients,
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_no_level_sees_another() -> None:
    layer, inputs = make_layer(), make_inputs()
    torch.nn.init.zeros_(layer.sampling_offsets.weight)  # every token samples inside
    torch.nn.init.zeros_(layer.sampling_offsets.bias)
    before = layer(**inputs)
    start = 20
    inputs["value"][:, start : start + 6] += 1.0  # the second level
    inputs["reference_points"][:, :, 1] += 0.01
    changed = (layer(**inputs) != before).any(-1)[0]
    assert torch.equal(changed.nonzero()[:, 0], torch.arange(start, start + 6))


def test_defaults_of_the_optional_arguments() -> None:
    layer, inputs = make_layer(), make_inputs()
    query, shapes = inputs["query"], inputs["spatial_shapes"]
    points = torch.rand(1, TOKENS, 1, 2, dtype=torch.float64)  # one entry for all
    implied = layer(query, reference_points=points, spatial_shapes=shapes)
    mask = torch.zeros(2, TOKENS, dtype=torch.bool)
    full = points.expand(2, TOKENS, 3, 2)
    explicit = layer(query, None, query, query, torch.zeros_like(query), mask, full, shapes)
    torch.testing.assert_close(implied, explicit)
    shifted = layer(query, identity=query + 1, reference_points=points, spatial_shapes=shapes)
    torch.testing.assert_close(shifted, implied + 1)


def test_state_dict_is_that_of_one_level() -> None:
    layer = SingleLevelDeformableAttention(embed_dims=64, num_heads=8, num_points=4)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (64, 64),
        "sampling_offsets.bias": (64,),
        "attention_weights.weight": (32, 64),
        "attention_weights.bias": (32,),
        "value_proj.weight": (64, 64),
        "value_proj.bias": (64,),
        "output_proj.weight": (64, 64),
        "output_proj.bias": (64,),
    }
    twin = MultiScaleDeformableAttention(embed_dims=64, num_heads=8, num_levels=1, num_points=4)
    twin.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(twin.sampling_offsets.bias, layer.sampling_offsets.bias)


def test_one_point_starts_one_pixel_away_and_weighs_one() -> None:
    layer = SingleLevelDeformableAttention(embed_dims=64, num_heads=8, num_points=1)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]  # (x, y)
    expected = torch.tensor(directions, dtype=torch.float32)
    bias = layer.sampling_offsets.bias.data.view(8, 2)
    torch.testing.assert_close(bias, expected, atol=1e-5, rtol=0)
    torch.nn.init.normal_(layer.attention_weights.weight)
    query, points = torch.randn(2, 6, 64), torch.full((2, 6, 1, 2), 0.5)
    locations, weights = layer.predict_sampling(query, points, torch.tensor([[2, 3]]))
    assert torch.equal(weights, torch.ones(2, 6, 8, 1, 1))
    pixels = (locations[0, 0, :, 0, 0] - 0.5) * torch.tensor([3, 2])
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(query=torch.zeros(2, 7, 16), query_pos=None),
            r"query: expected S = 27 tokens for spatial_shapes \[\[5, 4\], \[3, 2\], \[1, 1\]\], "
            r"got 7; .* self-attention",
        ),
        (dict(value=torch.zeros(2, 26, 16)), "value: expected S = 27 tokens .* got 26"),
        (
            dict(reference_points=torch.zeros(2, TOKENS, 2, 2)),
            r"reference_points: expected .* \(N, 27, 3, 2 or 4\), got \(2, 27, 2, 2\)",
        ),
        (dict(reference_points=torch.zeros(2, TOKENS, 3, 3)), "reference_points: .* got .*, 3"),
        (dict(reference_points=None), "reference_points: expected shape .* got None"),
        (dict(spatial_shapes=torch.tensor(SHAPES).flatten()), r"\(L, 2\), got .*6"),
        (dict(spatial_shapes=None), "spatial_shapes: expected a tensor .* got None"),
    ],
)
def test_refuses_wrong_inputs(changes: dict, message: str) -> None:
    layer, inputs = make_layer(), make_inputs()
    with pytest.raises(ValueError, match=message):
        layer(**inputs | changes)


def test_refuses_more_levels() -> None:
    with pytest.raises(ValueError, match="num_levels must be 1, got 4; a query samples its own"):
        SingleLevelDeformableAttention(embed_dims=16, num_heads=2, num_levels=4)
