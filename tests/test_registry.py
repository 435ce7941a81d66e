"""Names in configs resolve to this package's classes, never silently to mmcv's."""

import inspect
import subprocess
import sys

import mmcv.ops
import pytest
from mmcv.cnn import build_conv_layer
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope

from mmdeform import layers
from mmdeform.registry import MODELS

MMCV_BASES = (
    mmcv.ops.DeformConv2d,
    mmcv.ops.DeformRoIPool,
    mmcv.ops.ModulatedDeformConv2d,
    mmcv.ops.MultiScaleDeformableAttention,
)
# Every name under which mmcv registers or exports a class that this package replaces.
MMCV_NAMES = sorted(
    {
        name
        for source in (MMENGINE_MODELS.module_dict, vars(mmcv.ops))
        for name, cls in source.items()
        if inspect.isclass(cls) and issubclass(cls, MMCV_BASES)
    }
)
NAMES = {
    "DCN": layers.DeformConv2dPack,
    "DCNv1": layers.DeformConv2dPack,
    "DeformConvPack": layers.DeformConv2dPack,
    "DeformConv2dPack": layers.DeformConv2dPack,
    "DCNv2": layers.ModulatedDeformConv2dPack,
    "ModulatedDeformConvPack": layers.ModulatedDeformConv2dPack,
    "ModulatedDeformConv2dPack": layers.ModulatedDeformConv2dPack,
    "DeformConv": layers.DeformConv2d,
    "DeformConv2d": layers.DeformConv2d,
    "ModulatedDeformConv": layers.ModulatedDeformConv2d,
    "ModulatedDeformConv2d": layers.ModulatedDeformConv2d,
    "DCNv3": layers.DCNv3,
    "DCNv4": layers.DCNv4,
    "DeformPSRoIPool": layers.DeformPSRoIPool,
    "DeformPSRoIPoolPack": layers.DeformPSRoIPoolPack,
    "DeformRoIPool": layers.DeformRoIPool,
    "DeformRoIPoolPack": layers.DeformRoIPoolPack,
    "DeformableAttention2d": layers.DeformableAttention2d,
    "LN2d": layers.LN2d,
    "ModulatedDeformRoIPoolPack": layers.ModulatedDeformRoIPoolPack,
    "MultiScaleDeformableAttention": layers.MultiScaleDeformableAttention,
    "SingleLevelDeformableAttention": layers.SingleLevelDeformableAttention,
}


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_names_of_mmcv_are_found():
    assert {"DCN", "DCNv2", "DeformConv2d", "MultiScaleDeformableAttention"} <= set(MMCV_NAMES)


@pytest.mark.parametrize("name", MMCV_NAMES)
def test_no_name_falls_through_to_mmcv(name):
    cls = MMENGINE_MODELS.get(f"mmdeform.{name}")
    assert cls.__module__.startswith("mmdeform."), cls


@pytest.mark.parametrize("name, cls", NAMES.items(), ids=NAMES)
def test_name(name, cls):
    assert MMENGINE_MODELS.get(f"mmdeform.{name}") is cls
    assert MODELS.get(name) is cls


def test_names_are_complete():
    registered = {
        name
        for name, cls in MODELS.module_dict.items()
        if cls.__module__.startswith("mmdeform.layers.")
    }
    assert registered == set(NAMES)


def test_mmcvs_names_stay_mmcvs():
    assert MMENGINE_MODELS.get("DCNv2") is mmcv.ops.ModulatedDeformConv2dPack
    assert MMENGINE_MODELS.get("DCN") is mmcv.ops.DeformConv2dPack


@pytest.mark.parametrize("scope", [None, "mmdet", "mmdeform"])
def test_build_conv_layer(scope):
    with DefaultScope.overwrite_default_scope(scope):
        layer = build_conv_layer(
            dict(type="mmdeform.DCNv2", deform_groups=2), 4, 6, 3, padding=1, bias=False
        )
    assert type(layer) is layers.ModulatedDeformConv2dPack
    assert layer.deform_groups == 2


def test_class_and_dotted_path():
    layer = build_conv_layer(dict(type=layers.DeformConv2dPack), 4, 6, 3)
    assert type(layer) is layers.DeformConv2dPack
    assert MMENGINE_MODELS.get("mmdeform.layers.DeformConv2dPack") is layers.DeformConv2dPack


@pytest.mark.parametrize("first", ["", "import mmdet.registry"])
def test_resolves_without_custom_imports_in_any_order(first):
    code = f"""
{first}
from mmengine.registry import MODELS
from mmengine.analysis import complexity_analysis
cls = MODELS.build(dict(type='mmdeform.DCNv2', in_channels=2, out_channels=2, kernel_size=3))
assert type(cls).__module__ == 'mmdeform.layers.deform_conv2d', type(cls)
assert 'mmdeform::deform_conv2d' in complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_operators_work_without_openmmlab():
    code = """
import sys
sys.modules.update(dict.fromkeys(('mmcv', 'mmdet', 'mmengine')))  # as if not installed
import torch, mmdeform
from mmdeform.ops import deform_conv2d
x, offset, weight = torch.randn(1, 2, 4, 4), torch.zeros(1, 18, 4, 4), torch.randn(3, 2, 3, 3)
output = deform_conv2d(x, offset, weight, padding=1)
assert (output - torch.nn.functional.conv2d(x, weight, padding=1)).abs().max() < 1e-4
assert not hasattr(mmdeform, 'layers')
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "mmcv" not in result.stderr
