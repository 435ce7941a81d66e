"""InternImage and FlashInternImage: any image, names, start, options, training, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("mmcv.ops")
from torch import nn

from mmdeform.models.backbones.intern_image.arch import FLASH_INTERN_IMAGE, INTERN_IMAGE

from .backbones import autocast, cast, count, gradients
from .deterministic import fill_parameters
from .small_intern_image import KINDS, SMALL, small_intern_image


def filled(kind: str, **options: Any) -> nn.Module:
    """One whose DCNs are deformed and weigh their samples, which a fresh DCNv4 does not."""
    model = small_intern_image(kind, **options)
    fill_parameters(model)
    return model


def names_of(kind: str, post_norm: bool, layer_scale: bool, depthwise: bool, biases: bool) -> set:
    """The published names, written out."""
    both = ("weight", "bias")
    last = both if biases else ("weight",)
    dcn = dict.fromkeys(("offset", "mask", "input_proj", "dw_conv.0", "dw_conv.1.1"), both)
    if kind == "v4":
        dcn = dict.fromkeys(("offset_mask", "value_proj", *["offset_mask_dw"][:depthwise]), both)
    parts = {f"dcn.{name}": kinds for name, kinds in dcn.items()}
    parts |= {"norm1.0": both, "norm2.0": both, "mlp.fc1": both}
    parts |= {"mlp.fc2": last, "dcn.output_proj": last}
    names = {
        f"levels.{level}.blocks.{block}.{part}.{name}"
        for level, depth in enumerate(SMALL["depths"])
        for block in range(depth)
        for part, kinds in parts.items()
        for name in kinds
    }
    if layer_scale:
        blocks = {name[:17] for name in names}
        names |= {f"{block}.gamma{index}" for block in blocks for index in (1, 2)}
    for name in both:
        names |= {f"patch_embed.{part}.{name}" for part in ("conv1", "norm1.1", "conv2", "norm2.1")}
        names |= {f"levels.{level}.downsample.norm.1.{name}" for level in range(3)}
        names |= set() if post_norm else {f"levels.{level}.norm.0.{name}" for level in range(4)}
    return names | {f"levels.{level}.downsample.conv.weight" for level in range(3)}


class TestPublished:
    @pytest.mark.parametrize("post_norm", [False, True])
    @pytest.mark.parametrize("layer_scale", [None, 1e-5])
    @pytest.mark.parametrize(
        ("kind", "depthwise", "biases"),
        [("v3", True, True), ("v4", False, False), ("v4", True, True)],
    )
    def test_names(
        self, kind: str, post_norm: bool, layer_scale: float | None, depthwise: bool, biases: bool
    ) -> None:
        model = small_intern_image(
            kind,
            post_norm=post_norm,
            layer_scale=layer_scale,
            dw_kernel_size=3 if depthwise else None,
            dcn_output_bias=biases,
            mlp_fc2_bias=biases,
        )
        expected = names_of(kind, post_norm, layer_scale is not None, depthwise, biases)
        assert set(model.state_dict()) == expected

    def test_names_of_a_classifier(self) -> None:
        names = set(small_intern_image("v3", num_classes=3).state_dict())
        assert names - set(small_intern_image("v3").state_dict()) == {
            "conv_head.0.weight",
            *(f"conv_head.1.0.{name}" for name in (
                "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
            )),
            "head.weight",
            "head.bias",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("archs", "arch", "expected"),
        [
            (INTERN_IMAGE, "tiny", (1.0, False, None, True, True, 0.2)),
            (INTERN_IMAGE, "small", (1.0, True, None, True, True, 0.3)),
            (INTERN_IMAGE, "base", (1.0, True, None, True, True, 0.4)),
            (INTERN_IMAGE, "large", (2.0, True, None, True, True, 0.4)),
            (INTERN_IMAGE, "xlarge", (2.0, True, None, True, True, 0.4)),
            (FLASH_INTERN_IMAGE, "tiny", (1.0, False, None, False, False, 0.2)),
            (FLASH_INTERN_IMAGE, "small", (1.0, True, 3, False, False, 0.3)),
            (FLASH_INTERN_IMAGE, "base", (0.5, True, 3, False, False, 0.3)),
            (FLASH_INTERN_IMAGE, "large", (2.0, True, 3, True, True, 0.4)),
        ],
    )
    def test_settings_that_shapes_do_not_show(
        self, archs: dict, arch: str, expected: tuple
    ) -> None:
        found = archs[arch]
        assert expected == (
            found.offset_scale, found.post_norm, found.dw_kernel_size, found.dcn_output_bias,
            found.mlp_fc2_bias, found.drop_path_rate,
        )  # fmt: skip

    @pytest.mark.parametrize(("arch", "millions"), [("tiny", 49), ("small", 69), ("base", 115)])
    def test_mask_rcnn(self, arch: str, millions: int) -> None:
        pytest.importorskip("mmdet")
        from mmengine.hub import get_config

        from .small_retinanet import build

        model = get_config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py").model
        model.backbone = dict(type="mmdeform.InternImage", arch=arch)
        model.neck.in_channels = [INTERN_IMAGE[arch].channels * 2**level for level in range(4)]
        with torch.device("meta"):
            assert round(count(build(model)) / 1e6) == millions

    @pytest.mark.parametrize("kind", KINDS)
    def test_drop_path_rises_over_all_stages(self, kind: str) -> None:
        model = small_intern_image(kind, drop_path_rate=0.4, out_indices=(0, 1, 2))
        rates = [block.drop_path.drop_prob for level in model.levels for block in level.blocks]
        assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("kind", KINDS)
class TestStart:
    def test_initial_values(self, kind: str) -> None:
        model = small_intern_image(kind, channels=64, layer_scale=0.25, num_classes=10)
        model.init_weights()
        block = model.levels[2].blocks[0]
        predictors = [block.dcn.offset, block.dcn.mask] if kind == "v3" else [block.dcn.offset_mask]
        for layer in predictors:
            assert not layer.weight.any() and not layer.bias.any()
        projection = block.dcn.input_proj if kind == "v3" else block.dcn.value_proj
        bound = (6 / 512) ** 0.5
        for layer in (projection, block.dcn.output_proj):  # Xavier
            assert 0.99 * bound < layer.weight.abs().max() <= bound
        for layer in (block.mlp.fc1, block.mlp.fc2, model.head):  # truncated normal
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.gamma1.eq(0.25).all() and block.gamma2.eq(0.25).all()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and "conv" not in name:
                assert not parameter.any(), name

    def test_a_fresh_model_learns(self, kind: str) -> None:
        model = small_intern_image(kind, num_classes=2)
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4, 3, 64, 64, generator=generator)
        labels = torch.tensor([0, 1, 1, 0])
        losses = []
        for _ in range(25):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 < losses[0]
        for name, parameter in model.named_parameters():
            assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
class TestSizes:
    @pytest.mark.parametrize("size", [(64, 64), (37, 91), (5, 7), (1, 130)], ids=str)
    def test_any_image(self, kind: str, size: tuple[int, int]) -> None:
        model = filled(kind)
        image = torch.randn(2, 3, *size, requires_grad=True)
        maps = model(image)
        assert [tuple(y.shape) for y in maps] == [
            (2, 8 * 2**level, -(-size[0] // step), -(-size[1] // step))
            for level, step in enumerate((4, 8, 16, 32))
        ]
        assert all(y.is_contiguous() and y.isfinite().all() for y in maps)
        (sum((y * torch.randn_like(y)).sum() for y in maps)).backward()
        for name, parameter in [*model.named_parameters(), ("image", image)]:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name

    def test_images_of_a_batch_do_not_mix(self, kind: str) -> None:
        model = filled(kind).double().eval()
        images = torch.randn(3, 3, 45, 70, dtype=torch.float64)
        together = model(images)
        for index, image in enumerate(images):
            for both, alone in zip(together, model(image[None]), strict=True):
                torch.testing.assert_close(both[index], alone[0])

    def test_empty_batch(self, kind: str) -> None:
        maps = small_intern_image(kind)(torch.zeros(0, 3, 64, 64))
        assert [y.shape[0] for y in maps] == [0] * 4


@pytest.mark.parametrize("kind", KINDS)
class TestOptions:
    def test_out_indices(self, kind: str) -> None:
        everything = filled(kind).eval()
        model = small_intern_image(kind, out_indices=(2, 0)).eval()
        assert len(model.levels) == 3 and model.levels[2].downsample is None
        assert model.load_state_dict(everything.state_dict(), strict=False).missing_keys == []
        image = torch.randn(1, 3, 64, 64)
        third, first = model(image)
        expected = everything(image)
        assert torch.equal(third, expected[2]) and torch.equal(first, expected[0])

    def test_post_norm_and_layer_scale(self, kind: str) -> None:
        """A block of each form, written out."""
        x = torch.randn(1, 6, 5, 8)
        for post_norm in (False, True):
            for layer_scale in (None, 0.3):
                block = filled(kind, post_norm=post_norm, layer_scale=layer_scale)
                block = block.levels[0].blocks[0].eval()
                y = x
                for module, norm, scale in (
                    (block.dcn, block.norm1, block.gamma1),
                    (block.mlp, block.norm2, block.gamma2),
                ):
                    step = norm(module(y)) if post_norm else module(norm(y))
                    y = y + (step if scale is None else scale * step)
                assert (block.gamma1 is None) == (layer_scale is None)
                torch.testing.assert_close(block(x), y)

    @pytest.mark.parametrize("frozen", [-1, 0, 1, 3])
    def test_frozen_stages(self, kind: str, frozen: int) -> None:
        model = small_intern_image(kind, frozen_stages=frozen, drop_path_rate=0.5)
        assert model.train() is model
        expected = () if frozen < 0 else (
            "patch_embed.", *(f"levels.{level}." for level in range(frozen))
        )  # fmt: skip
        names = dict(model.named_parameters())
        still = {name for name, parameter in names.items() if not parameter.requires_grad}
        assert still == {name for name in names if expected and name.startswith(expected)}
        assert (frozen < 0) == (not still)
        training = [level.blocks[0].drop_path.training for level in model.levels]
        assert training == [index >= frozen for index in range(4)]
        sum(y.sum() for y in model(torch.randn(1, 3, 64, 64))).backward()
        assert all((p.grad is None) == (name in still) for name, p in names.items())

    def test_offsets_are_limited(self, kind: str) -> None:
        image = torch.randn(1, 3, 64, 64)
        model = filled(kind, offset_range=0.25)
        for level, y in zip(model.levels, model(image), strict=True):
            dcn = level.blocks[-1].dcn
            assert dcn.offset_range == 0.25
            offset, _ = dcn.predict_offset(torch.randn(1, 5, 5, y.shape[1]))
            assert 0.1 < offset.abs().max() <= 0.25
        assert small_intern_image(kind, offset_clamp=2.0).levels[0].blocks[0].dcn.offset_clamp == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(arch="huge"), r"arch: expected one of \('tiny', 'small', 'base', 'large'"),
            (dict(kernels=7), r"no argument 'kernels'; .*'channels', .*'dw_kernel_size'"),
            (dict(depths=(1, 1, 1)), r"depths: expected 4 positive numbers.*got \(1, 1, 1\)"),
            (dict(depths=(1, 0, 1, 1)), r"depths: expected 4 positive.*got \(1, 0, 1, 1\)"),
            (dict(groups=(4, 8)), r"groups: expected 4 positive numbers.*got \(4, 8\)"),
            (dict(groups=(4, 8, 5, 32)), r"divisible by group, got in_channels=256, group=5"),
            (dict(out_indices=(0, 4)), r"out_indices: .*0 to 3, got \(0, 4\)"),
            (dict(out_indices=()), r"out_indices: .*got \(\)"),
            (dict(frozen_stages=5), r"frozen_stages: .*got 5"),
            (dict(num_classes=-1), r"num_classes: .*got -1"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_errors(self, kind: str, options: dict[str, Any], message: str) -> None:
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            KINDS[kind](**options)


def test_flash_has_no_xlarge() -> None:
    with pytest.raises(ValueError, match=r"arch: expected one of \(.*'large'\), got 'xlarge'"):
        KINDS["v4"]("xlarge")


@pytest.mark.parametrize("kind", KINDS)
class TestTraining:
    def test_activation_checkpointing(self, kind: str) -> None:
        options = dict(drop_path_rate=0.3, channels=16, depths=(2, 2, 1, 1))
        model, saving = filled(kind, **options), filled(kind, with_cp=True, **options)
        image = torch.randn(2, 3, 64, 64)
        (expected, kept), (got, kept_less) = gradients(model, image), gradients(saving, image)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert kept_less < kept / 2

    def test_drop_path_is_off_in_evaluation(self, kind: str) -> None:
        model = filled(kind, drop_path_rate=0.9).eval()
        image = torch.randn(2, 3, 64, 64)
        assert torch.equal(model(image)[3], model(image)[3])
        model.train()
        torch.manual_seed(0)
        assert not torch.equal(model(image)[3], model(image)[3])

    @pytest.mark.parametrize(
        ("call", "tolerance"),
        [
            (cast(torch.bfloat16), 0.04),
            (autocast(torch.bfloat16), 0.04),
            (autocast(torch.float16), 0.005),
        ],
        ids=["bf16", "autocast-bf16", "autocast-fp16"],
    )
    def test_half_precision(self, kind: str, call: Callable, tolerance: float) -> None:
        model = filled(kind)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("offset_mask.weight"):  # masks without bounds pass on errors
                    parameter.mul_(0.1)
        image = torch.randn(1, 3, 64, 50)
        expected = [y.detach() for y in model(image)]
        maps = call(model, image)
        for y, exact in zip(maps, expected, strict=True):
            assert (y.float() - exact).square().mean().sqrt() < tolerance * exact.std()
        sum((y.float() * torch.randn(y.shape)).sum() for y in maps).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
