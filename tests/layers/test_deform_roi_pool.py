"""Deformable RoI pooling layers against mmcv's, whose own operator has no CPU kernel."""

import copy
import importlib
import pickle

import mmcv.ops
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdeform import layers
from mmdeform.ops import deform_roi_pool

MMCV = importlib.import_module("mmcv.ops.deform_roi_pool")
PAIRS = {
    "v1": (layers.DeformRoIPoolPack, MMCV.DeformRoIPoolPack),
    "v2": (layers.ModulatedDeformRoIPoolPack, MMCV.ModulatedDeformRoIPoolPack),
}
CONFIG = dict(output_size=(3, 2), output_channels=4, deform_fc_channels=6, spatial_scale=0.5)
pairs = pytest.mark.parametrize("ours, theirs", PAIRS.values(), ids=PAIRS)
packs = pytest.mark.parametrize("pack", [ours for ours, _ in PAIRS.values()], ids=PAIRS)
heads = pytest.mark.parametrize("head", ["mmcv", "paper"])


def randomise(layer: nn.Module) -> None:
    """Gives every parameter values that move bins by up to about a third of the RoI."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)


def feature_map() -> torch.Tensor:
    return torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(0))


def regions() -> torch.Tensor:
    return torch.tensor(
        [[0, 1.3, 2.1, 12.9, 14.2], [1, 0.0, 0.0, 21.0, 17.0], [1, -3.0, 5.5, 4.1, 9.7]]
    )


def make(pack: type[nn.Module], head: str = "mmcv", **changes) -> nn.Module:
    return pack(**CONFIG | changes, head=head)


def outputs_and_gradients(layer: nn.Module) -> list[torch.Tensor]:
    leaf = feature_map().requires_grad_()
    output = layer(leaf, regions())
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), [leaf, *layer.parameters()])]


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pairs
def test_state_dict_and_results_are_mmcvs(ours, theirs, sampling_ratio, monkeypatch):
    monkeypatch.setattr(MMCV, "deform_roi_pool", deform_roi_pool)  # mmcv's head on our operator
    layer = ours(**CONFIG, sampling_ratio=sampling_ratio, gamma=0.3)
    other = theirs(**CONFIG, sampling_ratio=sampling_ratio, gamma=0.3)
    for source, target in ((other, layer), (layer, other)):
        randomise(source)
        target.load_state_dict(source.state_dict(), strict=True)
        results = outputs_and_gradients(layer), outputs_and_gradients(other)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pairs
def test_initial_values_are_mmcvs(ours, theirs):
    states = []
    for cls in (ours, theirs):
        torch.manual_seed(7)
        states.append(cls(7, 4).state_dict())
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert value.shape == states[1][name].shape, name
        if name.startswith("mask_fc.0"):  # another part of the same random numbers
            assert value.std().item() == pytest.approx(states[1][name].std().item(), rel=0.1)
        else:
            assert torch.equal(value, states[1][name]), name


def test_head_of_the_first_paper():
    layer = make(layers.DeformRoIPoolPack, "paper")
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"offset_fc.weight": (12, 24), "offset_fc.bias": (12,)}
    assert not any(parameter.any() for parameter in layer.parameters())
    assert layer.gamma == 0.1


def test_head_of_the_second_paper():
    layer = layers.ModulatedDeformRoIPoolPack(7, 32, head="paper")
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "offset_fc.0.weight": (1024, 7 * 7 * 32),
        "offset_fc.0.bias": (1024,),
        "offset_fc.2.weight": (1024, 1024),
        "offset_fc.2.bias": (1024,),
        "offset_fc.4.weight": (3 * 49, 1024),
        "offset_fc.4.bias": (3 * 49,),
    }
    for index in (0, 2):
        assert layer.offset_fc[index].weight.std().item() == pytest.approx(0.01, rel=0.01)
        assert not layer.offset_fc[index].bias.any()
    assert not layer.offset_fc[4].weight.any()
    assert not layer.offset_fc[4].bias.any()


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@heads
@pytest.mark.parametrize("pack, scale", [(PAIRS["v1"][0], 1.0), (PAIRS["v2"][0], 0.5)], ids=PAIRS)
def test_starts_as_roi_align(pack, scale, head, sampling_ratio):
    layer = make(pack, head, sampling_ratio=sampling_ratio)
    expected = mmcv.ops.roi_align(
        feature_map(), regions(), (3, 2), 0.5, sampling_ratio, "avg", True
    )
    torch.testing.assert_close(layer(feature_map(), regions()), scale * expected)


@heads
@packs
def test_offset_prediction_is_what_forward_uses(pack, head):
    layer = make(pack, head)
    randomise(layer)
    offset, mask = layer.predict_offset(feature_map(), regions())
    pooled = mmcv.ops.roi_align(feature_map(), regions(), (3, 2), 0.5, 0, "avg", True)
    raw = layer.offset_fc(pooled.flatten(1))
    torch.testing.assert_close(offset.flatten(1), raw[:, :12], rtol=1e-4, atol=1e-4)
    if pack is layers.DeformRoIPoolPack:
        assert mask is None
    else:
        logits = layer.mask_fc[:3](pooled.flatten(1)) if head == "mmcv" else raw[:, 12:]
        torch.testing.assert_close(mask.flatten(1), logits.sigmoid(), rtol=1e-4, atol=1e-4)
    plain = layers.DeformRoIPool((3, 2), 0.5)
    expected = plain(feature_map(), regions(), offset, mask)
    assert torch.equal(layer(feature_map(), regions()), expected)
    assert not torch.allclose(expected, plain(feature_map(), regions()), atol=0.1)


def test_offsets_move_bins_by_gamma_times_the_size_of_the_roi():
    ramp = torch.arange(30.0).expand(1, 1, 20, 30).contiguous()  # the value is x
    rois = torch.tensor([[0, 4.5, 4.5, 12.5, 8.5]])
    offset = torch.tensor([[[[1.0]], [[0.0]]]])  # (x, y)
    layer = layers.DeformRoIPool(1, gamma=0.25)
    assert layer(ramp, rois).item() == pytest.approx(8)
    assert layer(ramp, rois, offset).item() == pytest.approx(8 + 0.25 * 8)
    assert layer(ramp.mT.contiguous(), rois.roll(0), offset).item() == pytest.approx(6)
    assert layer(ramp, rois, offset, torch.full((1, 1, 1), 0.5)).item() == pytest.approx(5)


@heads
@packs
def test_no_rois_keep_the_graph(pack, head):
    layer = make(pack, head)
    randomise(layer)
    leaf = feature_map().requires_grad_()
    output = layer(leaf, regions()[:0])
    assert output.shape == (0, 4, 3, 2)
    output.sum().backward()
    for name, tensor in [("input", leaf), *layer.named_parameters()]:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor)), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@packs
def test_rois_stay_fp32(pack, dtype, autocast):
    """Near pixel 1300 fp16 numbers are 1 apart and bf16 numbers 8."""
    ramp = torch.zeros(1, 4, 4, 1334)
    ramp[..., 1296:] = torch.arange(38.0)
    rois = torch.tensor([[0, 1301.3, 0.0, 1307.9, 3.0]])
    layer = pack(1, 4, deform_fc_channels=6, sampling_ratio=2)
    exact = layer(ramp, rois)
    if autocast:
        with torch.autocast("cpu", dtype):
            output = layer(ramp, rois)
    else:
        output = copy.deepcopy(layer).to(dtype)(ramp.to(dtype), rois)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact, rtol=5e-3, atol=0)


@heads
@packs
def test_autocast_on_the_cpu(pack, head):
    layer = make(pack, head)
    randomise(layer)
    exact = layer(feature_map(), regions())
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(feature_map(), regions())
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().mean() < 0.05 * exact.abs().mean()
    output.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


@heads
@packs
def test_double(pack, head):
    layer = make(pack, head)
    randomise(layer)
    exact = layer(feature_map(), regions())
    output = layer.double()(feature_map().double(), regions())
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), exact, rtol=1e-3, atol=1e-3)


@heads
@packs
def test_gradients_repeat_bit_by_bit(pack, head):
    layer = make(pack, head)
    randomise(layer)
    first, second = outputs_and_gradients(layer), outputs_and_gradients(layer)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@heads
@packs
def test_copies_and_pickles(pack, head):
    layer = make(pack, head)
    randomise(layer)
    expected = layer(feature_map(), regions())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(feature_map(), regions()), expected)


@heads
@packs
def test_compiles_without_graph_breaks(pack, head):
    layer = make(pack, head)
    randomise(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    expected = layer(feature_map(), regions())
    torch.testing.assert_close(compiled(feature_map(), regions()), expected)


@heads
@packs
def test_learning_rate_of_the_offsets_by_config(pack, head):
    model = nn.ModuleDict(dict(pool=make(pack, head), other=nn.Linear(2, 2)))
    wrapper = build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            optimizer=dict(type="SGD", lr=1.0),
            paramwise_cfg=dict(custom_keys={"offset_fc": dict(lr_mult=0.01)}),
        ),
    )
    rates = {id(p): group["lr"] for group in wrapper.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.01 if "offset_fc" in name else 1.0), name


def test_repr_tells_everything():
    text = repr(layers.DeformRoIPool(7, 0.25, 2, 0.3))
    assert "output_size=(7, 7), spatial_scale=0.25, sampling_ratio=2, gamma=0.3" in text
    text = repr(make(layers.ModulatedDeformRoIPoolPack, "paper"))
    for part in ("output_size=(3, 2)", "output_channels=4", "head='paper'", "(offset_fc)"):
        assert part in text


@packs
def test_refuses_what_does_not_fit(pack):
    with pytest.raises(ValueError, match="head must be 'mmcv' or 'paper', got 'v2'"):
        make(pack, "v2")
    with pytest.raises(ValueError, match=r"input must have shape \(N, 4, H, W\), got \(2, 8, 9, 1"):
        make(pack)(torch.randn(2, 8, 9, 11), regions())
    with pytest.raises(ValueError, match="rois"):
        make(pack)(feature_map(), regions()[:, :4])
