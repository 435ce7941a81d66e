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

from mmdeform.layers import MultiScaleDeformableAttention

CONFIG = Path(__file__).parents[2] / "configs/deformable_detr/deformable-detr_r50_shapes.py"


def model_cfg() -> dict:
    init_default_scope("mmdet")
    return Config.fromfile(CONFIG).model


def attention_types(detector: torch.nn.Module) -> list[type]:
    return [type(m) for m in detector.modules() if isinstance(m, MMCVAttention)]


@pytest.mark.parametrize("variant", ["", "-refine", "-refine-twostage"])
def test_same_weights_give_mmdets_output(variant: str) -> None:
    cfg = Config.fromfile(CONFIG.parent / f"deformable-detr{variant}_r50_16xb2-50e_coco.py").model
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


def test_attention_is_chosen_by_the_config() -> None:
    cfg = model_cfg()
    cfg.encoder.layer_cfg.self_attn_cfg.type = "MultiScaleDeformableAttention"
    before = copy.deepcopy(cfg)
    detector = MODELS.build(cfg)
    assert attention_types(detector.encoder) == [MMCVAttention] * 3
    assert attention_types(detector.decoder) == [MultiScaleDeformableAttention] * 3
    assert (cfg.encoder, cfg.decoder) == (before.encoder, before.decoder)  # it can be built again


def test_unknown_attention_is_named() -> None:
    cfg = model_cfg()
    cfg.decoder.layer_cfg.cross_attn_cfg.type = "mmdeform.NoSuchAttention"
    with pytest.raises(KeyError, match="NoSuchAttention is not in"):
        MODELS.build(cfg)
