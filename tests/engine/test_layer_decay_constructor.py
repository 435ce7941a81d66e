"""Layer-wise decay of the learning rate: every parameter's rate and weight decay."""

import copy
import logging

import pytest
import torch

pytest.importorskip("mmcv.ops")
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from mmdeform.layers import MultiScaleDeformableAttention
from mmdeform.registry import MODELS

ADAMW = dict(type="AdamW", lr=1.0, weight_decay=0.5)
Settings = dict[str, tuple[float, float | None]]


def build(model: nn.Module, optimizer: dict = ADAMW, **paramwise_cfg) -> OptimWrapper:
    config = dict(constructor="mmdeform.LayerDecayConstructor", paramwise_cfg=paramwise_cfg)
    return build_optim_wrapper(model, dict(type="OptimWrapper", optimizer=optimizer, **config))


def settings(model: nn.Module, wrapper: OptimWrapper) -> Settings:
    """Learning rate and weight decay of each parameter in the optimizer, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (group["lr"], group.get("weight_decay")))
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def check(found: Settings, expected: Settings) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name]), name


class Steps(nn.Module):
    """A backbone of a stem and two layers, each a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        assert param_name.startswith(f"{prefix}layers.")
        return int(param_name[len(prefix) :].split(".")[1]), 4


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 3)


class Classifier(Detector):
    """Tells layers as mmpretrain's do: by its backbone."""

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        if param_name.startswith("head."):
            return 3, 4
        return self.backbone.get_layer_depth(param_name, "backbone.")


class Attentive(Detector):
    """What DINO has beside its backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.level_embed = nn.Parameter(torch.rand(4, 16))
        self.encoder = MultiScaleDeformableAttention(embed_dims=16, num_heads=2)


def intern_image(name: str = "InternImage", **options) -> nn.Module:
    return MODELS.build(
        dict(
            type=f"mmdeform.{name}",
            channels=16,
            depths=(2, 1, 3, 2),
            groups=(1, 2, 4, 8),
            **options,
        )
    )


# Of a backbone of these depths; what stands behind it is layer 9. Norms and downsampling of a
# stage belong to the first block of the next one, and in the last stage to its own.
PUBLISHED = {
    "patch_embed": 0,
    "levels.0.blocks.0": 1, "levels.0.blocks.1": 2, "levels.0.norm": 3, "levels.0.downsample": 3,
    "levels.1.blocks.0": 3, "levels.1.norm": 4, "levels.1.downsample": 4,
    "levels.2.blocks.0": 4, "levels.2.blocks.1": 5, "levels.2.blocks.2": 6,
    "levels.2.norm": 7, "levels.2.downsample": 7,
    "levels.3.blocks.0": 7, "levels.3.blocks.1": 8, "levels.3.norm": 7,
}  # fmt: skip


def published(model: nn.Module, rate: float) -> Settings:
    expected = {}
    for name, parameter in model.named_parameters():
        layers = [PUBLISHED[key] for key in PUBLISHED if name.startswith(f"backbone.{key}.")]
        (layer,) = layers if name.startswith("backbone.") else [9]
        expected[name] = (rate ** (9 - layer), 0.5 if parameter.ndim > 1 else 0.0)
    return expected


@pytest.mark.parametrize("name", ["InternImage", "FlashInternImage"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_intern_image_decays_as_published(name: str, post_norm: bool) -> None:
    model = Attentive(intern_image(name, post_norm=post_norm))
    expected = published(model, 0.9)
    for key in expected:
        if "sampling_offsets" in key:
            expected[key] = (1.0, 0.0)
    assert len({lr for lr, _ in expected.values()}) == 10
    wrapper = build(model, decay_rate=0.9, custom_keys=dict(sampling_offsets=dict(decay_mult=0.0)))
    check(settings(model, wrapper), expected)
    assert ("backbone.levels.0.norm.0.weight" in expected) != post_norm


def test_a_rate_of_one_is_no_decay_but_of_weights() -> None:
    model = Attentive(intern_image())
    found = settings(model, build(model, decay_rate=1))
    assert found == {n: (1.0, 0.5 if p.ndim > 1 else 0.0) for n, p in model.named_parameters()}
    assert len(build(model, decay_rate=1).optimizer.param_groups) == 20


def test_offset_branches_multiply_with_the_decay() -> None:
    model = Detector(intern_image("FlashInternImage"))
    expected = published(model, 0.9)
    hit = [name for name in expected if ".offset_mask." in name]
    assert len(hit) == 2 * 8
    for name in hit:
        expected[name] = (expected[name][0] * 0.01, expected[name][1])
    config = dict(
        optimizer=ADAMW,
        constructor="mmdeform.OffsetLrConstructor",
        paramwise_cfg=dict(
            offset=dict(conv=dict(lr_mult=0.01)),
            constructor="mmdeform.LayerDecayConstructor",
            decay_rate=0.9,
        ),
    )
    check(settings(model, build_optim_wrapper(model, config)), expected)


def test_custom_keys_multiply_and_the_longest_counts() -> None:
    model = Detector(Steps())
    keys = {
        "backbone": dict(lr_mult=0.1),
        "backbone.layers.1": dict(decay_mult=0.2),
        "head": dict(decay_mult=3.0, lr_mult=2.0),
    }
    check(
        settings(model, build(model, decay_rate=0.5, custom_keys=keys)),
        {
            "backbone.layers.0.weight": (0.0125, 0.5),
            "backbone.layers.0.bias": (0.0125, 0.0),
            "backbone.layers.1.weight": (0.25, 0.1),
            "backbone.layers.1.bias": (0.25, 0.0),
            "backbone.layers.2.weight": (0.05, 0.5),
            "backbone.layers.2.bias": (0.05, 0.0),
            "head.weight": (2.0, 1.5),
            "head.bias": (2.0, 0.0),
        },
    )


@pytest.mark.parametrize("wrap", [Detector, Classifier, lambda m: nn.DataParallel(Detector(m))])
def test_models_wrapped_models_and_classifiers(wrap) -> None:
    model = wrap(Steps())
    plain = getattr(model, "module", model)
    found = settings(plain, build(model, decay_rate=0.5))
    rates = {name.rpartition(".")[0]: lr for name, (lr, _) in found.items()}
    layers = {f"backbone.layers.{index}": 0.5 ** (3 - index) for index in range(3)}
    assert rates == {**layers, "head": 1.0}


def test_two_backbones_have_layers_of_their_own() -> None:
    model = nn.ModuleDict(dict(one=Steps(), two=intern_image(), neck=nn.Linear(2, 2)))
    found = settings(model, build(model, decay_rate=0.5))
    assert found["one.layers.0.weight"][0] == 0.5**3
    assert found["two.patch_embed.conv1.weight"][0] == 0.5**9
    assert found["neck.weight"][0] == 1.0


def test_frozen_parameters_are_left_out() -> None:
    model = Detector(intern_image(frozen_stages=1))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    found = settings(model, build(model, decay_rate=0.5))
    assert frozen and set(found) == {name for name, _ in model.named_parameters()} - frozen
    assert found["backbone.levels.1.blocks.0.norm1.0.weight"][0] == 0.5**6


def test_an_optimizer_without_weight_decay() -> None:
    model = Detector(Steps())
    groups = build(model, dict(type="Rprop", lr=1.0), decay_rate=0.5).optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.125, 0.25, 0.5, 1.0]
    assert not any("weight_decay" in group for group in groups)


def test_training_resumes() -> None:
    def step(model: nn.Module, wrapper: OptimWrapper) -> None:
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (1 + number % 7))
        wrapper.step()

    model = Detector(Steps())
    wrapper = build(model, decay_rate=0.5)
    step(model, wrapper)
    other = Detector(Steps())
    other.load_state_dict(model.state_dict())
    resumed = build(other, decay_rate=0.5)
    resumed.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    step(model, wrapper)
    step(other, resumed)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert wrapper.get_lr()["base_lr"] == [1.0]


def test_log_is_a_table_of_groups() -> None:
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        build(Detector(Steps()), dict(ADAMW, lr=0.001), decay_rate=0.5)
        build(Detector(Steps()), dict(type="Rprop", lr=0.001), decay_rate=1.0)
    finally:
        logger.removeHandler(handler)
    assert [text for text in messages if text.startswith("LayerDecay")] == [
        "LayerDecayConstructor: lr = 0.001 * 0.5 ** steps\n"
        "steps         lr  weight_decay  tensors     values\n"
        "    3   0.000125           0.5        1          4\n"
        "    3   0.000125             0        1          2\n"
        "    2    0.00025           0.5        1          4\n"
        "    2    0.00025             0        1          2\n"
        "    1     0.0005           0.5        1          4\n"
        "    1     0.0005             0        1          2\n"
        "    0      0.001           0.5        1          6\n"
        "    0      0.001             0        1          3",
        "LayerDecayConstructor: lr = 0.001 * 1 ** steps\n"
        "steps         lr  weight_decay  tensors     values\n"
        "    3      0.001             -        2          6\n"
        "    2      0.001             -        2          6\n"
        "    1      0.001             -        2          6\n"
        "    0      0.001             -        2          9",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "paramwise_cfg.decay_rate: expected a number above 0 and at most 1, got None"),
        (dict(decay_rate=0), "decay_rate: .* got 0$"),
        (dict(decay_rate=1.1), "decay_rate: .* got 1.1"),
        (dict(decay_rate=True), "decay_rate: .* got True"),
        (dict(decay_rate=0.9, decay_type="stage_wise"), "decay_type: expected 'layer_wise', got"),
        (
            dict(decay_rate=0.9, num_layers=6),
            "paramwise_cfg: expected keys of decay_rate, decay_type, custom_keys, got 'num_layers'",
        ),
        (
            dict(decay_rate=0.9, custom_keys=dict(head=dict(lr=2))),
            "custom_keys.head: expected lr_mult and decay_mult, finite numbers .* got lr=2",
        ),
        (
            dict(decay_rate=0.9, custom_keys=dict(head=dict(lr_mult=-1))),
            "custom_keys.head: .* got lr_mult=-1",
        ),
        (
            dict(decay_rate=0.9, custom_keys=dict(neck=dict(lr_mult=2))),
            "custom_keys: no parameter has 'neck' in its name",
        ),
    ],
)
def test_errors_say_what_was_expected(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Detector(Steps()), **options)


@pytest.mark.parametrize("cls", [Detector, Classifier])
def test_a_model_without_known_layers_is_an_error(cls: type[Detector]) -> None:
    message = f"expected a backbone with a method get_layer_depth, got {cls.__name__} of backbone"
    with pytest.raises(ValueError, match=rf"{message} \(Linear\), head \(Linear\)"):
        build(cls(nn.Linear(2, 2)), decay_rate=0.9, decay_type="layer_wise")


def test_an_optimizer_without_a_rate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"optimizer.lr: expected a learning rate, got None"):
        build(Detector(Steps()), dict(type="AdamW"), decay_rate=0.9)
