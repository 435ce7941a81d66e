"""The attention layer against mmcv's, whose CPU path samples with grid_sample."""

import copy
import warnings

import mmcv.ops
import pytest
import torch

from mmdeform.layers import MultiScaleDeformableAttention
from mmdeform.layers.ms_deform_attn import _warn_head_channels

SHAPES = [(5, 4), (3, 2), (1, 1)]
TOKENS = sum(h * w for h, w in SHAPES)
START = torch.tensor([0, 20, 26])
CONFIG = dict(embed_dims=32, num_heads=4, num_levels=3, num_points=2, dropout=0.0)


def randomise(layer: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=1.0 if "offset" in name else 0.3)


def make_inputs(
    batch_first: bool = False, reference_size: int = 2, dtype: torch.dtype = torch.float32
) -> dict:
    random = torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        tensor = torch.randn(2, count, 32, generator=random, dtype=torch.float64).to(dtype)
        return tensor if batch_first else tensor.transpose(0, 1)

    return dict(
        query=tokens(7),
        value=tokens(TOKENS),
        query_pos=tokens(7),
        key_padding_mask=torch.rand(2, TOKENS, generator=random) < 0.2,
        reference_points=torch.rand(2, 7, 3, reference_size, generator=random),
        spatial_shapes=torch.tensor(SHAPES),
        level_start_index=START,
    )


def outputs_and_gradients(layer: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("query", "value", "query_pos")}
    output = layer(**{**inputs, **leaves})
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    wanted = [*leaves.values(), *layer.parameters()]
    return [output, *torch.autograd.grad((output * weights).sum(), wanted)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(batch_first=True),
        dict(num_heads=1, num_points=5),
        dict(value_proj_ratio=0.5),
        dict(num_heads=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("reference_size", [2, 4])
def test_state_dict_and_results_are_mmcvs(reference_size, changes):
    config = CONFIG | changes
    layer = MultiScaleDeformableAttention(**config)
    other = mmcv.ops.MultiScaleDeformableAttention(**config)
    inputs = make_inputs(config.get("batch_first", False), reference_size)
    for source, target in ((other, layer), (layer, other)):
        randomise(source)
        target.load_state_dict(source.state_dict(), strict=True)
        ours, theirs = outputs_and_gradients(layer, inputs), outputs_and_gradients(other, inputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_initial_values_are_mmcvs():
    states = []
    for cls in (MultiScaleDeformableAttention, mmcv.ops.MultiScaleDeformableAttention):
        torch.manual_seed(3)
        states.append(cls(**CONFIG).state_dict())
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_offsets_start_in_eight_directions():
    layer = MultiScaleDeformableAttention(embed_dims=64, num_heads=8, num_levels=2, num_points=3)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]  # (x, y)
    steps = torch.tensor([1.0, 2.0, 3.0])
    expected = torch.tensor(directions)[:, None, None] * steps[:, None]  # (M, 1, P, 2)
    expected = expected.expand(8, 2, 3, 2).flatten()
    torch.testing.assert_close(layer.sampling_offsets.bias.data, expected, atol=1e-5, rtol=0)
    for projection in (layer.sampling_offsets, layer.attention_weights):
        assert not projection.weight.any()
    assert not layer.attention_weights.bias.any()
    assert layer.value_proj.weight.std() > 0.05
    randomise(layer)
    layer.init_weights()  # detectors call it after they have overwritten every matrix
    torch.testing.assert_close(layer.sampling_offsets.bias.data, expected, atol=1e-5, rtol=0)
    assert not layer.sampling_offsets.weight.any()


def test_defaults_of_the_optional_arguments():
    layer = MultiScaleDeformableAttention(**CONFIG)
    randomise(layer)
    inputs = make_inputs()
    query = inputs["value"]
    reference = torch.rand(2, TOKENS, 3, 2, generator=torch.Generator().manual_seed(1))
    shapes = inputs["spatial_shapes"]
    implied = layer(query, reference_points=reference, spatial_shapes=shapes)
    explicit = layer(
        query,
        None,
        query,
        query,
        torch.zeros_like(query),
        torch.zeros(2, TOKENS, dtype=torch.bool),
        reference,
        shapes,
        START,
    )
    torch.testing.assert_close(implied, explicit)
    with pytest.warns(DeprecationWarning, match="identity"):
        shifted = layer(
            query, residual=query + 1, reference_points=reference, spatial_shapes=shapes
        )
    torch.testing.assert_close(shifted, implied + 1)


def test_dropout_spares_the_identity():
    layer = MultiScaleDeformableAttention(**CONFIG | dict(dropout=1.0))
    inputs = make_inputs()
    torch.testing.assert_close(layer(**inputs), inputs["query"])
    assert not torch.equal(layer.eval()(**inputs), inputs["query"])


def test_one_reference_may_serve_all_images_and_levels():
    layer = MultiScaleDeformableAttention(**CONFIG)
    randomise(layer)
    inputs = make_inputs()
    points = inputs["reference_points"][:1, :, :1]
    expected = layer(**inputs | dict(reference_points=points.expand(2, 7, 3, 2)))
    torch.testing.assert_close(layer(**inputs | dict(reference_points=points)), expected)


@pytest.mark.parametrize("reference_size", [2, 4])
def test_sampling_prediction_is_what_forward_uses(reference_size):
    layer = MultiScaleDeformableAttention(**CONFIG | dict(batch_first=True))
    randomise(layer)
    inputs = make_inputs(batch_first=True, reference_size=reference_size)
    locations, weights = layer.predict_sampling(
        inputs["query"] + inputs["query_pos"], inputs["reference_points"], inputs["spatial_shapes"]
    )
    assert locations.shape == (2, 7, 4, 3, 2, 2)
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, 7, 4))
    value = layer.value_proj(inputs["value"]).masked_fill(inputs["key_padding_mask"][..., None], 0)
    sampled = mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch(
        value.view(2, TOKENS, 4, 8), inputs["spatial_shapes"], locations, weights
    )
    expected = layer.output_proj(sampled) + inputs["query"]
    torch.testing.assert_close(layer(**inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_locations_keep_fp32(dtype, autocast):
    layer = MultiScaleDeformableAttention(embed_dims=32, num_heads=8, num_levels=1)
    layer.sampling_offsets.bias.data.zero_()
    query = torch.randn(2, 7, 32)
    points = torch.rand(2, 7, 1, 2)
    shapes = torch.tensor([[100, 200]])
    if autocast:
        with torch.autocast("cpu", dtype):
            locations, weights = layer.predict_sampling(query, points, shapes)
    else:
        layer.to(dtype)
        locations, weights = layer.predict_sampling(query.to(dtype), points, shapes)
    assert locations.dtype == weights.dtype == torch.float32
    assert torch.equal(locations, points[:, :, None, :, None].expand(2, 7, 8, 1, 4, 2))


@pytest.mark.parametrize(
    "dtype, autocast",
    [
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float64, False),
        (torch.bfloat16, True),
        (torch.float16, True),
    ],
)
def test_other_dtypes(dtype, autocast):
    layer = MultiScaleDeformableAttention(**CONFIG)
    layer.attention_weights.weight.data.normal_(std=0.1)
    inputs = make_inputs()
    exact = layer(**inputs)
    if autocast:
        with torch.autocast("cpu", dtype):
            output = layer(**inputs)
        assert output.dtype == torch.float32  # the identity is
    else:
        output = copy.deepcopy(layer).to(dtype)(**make_inputs(dtype=dtype))
        assert output.dtype == dtype
    assert (output - exact).abs().mean() < 0.01 * exact.abs().mean()
    output.float().sum().backward()


def test_any_number_of_heads_and_one_warning():
    _warn_head_channels.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            layer = MultiScaleDeformableAttention(
                embed_dims=15, num_heads=3, num_levels=3, num_points=5, batch_first=True
            )
        MultiScaleDeformableAttention(embed_dims=72, num_heads=3)  # 24: no power of 2, but fine
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1
    assert "5 channels per head are not a multiple of 8" in messages[0]
    randomise(layer)
    other = mmcv.ops.MultiScaleDeformableAttention(15, 3, 3, 5, batch_first=True)
    other.load_state_dict(layer.state_dict())
    inputs = make_inputs(batch_first=True)
    inputs = {k: v[..., :15] if k in ("query", "value") else v for k, v in inputs.items()}
    del inputs["query_pos"]
    expected = other.eval()(**inputs)
    torch.testing.assert_close(layer.eval()(**inputs), expected, rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks():
    layer = MultiScaleDeformableAttention(**CONFIG)
    randomise(layer)
    inputs = make_inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs), layer(**inputs))


def test_repr_tells_the_configuration():
    text = repr(MultiScaleDeformableAttention(**CONFIG))
    assert "embed_dims=32, num_heads=4, num_levels=3, num_points=2, batch_first=False" in text


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "reference_points",
            torch.zeros(2, 7, 3, 3),
            r"expected shape \(N, Lq, L, 2 or 4\) = \(2, 7, 3, '2 or 4'\), got \(2, 7, 3, 3\)",
        ),
        ("reference_points", torch.zeros(2, 7, 2), r"got \(2, 7, 2\)"),
        ("reference_points", torch.zeros(2, 6, 3, 2), r"got \(2, 6, 3, 2\)"),
        ("reference_points", torch.zeros(2, 7, 2, 4), r"got \(2, 7, 2, 4\)"),
        ("reference_points", None, r"expected a tensor, got None"),
        ("spatial_shapes", None, r"expected a tensor, got None"),
        ("spatial_shapes", torch.tensor(SHAPES[:2]), r"\(L, 2\) = \(3, 2\), got \(2, 2\)"),
        ("value", torch.zeros(26, 2, 32), r"expected S = 27 tokens .* got 26"),
    ],
)
def test_refuses_wrong_inputs(name, value, message):
    layer = MultiScaleDeformableAttention(**CONFIG)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        layer(**make_inputs() | {name: value})


def test_refuses_channels_that_the_heads_do_not_divide():
    with pytest.raises(ValueError, match=r"embed_dims must be divisible .* 32 and num_heads=5"):
        MultiScaleDeformableAttention(32, 5)
    with pytest.raises(ValueError, match=r"value_proj_ratio must be .* 16 and num_heads=32"):
        MultiScaleDeformableAttention(32, 32, value_proj_ratio=0.5)
