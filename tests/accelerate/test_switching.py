"""Switching on and off, in any order of imports, below unchanged classes and configs."""

import copy
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("mmcv.ops")
import mmcv.ops

from mmdeform import accelerate, layers
from mmdeform.accelerate._functions import REPLACEMENTS

from . import common

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = [accelerate._function(replacement) for replacement in REPLACEMENTS]
CONVOLUTION = ["deform_conv2d", "deform_conv2d_backward"]


def replaced_objects() -> list:
    methods = [vars(function)[name] for function in FUNCTIONS for name in ("forward", "backward")]
    return [*methods, common.MS_DEFORM_ATTN_PYTORCH.__code__]


accelerate.disable()
STOCK = replaced_objects()


def used() -> list[str]:
    """The operators that a deformable convolution of mmcv runs, forward and backward."""
    with common.Calls() as calls:
        common.results(common.deform_conv2d, common.convolution_leaves())
    return calls.names


def randomise(layer: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


class TestLayers:
    """Classes of mmcv: outputs, and gradients of inputs and parameters."""

    def compare(self, layer, x, *operators):
        parameters = dict(layer.named_parameters())

        def function(x, **parameters):
            return torch.func.functional_call(layer, parameters, (x,))

        common.compare(function, dict(x=x, **parameters), *operators)

    @pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
    def test_convolutions(self, device, name):
        layer = randomise(getattr(mmcv.ops, name)(8, 6, 3, stride=2, padding=1, deform_groups=2))
        self.compare(layer.to(device), common.random(2, 8, 9, 7, device=device), *CONVOLUTION)

    def test_map_smaller_than_the_kernel(self):
        layer = randomise(mmcv.ops.DeformConv2d(4, 6, 3, padding=1))
        offset = common.random(2, 18, 1, 2)
        leaves = dict(x=common.random(2, 4, 1, 2), offset=offset)
        common.compare(lambda x, offset: layer(x, offset), leaves, *CONVOLUTION)

    def test_switchable_atrous_convolution(self):
        layer = randomise(mmcv.ops.SAConv2d(8, 6, 3, padding=1, bias=False, use_deform=True))
        x = common.random(2, 8, 9, 7)
        accelerate.disable()
        expected = layer(x)
        accelerate.enable()
        with common.Calls() as calls:
            actual = layer(x)
        assert calls.names == ["deform_conv2d"] * 2
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("reference_size", [2, 4])
    def test_attention(self, device, reference_size):
        layer = mmcv.ops.MultiScaleDeformableAttention(32, 4, 2, 3, dropout=0.0)
        layer = randomise(layer).to(device)
        shapes = torch.tensor(common.SHAPES, device=device)
        starts = torch.tensor(common.STARTS, device=device)
        reference = torch.rand(2, 7, 2, reference_size).to(device)
        leaves = dict(
            query=common.random(7, 2, 32, device=device),
            value=common.random(36, 2, 32, device=device),
        )

        def function(query, value):
            return layer(
                query,
                value=value,
                reference_points=reference,
                spatial_shapes=shapes,
                level_start_index=starts,
            )

        common.compare(function, leaves, "ms_deform_attn", "ms_deform_attn_backward")

    @pytest.mark.parametrize("name", ["DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"])
    def test_roi_pooling_on_the_cpu(self, name):
        arguments = dict(output_size=3, output_channels=4, deform_fc_channels=5, spatial_scale=0.25)
        layer = randomise(getattr(mmcv.ops, name)(**arguments))
        own = getattr(layers, name)(**arguments)
        own.load_state_dict(layer.state_dict())
        x, rois = common.random(2, 4, 9, 10), common.make_rois()
        accelerate.disable()
        with pytest.raises(RuntimeError, match="device cpu not found"):
            layer(x, rois)
        accelerate.enable()
        outputs = []
        for module in (layer, own):
            output = module(x, rois)
            output.square().sum().backward()
            outputs.append([output, *(parameter.grad for parameter in module.parameters())])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


class TestSwitch:
    @pytest.fixture
    def log(self, monkeypatch):
        lines = []
        monkeypatch.setattr(accelerate, "print_log", lambda line, logger: lines.append(line))
        return lines

    def assert_stock(self):
        assert not accelerate.is_enabled()
        assert all(a is b for a, b in zip(replaced_objects(), STOCK, strict=True))
        attributes = [name for function in FUNCTIONS for name in vars(function)]
        attributes += vars(common.MS_DEFORM_ATTN_PYTORCH)
        assert not any("mmdeform" in name for name in attributes)
        assert used() == []

    def test_gives_back_the_very_same_objects(self):
        accelerate.enable()
        assert accelerate.is_enabled()
        assert not any(a is b for a, b in zip(replaced_objects(), STOCK, strict=True))
        assert used() == CONVOLUTION
        accelerate.disable()
        self.assert_stock()

    def test_twice_is_once(self, log):
        accelerate.enable()
        assert len(log) == 1 and "DeformConv2dFunction" in log[0] and "on cpu" in log[0]
        accelerate.enable()
        assert len(log) == 1
        assert used() == CONVOLUTION
        accelerate.disable()
        accelerate.disable()
        self.assert_stock()
        accelerate.enable()
        assert len(log) == 2

    def test_reload(self):
        accelerate.enable()
        before = vars(FUNCTIONS[0])["forward"]
        importlib.reload(accelerate)
        assert vars(FUNCTIONS[0])["forward"] is not before  # it is the new module's
        assert used() == CONVOLUTION
        accelerate.disable()
        self.assert_stock()

    def test_signature_and_documentation_stay(self):
        accelerate.enable()
        attention = common.MS_DEFORM_ATTN_PYTORCH
        assert "multi-scale deformable attention" in attention.__doc__
        names = ["value", "value_spatial_shapes", "sampling_locations", "attention_weights"]
        assert list(inspect.signature(attention).parameters) == names
        for function in FUNCTIONS:
            assert function.forward.__module__.startswith("mmcv.ops")
            assert function.forward.__doc__ == inspect.unwrap(function.forward).__doc__

    def test_backward_belongs_to_its_forward(self):
        leaves = common.convolution_leaves()
        expected = common.results(common.deform_conv2d, leaves)[1:]
        for before, after, operators in (
            (accelerate.enable, accelerate.disable, ["deform_conv2d_backward"]),
            (accelerate.disable, accelerate.enable, []),
        ):
            before()
            copies = [leaf.clone().requires_grad_() for leaf in leaves.values()]
            output = common.deform_conv2d(*copies)
            after()
            with common.Calls() as calls:
                weights = torch.linspace(-1, 1, output.numel()).view_as(output)
                gradients = torch.autograd.grad((output * weights).sum(), copies)
            assert calls.names == operators
            torch.testing.assert_close(list(gradients), expected, rtol=1e-4, atol=1e-4)

    def test_checkpointing(self):
        accelerate.enable()
        leaves = common.convolution_leaves(mask=True)
        expected = common.results(common.modulated_deform_conv2d, leaves)

        def function(**leaves):
            return checkpoint(common.modulated_deform_conv2d, *leaves.values(), use_reentrant=False)

        torch.testing.assert_close(common.results(function, leaves), expected)

    def test_copies(self):
        accelerate.enable()
        layer = randomise(mmcv.ops.ModulatedDeformConv2dPack(4, 6, 3))
        x = common.random(1, 4, 5, 5)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))

    @pytest.mark.parametrize(
        "name",
        [
            "deform_conv2d",
            "modulated_deform_conv2d",
            "ms_deform_attn",
            "ms_deform_attn_pytorch",
            "deform_roi_pool",
            "roi_align",
        ],
    )
    def test_compiles_in_one_graph(self, name):
        accelerate.enable()
        if name.startswith("ms"):
            function, leaves = getattr(common, name), common.attention_leaves()
        elif name.endswith("conv2d"):
            function = getattr(common, name)
            leaves = common.convolution_leaves(mask=name.startswith("modulated"))
        else:
            rois, leaves = common.make_rois(), dict(input=common.random(2, 8, 9, 10))
            more = (None, 3) if name == "deform_roi_pool" else (3,)
            alias = getattr(common, name.upper())

            def function(input):
                return alias(input, rois, *more)

        torch._dynamo.reset()
        compiled = torch.compile(
            lambda **leaves: function(**leaves) * 2, fullgraph=True, backend="aot_eager"
        )
        expected = common.results(function, leaves)
        actual = [tensor / 2 for tensor in common.results(compiled, leaves)]
        torch.testing.assert_close(actual, expected)

    def test_exports_mmcvs_attention(self):
        accelerate.enable()
        leaves = tuple(common.attention_leaves().values())
        graph = str(torch.jit.trace(common.ms_deform_attn_pytorch, leaves).graph)
        assert "grid_sampler" in graph and "mmdeform::" not in graph


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a process that has imported nothing."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


class TestProcess:
    """In a process of its own."""

    CONFIG = "custom_imports = dict(imports=['mmdeform.accelerate'], allow_failed_imports=False)"
    USE = """
from tests.accelerate.common import *
with Calls() as calls:
    deform_conv2d(**convolution_leaves())
    ms_deform_attn_pytorch(**attention_leaves())
print("operators", *calls.names)
"""

    @pytest.mark.parametrize(
        "after", [False, True], ids=["before mmcv", "by a config, after mmdet"]
    )
    def test_order_of_imports(self, after, tmp_path):
        code = "import mmdeform.accelerate\n" + self.USE
        if after:
            pytest.importorskip("mmdet")
            (tmp_path / "config.py").write_text(self.CONFIG)
            code = f"""
from mmdet.models.dense_heads.tood_head import deform_conv2d as captured
from mmengine.config import Config
Config.fromfile({str(tmp_path / "config.py")!r})
{self.USE}
with Calls() as calls:
    leaves = convolution_leaves()
    captured(*leaves.values(), (1, 2), (1, 2), (2, 1), 2, 2)
print("mmdet's", *calls.names)
"""
        process = run(code)
        assert process.returncode == 0, process.stderr
        lines = process.stdout.splitlines()
        assert "operators deform_conv2d ms_deform_attn" in lines
        assert not after or "mmdet's deform_conv2d" in lines
        assert process.stdout.count("mmdeform.accelerate:") == 1

    def test_without_the_library(self, tmp_path):
        code = """
import mmdeform.accelerate
from tests.accelerate.common import *
with Calls() as calls:
    deform_conv2d(**convolution_leaves())
    ms_deform_attn_pytorch(**attention_leaves())
    ROI_ALIGN(torch.ones(1, 8, 3, 3), torch.zeros(1, 5), 3)
    assert not calls.names, calls.names
    DEFORM_ROI_POOL(torch.ones(1, 8, 3, 3), torch.zeros(1, 5), None, 3)
    assert calls.names == ["deform_roi_pool"], calls.names
"""
        library = str(tmp_path / "missing.so")
        process = run(code, MMDEFORM_CPU_LIBRARY=library, MMDEFORM_REQUIRE_EXT="0")
        assert process.returncode == 0, process.stderr
        assert "mmcv's own, where it has one, on cpu" in process.stdout
        assert "missing.so does not exist" in process.stdout
