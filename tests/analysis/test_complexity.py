"""What models cost, against sums done by hand and torch's own counter."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("mmcv.ops")
from mmcv import ops as mmcv_ops
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention

from mmdeform import layers
from mmdeform.analysis.complexity import (
    Latency,
    complexity,
    config_shape,
    kind_of,
    latency,
    make_inputs,
    peak_bytes,
    weight_bytes,
)
from mmdeform.models import DAT


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))
        self.scale = nn.Parameter(torch.ones(5, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.fcs(x.mean((2, 3))) @ self.scale


class Detector(nn.Module):
    """A convolution; a head whose forward is called directly, as mmdet calls heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
        self.head = Head()
        self.again = self.backbone[0]  # under a second name

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        y = self.head.forward(self.backbone(x) + self.again(x))
        if fail:
            raise RuntimeError("out of order")
        return y + torch.rand(())


EXTENSION = importlib.import_module("mmcv._ext")
IMAGES = torch.zeros(2, 3, 6, 8)
CONV = 2 * (4 * 6) * 6 * 3 * 9  # images, pixels, channels, taps
FC = 2 * (6 * 7 + 7 * 5)
PRODUCT = 2 * 5 * 9


@pytest.mark.parametrize("grad", ["", "no_grad", "inference_mode"])
def test_parts_of_a_model(grad: str) -> None:
    model = Detector()
    model.backbone[0].weight.requires_grad_(False)
    with getattr(torch, grad)() if grad else torch.enable_grad():
        result = complexity(model, IMAGES)
    assert result.total.macs == 2 * CONV + FC + PRODUCT
    assert result.total.flops == 2 * result.total.macs
    assert result.total.by_operator == {
        "aten.convolution": 4 * CONV,
        "aten.addmm": 2 * FC,
        "aten.mm": 2 * PRODUCT,
    }
    # What head.forward does itself has nobody else to count for than its caller.
    assert [(part.name, part.type, part.macs, part.parameters) for part in result.modules] == [
        ("", "Detector", 2 * CONV + FC + PRODUCT, 162 + 12 + 49 + 40 + 45),
        ("backbone", "Sequential", 2 * CONV, 162 + 12),
        ("backbone.0", "Conv2d", 2 * CONV, 162),
        ("backbone.1", "BatchNorm2d", 0, 12),
        ("head", "Head", FC, 49 + 40 + 45),
        ("head.fcs", "Sequential", FC, 49 + 40),
        ("head.fcs.0", "Linear", 2 * 6 * 7, 49),
        ("head.fcs.2", "Linear", 2 * 7 * 5, 40),
    ]
    assert result.trainable_parameters == result.total.parameters - 162
    assert [part.name for part in result.parts(1)] == ["backbone", "head"]
    assert [part.depth for part in result.parts(2)] == [1, 2, 2, 1, 2]
    assert result.deformable == ()
    assert result.missing() == {}
    assert result.not_counted["aten.mean"] == 1


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_disjoint_parts_make_up_the_total(depth: int) -> None:
    result = complexity(Detector(), IMAGES)
    parts = result.disjoint_parts(depth)
    assert sum(part.flops for part in parts) == result.total.flops
    assert sum(part.parameters for part in parts) == result.total.parameters
    found = {part.name: (part.macs, part.parameters) for part in parts}
    assert found[""] == (PRODUCT, 0) if depth else (result.total.macs, 308)
    if depth >= 2:
        assert found["head"] == (0, 45)
        assert "backbone" not in found


def test_torch_counts_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(6, 5))
    with FlopCounterMode(display=False) as counter:
        model(IMAGES)
    result = complexity(model, IMAGES)
    assert result.total.flops == counter.get_total_flops() > 0
    assert result.total.by_kind()["convolution"] == sum(part.flops for part in result.parts(1)[:2])


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail: bool) -> None:
    model = Detector().train()
    model.backbone[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    functions = (ModulatedDeformConv2dFunction.forward, mmcv_ops.nms, vars(EXTENSION))
    before, extension = functions[:2], dict(functions[2])
    random = torch.get_rng_state()
    try:
        complexity(model, IMAGES, fail=fail)
    except RuntimeError as error:
        assert fail and str(error) == "out of order"
    else:
        assert not fail
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert before == (ModulatedDeformConv2dFunction.forward, mmcv_ops.nms)
    assert vars(EXTENSION) == extension
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


class Calls(nn.Module):
    """Calls a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def test_what_cannot_be_counted_is_named() -> None:
    boxes, scores = torch.rand(5, 4), torch.rand(5)
    result = complexity(Calls(lambda *args: mmcv_ops.nms(*args, iou_threshold=0.5)), boxes, scores)
    assert result.missing() == {"mmcv.nms": 1}
    assert result.total.flops == 0
    result = complexity(
        Calls(lambda x, grid: functional.grid_sample(x, grid, align_corners=False).relu()),
        torch.rand(1, 2, 5, 5),
        torch.rand(1, 3, 3, 2),
    )
    assert result.missing() == {"aten.grid_sampler_2d": 1}
    assert result.not_counted["aten.relu"] == 1


class Tries(Calls):
    """Goes on where a part of it fails."""

    def __init__(self) -> None:
        super().__init__(functional.relu)
        self.bad, self.good = nn.Linear(3, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.bad(x)
        except RuntimeError:
            return self.good(x) @ x.new_zeros(2, 7)


def test_parts_that_fail() -> None:
    result = complexity(Tries(), torch.zeros(1, 5))
    macs = {part.name: part.macs for part in result.modules}
    assert macs == {"": 10 + 14, "bad": 0, "good": 10}


def test_products_that_torch_leaves_out() -> None:
    weight, vector = torch.rand(6, 5), torch.rand(5)
    assert complexity(Calls(functional.linear), weight, vector).total.macs == 30
    assert complexity(Calls(torch.addmv), torch.rand(6), weight, vector).total.macs == 30
    assert complexity(Calls(torch.dot), vector, vector).total.macs == 5
    assert complexity(Calls(torch.vdot), vector, vector).total.macs == 5


def test_attention_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    result = complexity(layer, torch.rand(3, 5, 8))
    attention = 2 * 3 * 5 * 5 * 8
    assert result.total.macs == 3 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + attention
    assert result.missing() == {}
    attend = functional.scaled_dot_product_attention
    result = complexity(Calls(attend), *torch.rand(3, 2, 4, 5, 8))
    assert result.total.by_kind()["attention"] == 2 * 2 * (2 * 4) * 5 * 5 * 8


@pytest.fixture(params=[False, True], ids=["mmcv", "accelerate"])
def accelerated(request: pytest.FixtureRequest) -> None:
    """mmcv computes by itself, or by our operators: that makes no difference to a count."""
    if request.param:
        from mmdeform import accelerate

        accelerate.enable()


@pytest.mark.usefixtures("accelerated")
class TestMmcv:
    def test_convolutions(self) -> None:
        pixels, x = 4 * 5, torch.randn(2, 8, 7, 9)
        shared = dict(stride=2, padding=1, groups=2, deform_groups=2)
        for cls, per_sample, offset_channels in (
            (mmcv_ops.DeformConv2dPack, 4, 36),
            (mmcv_ops.ModulatedDeformConv2dPack, 5, 54),  # the mask is another multiply-add
        ):
            layer = nn.Sequential(cls(8, 12, 3, **shared))
            result = complexity(layer, x)
            offsets = 2 * pixels * offset_channels * 8 * 9
            itself = 2 * (pixels * 12 * 4 * 9 + pixels * 8 * 9 * per_sample)
            operators = {"aten.convolution": 2 * offsets, "mmcv.deform_conv2d": 2 * itself}
            assert result.total.by_operator == operators
            assert result.deformable == ("0",)
            assert result.deformable_layers()[0].macs == offsets + itself
            assert result.total.by_kind()["deformable"] == 2 * itself
            assert result.missing() == {}

    def test_offsets_of_a_larger_map(self) -> None:
        conv = mmcv_ops.ModulatedDeformConv2d(4, 6, 3, stride=2, padding=1)
        result = complexity(
            conv, torch.rand(1, 4, 8, 8), torch.rand(1, 18, 8, 8), torch.rand(1, 9, 8, 8)
        )
        pixels = 4 * 4
        assert result.total.macs == pixels * 6 * 4 * 9 + pixels * 4 * 9 * 5

    def test_attention(self) -> None:
        layer = MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True)
        value = torch.rand(1, 16, 32)
        result = complexity(
            layer,
            value[:, :5],
            value=value,
            reference_points=torch.full((1, 5, 2, 2), 0.5),
            spatial_shapes=torch.tensor([[4, 3], [2, 2]]),
            level_start_index=torch.tensor([0, 12]),
        )
        linear = 5 * 32 * (4 * 2 * 3 * 3) + 16 * 32 * 32 + 5 * 32 * 32
        samples = 5 * 4 * 2 * 3
        assert result.total.by_operator["mmcv.ms_deform_attn"] == 2 * samples * 8 * 5
        assert result.total.macs == linear + samples * 8 * 5
        assert result.missing() == {}

    @pytest.mark.parametrize(("ratio", "samples"), [(0, 4), (3, 9)])
    def test_roi_align(self, ratio: int, samples: int) -> None:
        rois = torch.tensor([[0.0, 1, 1, 5, 5]] * 7)
        layer = mmcv_ops.RoIAlign((3, 2), 1.0, ratio)
        result = complexity(layer, torch.rand(1, 4, 9, 9), rois)
        values = 7 * 4 * 3 * 2
        assert result.total.flops == values * (samples * 8 + 1)  # each is divided at the end
        assert result.total.by_kind()["RoIAlign"] == result.total.flops
        assert result.deformable == ()


def test_mmcv_s_roi_pooling_where_it_can_run() -> None:
    from mmdeform import accelerate

    accelerate.enable()  # mmcv alone has none on the CPU
    rois = torch.tensor([[0.0, 1, 1, 5, 5]] * 7)
    layer = mmcv_ops.DeformRoIPool((3, 2), 1.0, 2)
    result = complexity(layer, torch.rand(1, 4, 9, 9), rois)
    assert result.total.by_operator == {"mmcv.deform_roi_pool": 7 * 4 * 3 * 2 * (4 * 8 + 1)}


def test_our_layers_are_counted_once() -> None:
    layer = layers.ModulatedDeformConv2dPack(8, 12, 3, padding=1)
    result = complexity(layer, torch.rand(1, 8, 4, 5))
    pixels = 4 * 5
    assert result.total.by_operator == {
        "aten.convolution": 2 * pixels * 27 * 8 * 9,
        "mmdeform.deform_conv2d": 2 * (pixels * 12 * 8 * 9 + pixels * 8 * 9 * 5),
    }


def test_the_table_of_dat_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = DAT("tiny", "v1", num_classes=1000)
    inputs = make_inputs(model, (224, 224), "meta")
    result = complexity(model, *inputs.args, **inputs.kwargs)
    # The papers' code samples with grid_sample, which nobody counts.
    sampling = result.total.by_operator["mmdeform.ms_deform_attn"]
    assert round((result.total.flops - sampling) / 2e9, 4) == 4.5635
    assert result.total.parameters == 28_319_138
    assert len(result.deformable) == 4
    assert result.missing() == {}


def test_the_example_of_the_dat_paper() -> None:
    """H = W = 14, C = 384, 49 keys: 79.63M, and offsets of 0.508M, misprinted as 5.08M."""
    with torch.device("meta"):
        layer = layers.DeformableAttention2d(384, 12, 3, stride=2, version="v1")
        result = complexity(layer, torch.zeros(1, 384, 14, 14))
    found = {part.name: part.macs for part in result.modules}
    attention = 2 * 196 * 49 * 384
    projections = 2 * 196 * 384 * 384 + 2 * 49 * 384 * 384
    assert attention + projections == 79_629_312
    assert found["conv_offset"] == (5 * 5 + 2) * 49 * 384 == 508_032
    assert result.total.by_operator["mmdeform.dat_attn"] == 2 * attention
    sampling = 49 * 384 * 5  # of the keys: the paper leaves it out
    assert result.total.macs == 79_629_312 + 508_032 + sampling


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten.convolution", "convolution"),
        ("aten.bmm", "matrix product"),
        ("aten.mv", "matrix product"),
        ("aten._scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("mmdeform.dat_attn", "deformable"),
        ("mmcv.deform_conv2d", "deformable"),
        ("mmcv.roi_align", "RoIAlign"),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def pipeline(*steps: dict) -> dict:
    return dict(test_dataloader=dict(dataset=dict(pipeline=[dict(type="Load"), *steps])))


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (pipeline(dict(type="Resize", scale=(1333, 800), keep_ratio=True)), (800, 1333)),
        (pipeline(dict(type="Resize", scale=[640, 480]), dict(type="Pack")), (480, 640)),
        (pipeline(dict(type="Resize", scale=256), dict(type="CenterCrop", crop_size=224)),
         (224, 224)),
        (pipeline(dict(type="Resize", scale=(9, 8)), dict(type="Pad", size=(16, 12))), (12, 16)),
        (pipeline(dict(type="Resize", scale=(9, 8)), dict(type="Pad", size_divisor=32)), (8, 9)),
        (dict(test_pipeline=[dict(scale=(9, 8))]), (8, 9)),
        (dict(test_dataloader=dict(dataset=dict(dataset=dict(pipeline=[dict(scale=(9, 8))])))),
         (8, 9)),
    ],
)  # fmt: skip
def test_the_size_of_test_images(cfg: dict, shape: tuple[int, int]) -> None:
    assert config_shape(cfg) == shape


@pytest.mark.parametrize(
    ("cfg", "steps"),
    [({}, "none"), (pipeline(dict(type="Resize", scale_factor=0.5)), "Load, Resize")],
)
def test_pipelines_without_a_size_are_refused(cfg: dict, steps: str) -> None:
    with pytest.raises(ValueError, match=rf"no size of test images \(.*: {steps}\)"):
        config_shape(cfg)


def test_modes_are_checked() -> None:
    with pytest.raises(ValueError, match="mode: expected 'tensor' or 'predict', got 'loss'"):
        make_inputs(nn.Identity(), (4, 5), mode="loss")
    with pytest.raises(ValueError, match="mode: Identity is a plain module"):
        make_inputs(nn.Identity(), (4, 5), mode="predict")


def test_quartiles() -> None:
    assert Latency([4.0, 1.0, 2.0, 3.0, 5.0]).quartiles_ms == (2, 3, 4)
    assert Latency([7.0]).quartiles_ms == (7, 7, 7)


class Spy(nn.Linear):
    """Remembers how it was called; its result has 32 MB."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        call = SimpleNamespace(factor=factor, training=self.training, grad=torch.is_grad_enabled())
        vars(self).setdefault("calls", []).append(call)
        return torch.full((8_000_000,), factor)


def test_latency_and_memory() -> None:
    model = Spy(2, 3).train()
    found = latency(model, torch.zeros(2), factor=2.0, repeats=3)
    assert len(found.times_ms) == 3 and min(found.times_ms) > 0
    peak = peak_bytes(model, torch.zeros(2), factor=2.0)
    assert peak is None or 30e6 < peak < 60e6
    assert model.calls and model.training
    assert all(c.factor == 2 and not c.training and not c.grad for c in model.calls)
    assert weight_bytes(nn.Sequential(model, model, nn.BatchNorm1d(3))) == 4 * (9 + 12) + 8
    with pytest.raises(ValueError, match="repeats: expected at least one, got 0"):
        latency(model, repeats=0)
