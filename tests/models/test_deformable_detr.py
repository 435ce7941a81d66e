"""mmdeform's Deformable DETR is mmdet's on another operator."""

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
from mmcv.ops import MultiScaleDeformableAttention as MMCVAttention
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdeform.layers import MultiScaleDeformableAttention, SingleLevelDeformableAttention

CONFIG = Path(__file__).parents[2] / "configs/deformable_detr/deformable-detr_r50_shapes.py"


def model_cfg() -> dict:
    init_default_scope("mmdet")
    return Config.fromfile(CONFIG).model


def attention_types(detector: torch.nn.Module) -> list[type]:
    return [type(m) for m in detector.modules() if isinstance(m, MMCVAttention)]


@pytest.mark.parametrize(
    "variant",
    ["_r50", "-refine_r50", "-refine-twostage_r50", "-single-scale-k1_r50", "_r50_fpn"],
)
def test_same_weights_give_mmdets_output(variant: str) -> None:
    cfg = Config.fromfile(CONFIG.parent / f"deformable-detr{variant}_16xb2-50e_coco.py").model
    cfg.backbone.init_cfg = None
    cfg.num_queries = 20  # of about 130 tokens of the images below
    cfg.encoder.num_layers = cfg.decoder.num_layers = 2
    init_default_scope("mmdet")
    ours = MODELS.build(copy.deepcopy(cfg)).eval()
    theirs = MODELS.build(dict(copy.deepcopy(cfg), type="DeformableDETR")).eval()
    ours.init_weights()
    for name, parameter in ours.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # zero weights would hide the operator
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert attention_types(ours) == [MultiScaleDeformableAttention] * 4
    assert attention_types(theirs) == [MMCVAttention] * 4

    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        outputs = [detector(images, samples(), mode="tensor") for detector in (ours, theirs)]
    for got, expected in zip(*outputs, strict=True):
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def samples() -> list:
    from mmdet.structures import DetDataSample

    meta = dict(batch_input_shape=(96, 64), img_shape=(96, 64))
    return [DetDataSample(metainfo=meta), DetDataSample(metainfo=dict(meta, img_shape=(80, 50)))]


@pytest.mark.parametrize("points", [1, 4])
def test_levels_of_the_encoder_are_apart_without_multi_scale_attention(points: int) -> None:
    name = f"deformable-detr-ms-inputs-k{points}_r50_16xb2-50e_coco.py"
    cfg = Config.fromfile(CONFIG.parent / name).model
    cfg.backbone.init_cfg = None
    cfg.encoder.num_layers = cfg.decoder.num_layers = 2
    init_default_scope("mmdet")
    detector = MODELS.build(cfg).eval()
    detector.init_weights()
    assert attention_types(detector.encoder) == [SingleLevelDeformableAttention] * 2
    assert attention_types(detector.decoder) == [MultiScaleDeformableAttention] * 2
    sizes = [(12, 8), (6, 4), (3, 2), (2, 1)]
    torch.manual_seed(0)
    features = [torch.randn(2, 256, *size) for size in sizes]
    with torch.no_grad():
        memories = []
        for shift in (0, 1):
            features[1][:] += shift
            inputs, _ = detector.pre_transformer(features, samples())
            memories.append(detector.forward_encoder(**inputs)["memory"])
        changed = (memories[0] != memories[1]).any(-1)[0]
        assert changed.nonzero()[:, 0].tolist() == list(range(96, 96 + 24))
        scores = detector(torch.randn(2, 3, 96, 64), samples(), mode="tensor")[0]
    assert scores.shape == (2, 2, 300, 80) and scores.isfinite().all()


def test_two_stages_with_any_number_of_channels() -> None:
    name = "deformable-detr-refine-twostage_r50_shapes.py"
    detector = MODELS.build(Config.fromfile(CONFIG.parent / name).model)
    proposals = torch.randn(2, 5, 4)
    encoded = detector.get_proposal_pos_embed(proposals)
    assert encoded.shape == (2, 5, 2 * 128)
    x = proposals[0, 0, 0].sigmoid() * 2 * torch.pi  # the first wave of the first coordinate
    torch.testing.assert_close(encoded[0, 0, :2], torch.stack([x.sin(), x.cos()]))


def test_attention_is_chosen_by_the_config() -> None:
    cfg = model_cfg()
    cfg.encoder.layer_cfg.self_attn_cfg.type = "MultiScaleDeformableAttention"
    before = copy.deepcopy(cfg)
    detector = MODELS.build(cfg)
    assert attention_types(detector.encoder) == [MMCVAttention] * 3
    assert attention_types(detector.decoder) == [MultiScaleDeformableAttention] * 3
    assert (cfg.encoder, cfg.decoder) == (before.encoder, before.decoder)  # it can be built again


def test_attention_has_arguments_that_mmcvs_does_not_know() -> None:
    cfg = model_cfg()
    cfg.encoder.layer_cfg.self_attn_cfg.offset_range = 8
    cfg.decoder.layer_cfg.cross_attn_cfg.offset_clamp = 6.5
    detector = MODELS.build(cfg)
    assert [layer.self_attn.offset_range for layer in detector.encoder.layers] == [8] * 3
    assert [layer.cross_attn.offset_clamp for layer in detector.decoder.layers] == [6.5] * 3
    cfg = model_cfg()
    cfg.encoder.layer_cfg.self_attn_cfg.offset_rang = 8
    with pytest.raises(TypeError, match="offset_rang"):
        MODELS.build(cfg)


def test_unknown_attention_is_named() -> None:
    cfg = model_cfg()
    cfg.decoder.layer_cfg.cross_attn_cfg.type = "mmdeform.NoSuchAttention"
    with pytest.raises(KeyError, match="NoSuchAttention is not in"):
        MODELS.build(cfg)
