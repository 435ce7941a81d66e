"""Weights, initialisation and state of detectors with replaced modules."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
import mmcv.ops
from mmcv.cnn import ConvModule
from mmdet.testing import demo_mm_inputs
from mmengine.model import (
    BaseModel,
    BaseModule,
    ExponentialMovingAverage,
    MMDistributedDataParallel,
)
from mmengine.runner import Runner

from mmdeform import layers

from .small_retinanet import (
    REPLACED,
    RULE,
    assert_initialised_like,
    build,
    conv,
    init,
    retinanet,
    transplant,
)


class TestWeights:
    def test_initialised_as_the_plain_detector(self) -> None:
        detector, plain = build(retinanet(), RULE), init(build(retinanet()))
        parameters = [id(p) for p in detector.parameters()]
        init(detector)
        assert [id(p) for p in detector.parameters()] == parameters  # the optimizer has them
        assert_initialised_like(detector, plain, layers.ModulatedDeformConv2dPack)
        assert "init_weights" not in vars(detector)

    def test_pretrained_backbone(self, tmp_path: Path) -> None:
        source = build(retinanet()).backbone
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        torch.save(source.state_dict(), tmp_path / "backbone.pth")
        cfg = retinanet(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "backbone.pth")))
        detector, plain = init(build(cfg, RULE)), init(build(cfg))
        assert torch.equal(detector.backbone.layer3[0].conv2.weight, source.layer3[0].conv2.weight)
        assert_initialised_like(detector, plain, layers.ModulatedDeformConv2dPack)

    @pytest.mark.parametrize("pretrained", [False, True])
    def test_offsets_of_a_checkpoint_are_kept_and_others_start_as_zero(
        self, pretrained: bool, tmp_path: Path
    ) -> None:
        """mmengine would give those of mmcv's layer random values."""
        dcn = dict(dcn=dict(type="DCN"), stage_with_dcn=(False, False, True, True))
        cfg = retinanet(**dcn)
        cfg["backbone"].update(depth=50)
        cfg["neck"].update(in_channels=[32, 64, 128, 256])
        source = init(build(cfg)).backbone
        assert source.layer3[0].conv2.conv_offset.weight.any()
        if pretrained:
            torch.save(source.state_dict(), tmp_path / "backbone.pth")
            checkpoint = dict(type="Pretrained", checkpoint=str(tmp_path / "backbone.pth"))
            cfg["backbone"]["init_cfg"] = checkpoint
        rule = dict(select="backbone.layer[34].*.conv2", type="mmdeform.DCN")
        layer = init(build(cfg, rule)).backbone.layer3[0].conv2
        assert torch.equal(layer.weight, source.layer3[0].conv2.weight) or not pretrained
        expected = source.layer3[0].conv2.conv_offset.weight * pretrained
        assert torch.equal(layer.conv_offset.weight, expected)

    def test_checkpoint_of_the_plain_detector_fills_the_new_layers(self) -> None:
        plain, detector = init(build(retinanet())), build(retinanet(), RULE)
        result = detector.load_state_dict(plain.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert set(result.missing_keys) == {
            f"{name}.conv_offset.{leaf}" for name in REPLACED for leaf in ("weight", "bias")
        }
        assert_initialised_like(detector, plain, layers.ModulatedDeformConv2dPack)

    def test_checkpoint_loads_strictly(self) -> None:
        first, second = build(retinanet(), RULE), build(retinanet(), RULE)
        nn.init.ones_(first.backbone.layer3[0].conv2.conv_offset.weight)
        second.load_state_dict(first.state_dict(), strict=True)
        assert second.backbone.layer3[0].conv2.conv_offset.weight.all()

    def test_new_modules_initialise_what_is_new(self) -> None:
        class Scaled(BaseModule):
            def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
                super().__init__(init_cfg=dict(type="Constant", layer="Linear", val=2.0, bias=3.0))
                self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, *kernel_size))
                self.scale = nn.Linear(1, 1)
                self.register_buffer("mean", torch.zeros(4))

            def init_weights(self) -> None:
                super().init_weights()
                nn.init.constant_(self.weight, 5.0)

        rule = dict(select="backbone.conv1", type=Scaled, stride=1, padding=0)
        detector, plain = init(build(retinanet(), rule)), init(build(retinanet()))
        new = detector.backbone.conv1
        assert (new.scale.weight.item(), new.scale.bias.item()) == (2.0, 3.0)
        assert torch.equal(new.weight, plain.backbone.conv1.weight)
        assert new.is_init

    def test_buffers_are_carried_over(self) -> None:
        model = nn.ModuleDict(dict(norm=nn.BatchNorm2d(4)))
        model.norm.running_mean.fill_(3.0)
        new = transplant(model, dict(select="norm", type=nn.SyncBatchNorm)).norm
        assert (new.running_mean == 3.0).all() and new.num_features == 4

    def test_shared_module_is_replaced_everywhere_by_one(self) -> None:
        model = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.ReLU()])
        model.append(model[0])
        transplant(model, dict(select="0", type="mmdeform.DCN"))
        assert model[0] is model[2] and type(model[0]) is layers.DeformConv2dPack

    def test_error_leaves_the_detector_as_it_was(self) -> None:
        model = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Linear(4, 4)])
        with pytest.raises(ValueError, match=r"rules\[0\], 1 "):
            transplant(model, dict(select="*", type="mmdeform.DCN"))
        assert type(model[0]) is nn.Conv2d

    def test_shared_parameters_stay_shared(self) -> None:
        model = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
        model[1].weight = model[0].weight
        transplant(model, dict(select="*", type="mmdeform.DCN"))
        assert model[0].weight is model[1].weight and model[0] is not model[1]

    def test_conv_module(self) -> None:
        block = ConvModule(4, 8, 3, 2, padding=1, norm_cfg=dict(type="BN"), padding_mode="reflect")
        model = transplant(nn.ModuleDict(dict(b=block)), dict(select="b.conv", type="mmdeform.DCN"))
        x = torch.randn(2, 4, 7, 9)
        expected = ConvModule(
            4, 8, 3, 2, padding=1, norm_cfg=dict(type="BN"), padding_mode="reflect"
        )
        expected.load_state_dict(model.b.state_dict(), strict=False)
        torch.testing.assert_close(model.b(x), expected(x), rtol=1e-4, atol=1e-5)

    def test_old_keys_of_a_checkpoint_are_understood(self) -> None:
        """Before mmcv's version 2 the offset layer stood beside the convolution."""
        model = transplant(conv(4, 4, 3), dict(select="conv", type="mmdeform.DCN"))
        state = model.state_dict()
        for leaf in ("weight", "bias"):
            state[f"conv_offset.{leaf}"] = state.pop(f"conv.conv_offset.{leaf}") + 1
        model.load_state_dict(state, strict=True)
        assert model.conv.conv_offset.weight.all()


class TestState:
    def test_frozen_stages_and_modes_are_kept(self) -> None:
        rule = dict(select="backbone.layer[1234].*.conv2", type="mmdeform.DCN")
        detector = build(retinanet(frozen_stages=2, norm_eval=True), rule)
        for stage in range(1, 5):
            layer = getattr(detector.backbone, f"layer{stage}")[0].conv2
            assert {p.requires_grad for p in layer.parameters()} == {stage > 2}
            assert layer.training == (stage > 2)
        detector.eval()
        assert not transplant(
            conv(4, 4, 1).eval(), dict(select="conv", type="DCN", bias=False)
        ).conv.training
        init(detector).train()
        assert not detector.backbone.layer2[0].conv2.conv_offset.weight.requires_grad

    def test_device_and_dtype_are_kept(self) -> None:
        new = transplant(
            conv(4, 4, 3).to("meta", torch.bfloat16), dict(select="conv", type="mmdeform.DCN")
        )
        assert {(p.device.type, p.dtype) for p in new.parameters()} == {("meta", torch.bfloat16)}

    @pytest.mark.parametrize("move", ["double", "to_empty"])
    def test_initialised_after_a_move(self, move: str) -> None:
        plain, detector = build(retinanet()), build(retinanet(), RULE)
        for model in (plain, detector):
            if move == "double":
                model.double()
            else:  # from a device where parameters cannot follow: they are new objects
                model.backbone.to("meta").to_empty(device="cpu")
                for tensor in model.backbone.state_dict().values():
                    tensor.fill_(1)
            init(model)
        for name in REPLACED:
            weight = detector.get_submodule(name).weight
            assert torch.equal(weight, plain.get_submodule(name).weight)
            assert weight.std() > 0.01
            assert weight.dtype == (torch.float64 if move == "double" else torch.float32)

    @pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "ema"])
    def test_copies_before_and_after_init_weights(self, duplicate: str) -> None:
        make = dict(
            deepcopy=copy.deepcopy,
            pickle=lambda model: pickle.loads(pickle.dumps(model)),
            ema=lambda model: ExponentialMovingAverage(model).module,
        )[duplicate]
        detector, plain = build(retinanet(), RULE), init(build(retinanet()))
        twin = make(detector)
        before = copy.deepcopy(detector.state_dict())
        init(twin)
        assert_initialised_like(twin, plain, layers.ModulatedDeformConv2dPack)
        assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
        init(detector)
        assert_initialised_like(detector, plain, layers.ModulatedDeformConv2dPack)
        assert_initialised_like(make(detector), plain, layers.ModulatedDeformConv2dPack)

    def test_runner_initialises_a_wrapped_model(self, tmp_path: Path) -> None:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            detector, plain = build(retinanet(zero_init_residual=False), RULE), None
            wrapper = MMDistributedDataParallel(detector, device_ids=None)
            runner = Runner.__new__(Runner)
            runner.model = wrapper
            torch.manual_seed(1)
            runner._init_model_weights()
            plain = init(build(retinanet(zero_init_residual=False)))
            assert_initialised_like(detector, plain, layers.ModulatedDeformConv2dPack)
            batch = demo_mm_inputs(1, [[3, 64, 64]], num_classes=3)
            data = detector.data_preprocessor(batch, training=True)
            detector.parse_losses(wrapper(**data, mode="loss"))[0].backward()
            assert detector.backbone.layer3[0].conv2.conv_offset.weight.grad.any()
        finally:
            torch.distributed.destroy_process_group()

    def test_inside_another_model(self) -> None:
        """As student and teacher of semi-supervised training: a parent keeps mmengine's record."""

        class Parent(BaseModel):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__()
                self.student = build(retinanet(), *kwargs.get("rules", ()))

            def forward(self) -> None: ...

        kinds = "mmdeform.MultiScaleDeformableAttention"
        attention = mmcv.ops.MultiScaleDeformableAttention(32, 4)
        parent, plain = Parent(rules=[RULE]), Parent()
        for model in (parent, plain):
            model.student.neck.attention = copy.deepcopy(attention)
            model.student.neck.conv = ConvModule(4, 4, 3)
        # A rule whose old module has parameters that the new one lacks.
        rule = dict(select="neck.attention", type=kinds, num_points=8)
        # And one whose old module initialises itself.
        transplant(parent.student, rule, dict(select="neck.conv", type=ConvModule))
        init(parent), init(plain)
        assert_initialised_like(parent.student.backbone.layer3, plain.student.backbone.layer3, None)
        assert_initialised_like(parent.student.neck.conv, plain.student.neck.conv, None)
        assert parent.student.neck.attention.num_points == 8
        assert not hasattr(parent.student.backbone.conv1, "_params_init_info")

    def test_activation_checkpoints(self) -> None:
        detector = init(build(retinanet(with_cp=True, zero_init_residual=False), RULE))
        reference = init(build(retinanet(zero_init_residual=False), RULE))
        batch = demo_mm_inputs(1, [[3, 64, 64]], num_classes=3)
        gradients = []
        for model in (detector, reference):
            data = model.data_preprocessor(copy.deepcopy(batch), training=True)
            model.parse_losses(model(**data, mode="loss"))[0].backward()
            gradients.append(model.backbone.layer4[1].conv2.conv_offset.weight.grad)
        torch.testing.assert_close(*gradients)
        assert gradients[0].any()


class TestNested:
    def test_second_transplant_around_the_first(self) -> None:
        inner = dict(type="mmdeform.Transplant", model=retinanet(), rules=[RULE])
        outer = dict(select="backbone.layer2.*.conv2", type="mmdeform.DCN")
        detector, plain = init(build(inner, outer)), init(build(retinanet()))
        assert type(detector.backbone.layer2[0].conv2) is layers.DeformConv2dPack
        assert_initialised_like(detector, plain, layers.ModulatedDeformConv2dPack)
        assert "init_weights" not in vars(detector)

    def test_second_transplant_of_the_same_module(self) -> None:
        inner = dict(type="mmdeform.Transplant", model=retinanet(), rules=[RULE])
        outer = dict(RULE, type="mmdeform.DCN", deform_groups=1)
        detector, plain = init(build(inner, outer)), init(build(retinanet()))
        assert_initialised_like(detector, plain, layers.DeformConv2dPack)

    def test_second_transplant_inside_the_first(self) -> None:
        rule = dict(select="backbone.layer3.0.conv2.conv_offset", type=nn.Conv2d)
        inner = dict(type="mmdeform.Transplant", model=retinanet(), rules=[RULE])
        detector, plain = init(build(inner, rule)), init(build(retinanet()))
        assert type(detector.backbone.layer3[0].conv2.conv_offset) is nn.Conv2d
        assert_initialised_like(detector, plain, layers.ModulatedDeformConv2dPack)
