"""InternImage's weights in FlashInternImage, and models that are known by their weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv.ops")
from mmdeform.models import FlashInternImage, InternImage
from mmdeform.models.backbones.intern_image.conversion import (
    arguments_of,
    published_size,
    to_flash,
)

from .deterministic import fill_parameters, uniform
from .small_intern_image import KINDS, small_intern_image

DCN = "levels.1.blocks.1.dcn."


def source(constant: bool = False, **options: Any) -> InternImage:
    """An InternImage; ``constant``: it predicts the same offsets and weights for every pixel."""
    model = small_intern_image("v3", **options).double().eval()
    fill_parameters(model)
    for name, module in model.named_modules():
        if constant and name.endswith((".offset", ".mask")):
            nn.init.zeros_(module.weight)
    return model


def flash(model: InternImage, depthwise: bool, **options: Any) -> FlashInternImage:
    """The model that holds the converted weights exactly."""
    options = dict(dw_kernel_size=3 if depthwise else None, **options)
    options |= dict(dcn_output_bias=True, mlp_fc2_bias=True)
    converted = small_intern_image("v4", **options).double().eval()
    converted.load_state_dict(to_flash(model.state_dict(), depthwise).state)
    return converted


class TestToFlash:
    @pytest.mark.parametrize("depthwise", [False, True])
    def test_what_is_kept(self, depthwise: bool) -> None:
        model = source(num_classes=3)
        converted = flash(model, depthwise, num_classes=3).state_dict()
        weights = to_flash(model.state_dict(), depthwise)
        renamed = {"value_proj": "input_proj", "offset_mask_dw": "dw_conv.0"}
        for key in weights.exact:
            old = key
            for new_name, old_name in renamed.items():
                old = old.replace(f".{new_name}.", f".{old_name}.")
            assert torch.equal(converted[key], model.state_dict()[old]), key
        assert set(weights.exact) | set(weights.approximate) == set(converted)
        assert not set(weights.exact) & set(weights.approximate)
        assert {key.split(".dcn.")[1] for key in weights.approximate} == {
            "offset_mask.weight",
            "offset_mask.bias",
        }
        left_out = set() if depthwise else {"dw_conv.0.weight", "dw_conv.0.bias"}
        assert {key.split(".dcn.")[1] for key in weights.left_out} == left_out

    @pytest.mark.parametrize("depthwise", [False, True])
    @pytest.mark.parametrize("options", [{}, dict(post_norm=True, offset_scale=1.5)], ids=str)
    def test_same_maps_where_predictions_are_the_same(
        self, depthwise: bool, options: dict[str, Any]
    ) -> None:
        model = source(constant=True, **options)
        image = uniform("image", (2, 3, 50, 70))
        for a, b in zip(model(image), flash(model, depthwise, **options)(image), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    def test_prediction_of_average_features(self) -> None:
        """Against sums over many values of normally distributed features."""
        state = source().state_dict()
        bias = to_flash(state, True).state[f"{DCN}offset_mask.bias"]
        z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
        density = torch.exp(-z.square() / 2)
        before = state[f"{DCN}dw_conv.1.1.bias"] + z[:, None] * state[f"{DCN}dw_conv.1.1.weight"]
        features = (nn.functional.gelu(before) * density[:, None]).sum(0) / density.sum()

        def predict(name: str) -> Tensor:
            weight, constant = state[f"{DCN}{name}.weight"], state[f"{DCN}{name}.bias"]
            return weight @ features + constant

        for group, (offset, logits) in enumerate(
            zip(predict("offset").view(2, 18), predict("mask").view(2, 9), strict=True)
        ):
            used = bias[27 * group : 27 * (group + 1)]
            torch.testing.assert_close(used[:18], offset, rtol=0, atol=1e-7)
            torch.testing.assert_close(used[18:], logits.softmax(0), rtol=0, atol=1e-7)
        assert bias.shape == (56,) and not bias[54:].any()
        assert not to_flash(state, True).state[f"{DCN}offset_mask.weight"].any()

    def test_it_can_be_trained_on(self) -> None:
        """All but what multiplies zero weights gets a gradient at once."""
        model = flash(source(), True).train()
        sum(
            (y * uniform("probe", y.shape)).sum() for y in model(uniform("i", (1, 3, 64, 64)))
        ).backward()
        without = {name for name, p in model.named_parameters() if not p.grad.any()}
        assert {name.split(".dcn.")[1] for name in without} == {
            "offset_mask_dw.weight",
            "offset_mask_dw.bias",
        }


class TestArguments:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "options",
        [
            dict(dw_kernel_size=5, mlp_ratio=3.0, post_norm=True, in_channels=1),
            dict(layer_scale=None, num_classes=4, dcn_output_bias=False, mlp_fc2_bias=True),
            dict(dcn_output_bias=True, mlp_fc2_bias=False, out_indices=(0, 1)),
        ],
        ids=str,
    )
    def test_model_is_known_by_its_weights(self, kind: str, options: dict[str, Any]) -> None:
        model = small_intern_image(kind, **options)
        found, arguments = arguments_of(model.state_dict())
        assert found is KINDS[kind]
        for name, value in options.items():
            assert arguments[name] == value, name
        again = found(**arguments)
        again.load_state_dict(model.state_dict())

    @pytest.mark.parametrize(("kind", "size"), [("v3", "small"), ("v4", "base")])
    def test_published_size(self, kind: str, size: str) -> None:
        with torch.device("meta"):
            model = KINDS[kind](size)
        found, arguments = arguments_of(model.state_dict())
        assert published_size(found, arguments) == size
        for name in arguments.keys() & vars(model.arch).keys():
            assert arguments[name] == getattr(model.arch, name), name

    def test_no_published_size(self) -> None:
        assert published_size(*arguments_of(source().state_dict())) is None

    @pytest.mark.parametrize("state", [{}, {"layer1.0.conv1.weight": torch.ones(1)}], ids=str)
    def test_other_weights(self, state: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match="expected weights of InternImage, such as '"):
            arguments_of(state)
