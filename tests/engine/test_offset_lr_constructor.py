"""Multipliers of offset branches, alone and on top of other optimizer constructors."""

import copy
import logging
from pathlib import Path

import mmcv.ops
import pytest
import torch

pytest.importorskip("mmdet")
from mmdet.models import ResNet
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmdeform import layers

CONSTRUCTOR = "mmdeform.OffsetLrConstructor"
CONFIGS = Path(__file__).parents[2] / "configs"
SGD = dict(type="SGD", lr=1.0, momentum=0.9, weight_decay=0.5)
ADAMW = dict(type="AdamW", lr=1.0, weight_decay=0.5)
optimizers = pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])


def build(model: nn.Module, offset: dict | None = None, optimizer=SGD, **base) -> OptimWrapper:
    """Builds with our constructor where ``offset`` is given, otherwise with mmengine's."""
    config = dict(type="OptimWrapper", optimizer=optimizer, paramwise_cfg=base)
    if offset is not None:
        config |= dict(constructor=CONSTRUCTOR, paramwise_cfg=dict(base, offset=offset))
    return build_optim_wrapper(model, config)


def settings(model: nn.Module, wrapper: OptimWrapper) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter in the optimizer, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def resnet(dcn: str, **kwargs) -> ResNet:
    return ResNet(
        depth=50,
        base_channels=4,
        stem_channels=4,
        dcn=dict(type=dcn, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
        **kwargs,
    )


def all_layers() -> nn.ModuleDict:
    """One layer of each class, ours and mmcv's, beside what must not be touched."""
    roi = dict(output_size=2, output_channels=4, deform_fc_channels=6)
    attention = dict(embed_dims=16, num_heads=2, num_levels=1, num_points=1)
    decoys = dict(conv_offset=nn.Conv2d(4, 4, 1), offset=nn.Linear(4, 4), mask=nn.Linear(4, 4))
    return nn.ModuleDict(
        dict(
            v1=layers.DeformConv2dPack(4, 4, 3),
            v1_mmcv=mmcv.ops.DeformConv2dPack(4, 4, 3),
            v2=layers.ModulatedDeformConv2dPack(4, 4, 3),
            v2_mmcv=mmcv.ops.ModulatedDeformConv2dPack(4, 4, 3),
            plain=layers.DeformConv2d(4, 4, 3),
            v3=layers.DCNv3(4, 4, 3),
            v4=layers.DCNv4(4, 4, 3),
            saconv=mmcv.ops.SAConv2d(4, 4, 3, use_deform=True),
            ps=layers.DeformPSRoIPoolPack(4, 2, 1.0, 2),
            dat=layers.DeformableAttention2d(4, 2),
            dat_plain=layers.DeformableAttention2d(4, 2, use_offsets=False).requires_grad_(),
            pool=layers.DeformRoIPoolPack(**roi),
            pool_mmcv=mmcv.ops.DeformRoIPoolPack(**roi),
            mpool=layers.ModulatedDeformRoIPoolPack(**roi),
            mpool_mmcv=mmcv.ops.ModulatedDeformRoIPoolPack(**roi),
            mpool_paper=layers.ModulatedDeformRoIPoolPack(**roi, head="paper"),
            detector=nn.ModuleDict(
                dict(
                    attention=layers.MultiScaleDeformableAttention(**attention),
                    attention_mmcv=mmcv.ops.MultiScaleDeformableAttention(**attention),
                    reference_points=nn.Linear(8, 2),
                )
            ),
            detr=nn.ModuleDict(dict(reference_points=nn.Linear(8, 2), fc=nn.Linear(8, 8))),
            decoys=nn.ModuleDict(decoys),
        )
    )


# The parameters of all_layers() that each kind means, by the start of their names.
EXPECTED = {
    "conv": [
        "v1.conv_offset.", "v1_mmcv.conv_offset.", "v2.conv_offset.", "v2_mmcv.conv_offset.",
        "v3.offset.", "v4.offset_mask.", "saconv.offset_s.", "saconv.offset_l.", "ps.conv_offset.",
        "dat.conv_offset.",
    ],
    "mask": ["v3.mask.", "mpool.mask_fc.", "mpool_mmcv.mask_fc."],
    "roi": [f"{n}.offset_fc." for n in ("pool", "pool_mmcv", "mpool", "mpool_mmcv", "mpool_paper")],
    "sampling_offsets": [f"detector.attention{n}.sampling_offsets." for n in ("", "_mmcv")],
    "attention_weights": [f"detector.attention{n}.attention_weights." for n in ("", "_mmcv")],
    "reference_points": ["detector.reference_points."],
}  # fmt: skip


@optimizers
@pytest.mark.parametrize("kind", EXPECTED)
def test_each_kind_is_all_of_its_layers_and_nothing_else(kind, optimizer):
    model = all_layers()
    wrapper = build(model, {kind: dict(lr_mult=0.1, decay_mult=0.5)}, optimizer)
    found = settings(model, wrapper)
    assert set(found) == {name for name, _ in model.named_parameters()}
    hit = {name for name in found if name.startswith(tuple(EXPECTED[kind]))}
    assert all(any(name.startswith(start) for name in hit) for start in EXPECTED[kind])
    assert found == {name: (0.1, 0.25) if name in hit else (1.0, 0.5) for name in found}


def test_an_optimizer_without_other_options_has_one_group_per_kind():
    model = all_layers()
    wrapper = build(model, dict(conv=dict(lr_mult=0.1), roi=dict(lr_mult=0.01, decay_mult=0.0)))
    found = [(g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups]
    assert found == [(1.0, 0.5), (0.1, 0.5), (0.01, 0.0)]
    assert wrapper.get_lr() == dict(base_lr=[1.0], lr=[1.0, 0.1, 0.01])


@optimizers
@pytest.mark.parametrize("dcn", ["DCN", "DCNv2", "mmdeform.DCNv2"])
def test_conv_is_mmengines_dcn_offset_lr_mult(dcn, optimizer):
    model = resnet(dcn, frozen_stages=1)
    base = dict(bias_lr_mult=2.0, norm_decay_mult=0.0, bias_decay_mult=0.0)
    ours = settings(model, build(model, dict(conv=dict(lr_mult=0.1)), optimizer, **base))
    theirs = settings(model, build(model, None, optimizer, dcn_offset_lr_mult=0.1, **base))
    assert ours == theirs
    assert {lr for lr, _ in ours.values()} == {1.0, 0.1}


@pytest.mark.parametrize("dcn, branch", [("DCNv3", ".offset."), ("DCNv4", ".offset_mask.")])
def test_conv_reaches_what_dcn_offset_lr_mult_does_not(dcn, branch):
    model = resnet(f"mmdeform.{dcn}")
    theirs = settings(model, build(model, dcn_offset_lr_mult=0.1))
    assert {lr for lr, _ in theirs.values()} == {1.0}
    ours = settings(model, build(model, dict(conv=dict(lr_mult=0.1))))
    hit = [name for name, (lr, _) in ours.items() if lr == 0.1]
    assert hit == [name for name in ours if branch in name] and len(hit) == 26


def test_custom_keys_that_reach_a_branch_multiply_with_it():
    model = resnet("mmdeform.DCNv2")
    keys = {
        "layer3": dict(lr_mult=0.5, decay_mult=0.5),
        "layer3.0.conv2.conv_offset": dict(lr_mult=0.2),
    }
    offset = dict(conv=dict(lr_mult=0.1, decay_mult=0.0))
    found = settings(model, build(model, offset, custom_keys=keys))
    assert found["layer3.0.conv2.weight"] == (0.5, 0.25)
    assert found["layer3.1.conv2.conv_offset.weight"] == pytest.approx((0.05, 0.0))
    assert found["layer3.0.conv2.conv_offset.weight"] == pytest.approx((0.02, 0.0))
    assert found["layer4.0.conv2.conv_offset.weight"] == (0.1, 0.0)
    assert found["layer4.0.conv2.weight"] == (1.0, 0.5)


class TinyConvNeXt(nn.Module):
    """Parameter names of ConvNeXt, by which mmdet's constructor finds layers; four DCNs."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        self.stages = nn.ModuleList(
            nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 1), conv) for conv in convs])
            for convs in (
                [layers.DCNv4(4, 4, 3)],
                [mmcv.ops.DeformConv2dPack(4, 4, 3)],
                [layers.DCNv3(4, 4, 3), nn.Conv2d(4, 4, 1)],
                [layers.ModulatedDeformConv2dPack(4, 4, 3)],
            )
        )


LAYER_DECAY = dict(decay_rate=0.5, decay_type="layer_wise", num_layers=6)


class LayerDecayModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyConvNeXt()
        self.head = layers.DeformConv2dPack(4, 4, 3)


def build_layer_decay(model: nn.Module, offset: dict | None, optimizer=ADAMW) -> OptimWrapper:
    name = "mmdet.LearningRateDecayOptimizerConstructor"
    if offset is not None:
        return build(model, offset, optimizer, constructor=name, **LAYER_DECAY)
    config = dict(type="OptimWrapper", optimizer=optimizer, constructor=name)
    return build_optim_wrapper(model, dict(config, paramwise_cfg=LAYER_DECAY))


@optimizers
def test_layer_decay_and_multipliers_compose(optimizer):
    model = LayerDecayModel()
    model.backbone.downsample_layers[0].requires_grad_(False)
    offset = dict(conv=dict(lr_mult=0.1, decay_mult=0.5), mask=dict(lr_mult=0.2))
    wrapper = build_layer_decay(model, offset, optimizer)
    base = settings(model, build_layer_decay(model, None, optimizer))
    found = settings(model, wrapper)
    assert set(found) == set(base) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len({lr for lr, _ in base.values()}) > 4
    hits = 0
    for name, (lr, decay) in base.items():
        factors = (1.0, 1.0)
        if any(part in name for part in (".conv_offset.", ".offset.", ".offset_mask.")):
            factors = (0.1, 0.5)
        elif ".mask." in name:
            factors = (0.2, 1.0)
        hits += factors[0] != 1
        assert found[name] == pytest.approx((lr * factors[0], decay * factors[1])), name
    assert hits == 2 * 6
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    for group in groups:
        assert [names[id(parameter)] for parameter in group["params"]] == group["param_names"]
    group_names = [group["group_name"] for group in groups]
    assert len(set(group_names)) == len(group_names)
    assert {"layer_1_decay", "layer_1_decay_conv", "layer_3_decay_mask"} < set(group_names)


def train_step(model: nn.Module, wrapper: OptimWrapper) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (1 + number % 7))
    wrapper.step()
    wrapper.zero_grad()


@optimizers
@pytest.mark.parametrize("layer_decay", [False, True])
def test_training_resumes(layer_decay, optimizer):
    offset = dict(conv=dict(lr_mult=0.1), mask=dict(lr_mult=0.2, decay_mult=0.0))

    def make():
        if layer_decay:
            model = LayerDecayModel()
            return model, build_layer_decay(model, offset, optimizer)
        model = all_layers()
        return model, build(model, offset, optimizer, norm_decay_mult=0.0)

    model, wrapper = make()
    train_step(model, wrapper)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    train_step(model, wrapper)
    train_step(other, resumed)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_wrapped_model_is_unwrapped():
    model = resnet("mmdeform.DCNv2")
    found = settings(model, build(nn.DataParallel(model), dict(conv=dict(lr_mult=0.1))))
    assert sum(lr == 0.1 for lr, _ in found.values()) == 26


def test_deformable_detr_as_with_custom_keys():
    init_default_scope("mmdet")
    cfg = Config.fromfile(CONFIGS / "deformable_detr/deformable-detr_r50_shapes.py")
    with torch.device("meta"):
        # mmdet's detector and mmcv's attention
        model = MODELS.build(dict(cfg.model, type="mmdet.DeformableDETR"))
    keys = {
        "sampling_offsets": dict(lr_mult=0.1),
        "reference_points": dict(lr_mult=0.1),
        "backbone": dict(lr_mult=0.1),
    }
    theirs = settings(model, build(model, custom_keys=keys))
    offset = dict(sampling_offsets=dict(lr_mult=0.1), reference_points=dict(lr_mult=0.1))
    ours = settings(model, build(model, offset, custom_keys=dict(backbone=dict(lr_mult=0.1))))
    assert ours == theirs
    layer_count = cfg.model.encoder.num_layers + cfg.model.decoder.num_layers
    assert sum("sampling_offsets" in name for name in ours) == 2 * layer_count


class TinyModel(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.conv = layers.ModulatedDeformConv2dPack(1, 2, 3)

    def forward(self, inputs: torch.Tensor, mode: str = "tensor") -> dict:
        return dict(loss=self.conv(inputs).square().mean())


CONFIG = """
custom_imports = dict(imports=["mmdeform"], allow_failed_imports=False)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.4, momentum=0.9),
    constructor="mmdeform.OffsetLrConstructor",
    paramwise_cfg=dict(offset=dict(conv=dict(lr_mult=0.1))),
)
param_scheduler = dict(type="MultiStepLR", milestones=[1, 2], gamma=0.5, end=9)
train_cfg = dict(by_epoch=True, max_epochs=1)
auto_scale_lr = dict(enable=True, base_batch_size=4)
"""


def test_runner_trains_and_resumes_from_a_config(tmp_path):
    cfg = Config.fromstring(CONFIG, ".py")

    def run(epochs: int, resume: bool) -> Runner:
        with DefaultScope.overwrite_default_scope("mmdet"):
            runner = Runner(
                model=TinyModel(),
                work_dir=str(tmp_path),
                train_dataloader=DataLoader([dict(inputs=torch.rand(1, 5, 5))] * 4, batch_size=2),
                train_cfg=dict(cfg.train_cfg, max_epochs=epochs),
                optim_wrapper=cfg.optim_wrapper,
                param_scheduler=cfg.param_scheduler,
                auto_scale_lr=cfg.auto_scale_lr,
                resume=resume,
                experiment_name=f"offset_lr_{tmp_path.name}_{epochs}",
            )
            runner.train()
        return runner

    for epochs, rates in ((1, [0.1, 0.01]), (2, [0.05, 0.005])):
        runner = run(epochs, resume=epochs > 1)
        groups = runner.optim_wrapper.optimizer.param_groups
        assert [group["lr"] for group in groups] == pytest.approx(rates)
        branch = list(runner.model.conv.conv_offset.parameters())
        assert all(a is b for a, b in zip(groups[1]["params"], branch, strict=True))
        assert all(parameter.any() for parameter in branch)
        assert runner.iter == 2 * epochs


def log_of(model: nn.Module, *args, **kwargs) -> dict[int, list[str]]:
    """What building an optimizer logs, by level."""
    messages: dict[int, list[str]] = {logging.INFO: [], logging.DEBUG: []}

    def note(record: logging.LogRecord) -> None:
        if record.getMessage().startswith("OffsetLrConstructor: "):
            messages[record.levelno].append(record.getMessage())

    handler = logging.Handler()
    handler.emit = note
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        build(model, *args, **kwargs)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return messages


def test_log_tells_what_matched():
    offset = dict(conv=dict(lr_mult=0.1, decay_mult=0.0), reference_points=dict(decay_mult=2))
    messages = log_of(all_layers(), offset)
    assert messages[logging.INFO] == [
        "OffsetLrConstructor: conv: 10 layers, 23 parameters, lr x 0.1 = 0.1, weight_decay x 0 = 0",
        "OffsetLrConstructor: reference_points: 1 layer, 2 parameters, weight_decay x 2 = 1",
    ]
    assert messages[logging.DEBUG] == [
        "OffsetLrConstructor: conv: v1.conv_offset, v1_mmcv.conv_offset, v2.conv_offset, "
        "v2_mmcv.conv_offset, v3.offset, v4.offset_mask, saconv.offset_s, saconv.offset_l, "
        "ps.conv_offset, dat.conv_offset",
        "OffsetLrConstructor: reference_points: detector.reference_points",
    ]


def test_log_gives_the_range_of_values_and_frozen_layers():
    model = LayerDecayModel()
    model.head.requires_grad_(False)
    base = dict(constructor="mmdet.LearningRateDecayOptimizerConstructor", **LAYER_DECAY)
    offset = dict(conv=dict(lr_mult=0.1))
    start = "OffsetLrConstructor: conv: 5 layers, 10 parameters, lr x 0.1 = "
    assert start + "0.0015625 to 0.05" in log_of(model, offset, **base)[logging.INFO]
    model.backbone.requires_grad_(False)
    nothing = log_of(nn.ModuleList([model, nn.Linear(2, 2)]), offset, bias_lr_mult=1.0)
    assert start + "nothing: all frozen" in nothing[logging.INFO]


@pytest.mark.parametrize(
    "offset, message",
    [
        (None, r"paramwise_cfg.offset: expected multipliers by kind \(conv, mask, roi, .*got None"),
        ({}, "paramwise_cfg.offset: .* got {}"),
        (dict(convs=dict(lr_mult=1)), "offset: expected kinds of conv, mask, .* got 'convs'"),
        (dict(conv=0.1), "offset.conv: expected a dict of lr_mult, decay_mult, got 0.1"),
        (dict(conv={}), "offset.conv: expected a dict of lr_mult, decay_mult, got {}"),
        (dict(conv=dict(decay_mul=0)), "offset.conv: .* lr_mult, decay_mult, got 'decay_mul'"),
        (dict(conv=dict(lr_mult="x")), "offset.conv.lr_mult: expected a finite .* got 'x'"),
        (dict(conv=dict(lr_mult=-1)), "offset.conv.lr_mult: expected a finite .* got -1"),
        (dict(conv=dict(lr_mult=True)), "offset.conv.lr_mult: expected a finite .* got True"),
        (
            dict(sampling_offsets=dict(lr_mult=1)),
            "offset.sampling_offsets: the model has no such layer; "
            "it has conv: 2 layers, 4 parameters; mask: 1 layer, 2 parameters$",
        ),
    ],
)
def test_errors_say_what_was_expected(offset, message):
    model = nn.Sequential(layers.DCNv3(4, 4, 3), layers.DCNv4(4, 4, 3))
    config = dict(optimizer=SGD, constructor=CONSTRUCTOR, paramwise_cfg=dict(offset=offset))
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(model, config)


def test_a_model_without_deformable_layers_is_an_error():
    with pytest.raises(ValueError, match=r"offset.conv: .* it has none of any kind"):
        build(nn.Linear(2, 2), dict(conv=dict(lr_mult=0.1)))


def test_decay_without_weight_decay_is_an_error():
    model = layers.DCNv4(4, 4, 3)
    with pytest.raises(ValueError, match=r"conv.decay_mult: the optimizer has no weight_decay"):
        build(model, dict(conv=dict(decay_mult=0.0)), dict(type="Rprop", lr=0.1))
