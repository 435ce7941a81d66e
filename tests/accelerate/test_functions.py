"""mmcv's functions with this package's operators, against the same functions without."""

import pytest
import torch

pytest.importorskip("mmcv.ops")
import mmcv.ops

from mmdeform import accelerate, ops

from . import common

DTYPES = [torch.float32, torch.float64]
CONVOLUTION = ("deform_conv2d", "deform_conv2d_backward")
ATTENTION = ("ms_deform_attn", "ms_deform_attn_backward")
POOLING = ("deform_roi_pool", "deform_roi_pool_backward")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestResults:
    def test_deform_conv2d(self, device, dtype):
        leaves = common.convolution_leaves(dtype=dtype, device=device)
        common.compare(common.deform_conv2d, leaves, *CONVOLUTION)

    def test_offsets_of_zero(self, device, dtype):
        # Where training starts: every sample is a pixel, and derivatives have a side.
        leaves = common.convolution_leaves(dtype=dtype, device=device)
        leaves["offset"].zero_()
        common.compare(common.deform_conv2d, leaves, *CONVOLUTION)

    @pytest.mark.parametrize("bias", [False, True])
    def test_modulated_deform_conv2d(self, device, dtype, bias):
        leaves = common.convolution_leaves(mask=True, dtype=dtype, device=device)
        if bias:
            leaves["bias"] = common.random(6, dtype=dtype, device=device)
        common.compare(common.modulated_deform_conv2d, leaves, *CONVOLUTION)

    def test_attention_in_pytorch(self, device, dtype):
        leaves = common.attention_leaves(dtype=dtype, device=device)
        common.compare(common.ms_deform_attn_pytorch, leaves, *ATTENTION)

    def test_attention_kernel(self, device, dtype):
        leaves = common.attention_leaves(dtype=dtype, device=device)
        if device == "cuda":
            common.compare(common.ms_deform_attn, leaves, *ATTENTION)
            return
        # mmcv has no such kernel on the CPU.
        accelerate.disable()
        expected = common.results(common.ms_deform_attn_pytorch, leaves)
        accelerate.enable()
        with common.Calls() as calls:
            actual = common.results(common.ms_deform_attn, leaves)
        assert calls.names == list(ATTENTION)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("sampling_ratio", [0, 2, -1])
    @pytest.mark.parametrize("output_size", [3, (2, 5)])
    def test_roi_align(self, dtype, sampling_ratio, output_size):
        rois = common.make_rois(dtype=dtype)
        leaves = dict(input=common.random(2, 8, 9, 10, dtype=dtype))

        def function(input):
            return common.ROI_ALIGN(input, rois, output_size, 0.25, sampling_ratio, "avg", True)

        common.compare(function, leaves, *POOLING)

    @pytest.mark.parametrize("sampling_ratio", [0, 2, -1])
    @pytest.mark.parametrize("with_offset", [False, True])
    def test_deform_roi_pool(self, device, dtype, sampling_ratio, with_offset):
        rois = common.make_rois(dtype=dtype, device=device)
        leaves = dict(input=common.random(2, 8, 9, 10, dtype=dtype, device=device))
        if with_offset:
            leaves["offset"] = common.random(12, 2, 3, 4, dtype=dtype, device=device)

        def function(input, offset=None):
            return common.DEFORM_ROI_POOL(input, rois, offset, (3, 4), 0.25, sampling_ratio, 0.2)

        def expected(input, offset=None):
            ratio = max(sampling_ratio, 0)
            return ops.deform_roi_pool(input, rois, offset, (3, 4), 0.25, ratio, 0.2)

        accelerate.disable()
        if device == "cpu":
            with pytest.raises(RuntimeError, match="device cpu not found"):
                function(**leaves)
        elif with_offset:  # mmcv's gradient of offsets is not zero where a sample is clamped
            torch.testing.assert_close(function(**leaves), expected(**leaves), rtol=1e-4, atol=1e-4)
        else:
            common.compare(function, leaves, *POOLING)
        accelerate.enable()
        with common.Calls() as calls:
            actual = common.results(function, leaves)
        assert calls.names == list(POOLING)
        torch.testing.assert_close(actual, common.results(expected, leaves))


class TestRoIAlign:
    """Only what is faster, and nothing that mmcv computes differently or refuses."""

    def roi_align(self, rois, images=2, mode="avg", aligned=True, dtype=torch.float32):
        input = common.random(images, 8, 9, 10, dtype=dtype).requires_grad_()
        output = common.ROI_ALIGN(input, rois, 3, 0.25, 0, mode, aligned)
        output.square().sum().backward()
        return output, input.grad

    @pytest.mark.parametrize(
        "arguments", [dict(mode="max"), dict(aligned=False), dict(images=40)], ids=str
    )
    def test_the_rest_stays_mmcvs(self, arguments):
        accelerate.enable()
        with common.Calls() as calls:
            self.roi_align(common.make_rois(), **arguments)
        assert not calls.names

    def test_needs_a_bin_for_every_sixteen_pixels(self):
        accelerate.enable()
        input = torch.randn(1, 8, 36, 4)
        for count, expected in ((1, ["deform_roi_pool"]), (0, [])):
            with common.Calls() as calls:
                common.ROI_ALIGN(input, common.make_rois(1, 1)[:count], 3, 1.0, 0, "avg", True)
            assert calls.names == expected
        input = torch.randn(1, 8, 37, 4)
        with common.Calls() as calls:
            common.ROI_ALIGN(input, common.make_rois(1, 1), 3, 1.0, 0, "avg", True)
        assert not calls.names

    def test_without_rois(self):
        for enable in (accelerate.disable, accelerate.enable):
            enable()
            output, gradient = self.roi_align(torch.zeros(0, 5))
            assert output.shape == (0, 8, 3, 3)
            assert not gradient.any()

    @pytest.mark.parametrize("value", [-1.0, float("nan")])
    def test_size_stays_checked(self, value):
        rois = common.make_rois()
        rois[5, 3] = rois[5, 1] + value
        for enable in (accelerate.disable, accelerate.enable):
            enable()
            with pytest.raises(RuntimeError, match="size"):
                self.roi_align(rois)

    def test_does_not_keep_the_features(self):
        accelerate.enable()
        input = common.random(2, 8, 9, 10).requires_grad_()
        features = input * 1
        output = common.ROI_ALIGN(features, common.make_rois(), 3, 0.25, 0, "avg", True)
        features.mul_(2)  # mmcv's gradient needs the size alone
        output.sum().backward()
        assert input.grad.any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision(self, dtype):
        accelerate.enable()
        rois = common.make_rois().to(dtype)
        input = common.random(2, 8, 9, 10)
        exact = common.ROI_ALIGN(input, rois.float(), 3, 0.25)
        input = input.to(dtype).requires_grad_()
        output = common.ROI_ALIGN(input, rois, 3, 0.25)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)
        output.square().sum().backward()
        assert input.grad.dtype == dtype and input.grad.any()


class TestMixedPrecision:
    """mmcv's dtypes; coordinates that are fp32 stay fp32."""

    def dtypes(self, function, leaves, dtype):
        with common.Calls() as calls, torch.autocast("cpu", dtype=dtype):
            output, *gradients = common.results(function, leaves)
        tensors = [a for a in calls.arguments[0][1] if isinstance(a, torch.Tensor)]
        floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        for name, gradient in zip(leaves, gradients, strict=True):
            assert gradient.dtype == leaves[name].dtype, name
            assert gradient.isfinite().all() and gradient.any(), name
        return output.dtype, floats

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("modulated", [False, True])
    def test_convolutions_follow_the_offset(self, dtype, modulated):
        accelerate.enable()
        function = common.modulated_deform_conv2d if modulated else common.deform_conv2d
        leaves = common.convolution_leaves(mask=modulated)
        exact = common.results(function, leaves)[0]
        assert self.dtypes(function, leaves, dtype) == (
            torch.float32,
            [torch.float32] * len(leaves),
        )
        leaves["offset"] = leaves["offset"].to(dtype)
        assert self.dtypes(function, leaves, dtype) == (dtype, [dtype] * len(leaves))
        near = common.results(function, leaves)[0]
        assert (near - exact).abs().mean() < 0.1 * exact.abs().mean()
        leaves["input"] = leaves["input"].double()
        assert self.dtypes(function, leaves, dtype)[0] == dtype

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_attention_kernel_follows_the_value(self, dtype):
        accelerate.enable()
        leaves = common.attention_leaves()
        f32 = torch.float32
        assert self.dtypes(common.ms_deform_attn, leaves, dtype) == (f32, [f32, f32, f32])
        leaves["value"] = leaves["value"].to(dtype)
        assert self.dtypes(common.ms_deform_attn, leaves, dtype) == (dtype, [dtype, f32, f32])
        leaves["weights"] = leaves["weights"].to(dtype)  # one dtype for all coordinates
        assert self.dtypes(common.ms_deform_attn, leaves, dtype) == (dtype, [dtype, f32, f32])
        leaves["locations"] = leaves["locations"].to(dtype)
        assert self.dtypes(common.ms_deform_attn, leaves, dtype) == (dtype, [dtype, dtype, dtype])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_deform_roi_pool_follows_the_input(self, dtype):
        accelerate.enable()
        rois = common.make_rois()
        leaves = dict(input=common.random(2, 8, 9, 10), offset=common.random(12, 2, 3, 3))

        def function(input, offset):
            return common.DEFORM_ROI_POOL(input, rois.to(input.dtype), offset, 3, 0.25, 0, 0.2)

        f32 = torch.float32
        assert self.dtypes(function, leaves, dtype) == (f32, [f32, f32, f32])
        leaves["input"] = leaves["input"].to(dtype)
        assert self.dtypes(function, leaves, dtype) == (dtype, [dtype, f32, f32])

    @pytest.mark.parametrize("value", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("autocast", [False, True])
    def test_attention_in_pytorch_has_mmcvs_dtype(self, value, autocast):
        leaves = common.attention_leaves()
        leaves["value"] = leaves["value"].to(value)
        if not autocast:  # grid_sample takes one dtype
            leaves = {name: leaf.to(value) for name, leaf in leaves.items()}
        half = torch.bfloat16 if value == torch.float32 else value
        with torch.autocast("cpu", half, enabled=autocast):
            accelerate.disable()
            expected = common.results(common.ms_deform_attn_pytorch, leaves)
            accelerate.enable()
            actual = common.results(common.ms_deform_attn_pytorch, leaves)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
        if autocast or value == torch.float32:
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-4)
        else:
            torch.testing.assert_close(actual[0], expected[0], rtol=0.1, atol=0.1)


class TestArguments:
    def test_offset_may_be_empty(self):
        accelerate.enable()
        input, rois = common.random(2, 8, 9, 10), common.make_rois()
        expected = common.DEFORM_ROI_POOL(input, rois, None, 3)
        assert torch.equal(common.DEFORM_ROI_POOL(input, rois, input.new_zeros(0), 3), expected)

    def test_no_rois(self):
        accelerate.enable()
        input = common.random(2, 8, 9, 10).requires_grad_()
        offset = torch.zeros(0, 2, 3, 3, requires_grad=True)
        output = common.DEFORM_ROI_POOL(input, torch.zeros(0, 5), offset, 3)
        assert output.shape == (0, 8, 3, 3)
        output.sum().backward()
        assert offset.grad.shape == offset.shape
        assert not input.grad.any()

    def test_any_batch_size(self):
        x, offset = common.random(3, 4, 5, 5), common.random(3, 18, 5, 5)
        layer = mmcv.ops.DeformConv2d(4, 4, 3, padding=1, im2col_step=2)
        accelerate.disable()
        with pytest.raises(AssertionError, match="im2col_step"):
            layer(x, offset)
        expected = torch.cat([layer(x[i : i + 1], offset[i : i + 1]) for i in range(3)])
        accelerate.enable()
        torch.testing.assert_close(layer(x, offset), expected, rtol=1e-4, atol=1e-4)

    def test_shapes_of_levels_may_be_a_list(self):
        leaves = common.attention_leaves()

        def function(value, locations, weights):
            return common.MS_DEFORM_ATTN_PYTORCH(value, common.SHAPES, locations, weights)

        common.compare(function, leaves, *ATTENTION)

    def test_errors_stay(self):
        conv = common.convolution_leaves(mask=True)
        input, offset, weight, mask = conv.values()
        leaves = common.attention_leaves()
        longer = torch.cat([leaves["value"], leaves["value"]], 1)
        rois = common.make_rois()
        wrong = [
            (ValueError, "Expected 4D", lambda: common.DEFORM_CONV2D(input[0], offset, weight)),
            (
                ValueError,
                "Expected 4D",
                lambda: common.MODULATED_DEFORM_CONV2D(input[0], offset, mask, weight),
            ),
            (
                AssertionError,
                "bias is False",
                lambda: common.DEFORM_CONV2D(input, offset, weight, 1, 1, 1, 1, 1, True),
            ),
            (AssertionError, "RoI must be", lambda: common.ROI_ALIGN(input, rois[:, :4], 3)),
            (
                RuntimeError,
                "offset",
                lambda: common.DEFORM_CONV2D(input, offset, weight, 1, 1, 1, 2),
            ),
            (
                (RuntimeError, ValueError),
                "too small|smaller",
                lambda: common.DEFORM_CONV2D(input[..., :1, :1], offset, weight, 1, 0, 1, 2, 2),
            ),
            (
                RuntimeError,
                "split|tokens",
                lambda: common.ms_deform_attn_pytorch(**leaves | dict(value=longer)),
            ),
        ]
        for enable in (accelerate.disable, accelerate.enable):
            enable()
            for error, match, call in wrong:
                with pytest.raises(error, match=match):
                    call()

    def test_double_backward_is_refused(self):
        accelerate.enable()
        leaves = common.convolution_leaves()
        for leaf in leaves.values():
            leaf.requires_grad_()
        output = common.deform_conv2d(**leaves).square().sum()
        (gradient,) = torch.autograd.grad(output, leaves["input"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    def test_deterministic_algorithms_are_asked_for(self):
        accelerate.enable()
        rois = common.make_rois()
        images = dict(input=common.random(2, 8, 9, 10))
        functions = [
            (common.deform_conv2d, common.convolution_leaves()),
            (common.modulated_deform_conv2d, common.convolution_leaves(mask=True)),
            (common.ms_deform_attn, common.attention_leaves()),
            (lambda input: common.DEFORM_ROI_POOL(input, rois, None, 3), images),
            (lambda input: common.ROI_ALIGN(input, rois, 3), images),
        ]
        for wanted in (False, True):
            torch.use_deterministic_algorithms(wanted)
            try:
                with common.Calls() as calls:
                    for function, leaves in functions:
                        common.results(function, leaves)
            finally:
                torch.use_deterministic_algorithms(False)
            flags = [args[-1] for name, args in calls.arguments if name.endswith("_backward")]
            assert flags == [wanted] * len(functions)

    def test_other_dtypes_and_devices_stay_mmcvs(self):
        accelerate.enable()
        input = torch.ones(1, 8, 3, 3, dtype=torch.int32)
        with common.Calls() as calls, pytest.raises(RuntimeError):
            common.ROI_ALIGN(input, torch.ones(1, 5, dtype=torch.int32), 3)
        with pytest.raises(RuntimeError, match="CPU tensor"):
            common.deform_conv2d(
                **{name: leaf.to("meta") for name, leaf in common.convolution_leaves().items()}
            )
        assert not calls.names
