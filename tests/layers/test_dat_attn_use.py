"""DeformableAttention2d as configs, trainers and compilers use it: backends, dtypes, memory."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("mmcv.ops")
from mmdeform.layers import DeformableAttention2d
from mmdeform.models import Transplant
from mmdeform.ops._library import has_kernel
from mmdeform.registry import MODELS

from .dat import biases, image, make, versions

needs_kernel = pytest.mark.skipif(
    not has_kernel("dat_attn", "cpu"), reason="needs the compiled cpu library"
)


class TestBackends:
    @biases
    @versions
    def test_auto_is_the_reference(self, version: str, bias: str | None) -> None:
        layer = make(version=version, position_bias=bias, stride=2)
        x = image(2, 12, 7, 5)
        output = layer(x)
        layer.backend = "reference"
        torch.testing.assert_close(layer(x), output)

    @needs_kernel
    @pytest.mark.parametrize("bias", ["relative", "depthwise", None], ids=str)
    def test_fused(self, bias: str | None) -> None:
        layer = make(position_bias=bias, stride=2)
        x = image(2, 12, 7, 5)
        output = layer(x)
        layer.backend = "fused"
        assert torch.equal(layer(x), output)

    @needs_kernel
    def test_what_cannot_be_fused(self) -> None:
        for bias in ("fixed", "log_cpb"):
            with pytest.raises(ValueError, match=f"'fused' knows .* got '{bias}'; use backend='au"):
                make(position_bias=bias, backend="fused")
        layer = make(attn_drop=0.25, backend="fused")
        with pytest.raises(RuntimeError, match=r"attn_drop=0.25 in training; use backend='auto'"):
            layer(image(1, 12, 4, 6))
        assert layer.eval()(image(1, 12, 4, 6)).isfinite().all()

    @biases
    def test_dropout_of_weights(self, bias: str | None) -> None:
        layer = make(position_bias=bias, attn_drop=0.5, proj_drop=0.0)
        x = image(1, 12, 4, 6).expand(400, -1, -1, -1)
        output = layer(x)
        assert not torch.equal(output[0], output[1])
        expected = layer.eval()(x[:1])
        error = (output.mean(0) - expected[0]).abs().mean()
        assert error < 0.1 * (output - expected).abs().mean()  # 1/20 is expected

    def test_dropout_of_the_output(self) -> None:
        layer = make(proj_drop=0.5)
        x = image(1, 12, 4, 6)
        output = layer(x)
        dropped = output == 0
        assert 0.3 < dropped.double().mean() < 0.7
        torch.testing.assert_close(output[~dropped], 2 * layer.eval()(x)[~dropped])

    @pytest.mark.parametrize("bias", ["relative", "depthwise", None], ids=str)
    def test_nothing_of_the_size_of_queries_times_keys(self, bias: str | None) -> None:
        """The largest tensor that the layer and its backward pass make."""

        class Largest(TorchDispatchMode):
            numel = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                output = function(*args, **(kwargs or {}))
                for leaf in pytree.tree_leaves(output):
                    if isinstance(leaf, Tensor):
                        self.numel = max(self.numel, leaf.numel())
                return output

        layer = DeformableAttention2d(8, 2, stride=2, position_bias=bias)
        x = torch.randn(1, 8, 32, 32, requires_grad=True)
        sizes = {}
        for backend in ("auto", "reference"):
            layer.backend = backend
            with Largest() as largest:
                layer(x).sum().backward()
            sizes[backend] = largest.numel
        assert sizes["auto"] <= 2 * x.numel()
        assert sizes["reference"] >= 32 * 32 * 16 * 16 * 2  # so it would have been seen


class TestUse:
    @biases
    @pytest.mark.parametrize("mode", ["fp16", "bf16", "autocast"])
    def test_half_precision(self, mode: str, bias: str | None) -> None:
        layer = make(position_bias=bias, stride=2).float()
        x = image(2, 12, 6, 20).float()
        exact, (_, reference) = layer(x), layer.predict_positions(x)
        offsets: list[Tensor] = []
        layer.conv_offset.register_forward_hook(lambda *args: offsets.append(args[2]))
        dtype = torch.float16 if mode == "fp16" else torch.bfloat16
        if mode == "autocast":
            with torch.autocast("cpu", dtype):
                output, (positions, rough) = layer(x), layer.predict_positions(x)
        else:
            low = copy.deepcopy(layer).to(dtype)
            output, (positions, rough) = low(x.to(dtype)), low.predict_positions(x.to(dtype))
        # Offsets are predicted in half precision; what follows is fp32.
        assert output.dtype == offsets[-1].dtype == dtype and torch.equal(rough, reference)
        offset = offsets[-1].view(2, 3, 2, 3, 10).float().movedim(2, -1)
        moved = reference + offset.tanh() * 2 / torch.tensor([2, 9])
        torch.testing.assert_close(positions, moved, rtol=1e-6, atol=1e-6)
        error = (output - exact).abs().mean() / exact.abs().mean()
        assert error < (0.005 if mode == "fp16" else 0.04)
        output.float().sum().backward()

    @biases
    def test_compiles_without_graph_breaks(self, bias: str | None) -> None:
        layer = make(position_bias=bias, stride=2)
        # The first also meets the operator's shapes and gradient; it takes seconds.
        backend = "aot_eager" if bias == "relative" else "eager"
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        results = []
        for function in (compiled, layer):
            leaf = image(2, 12, 6, 5).requires_grad_()
            output = function(leaf)
            results.append((output, *torch.autograd.grad(output.sin().sum(), leaf)))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_activation_checkpointing(self, reentrant: bool) -> None:
        layer = make(stride=2, attn_drop=0.3, proj_drop=0.3)
        gradients = []
        for checkpointed in (False, True):
            torch.manual_seed(1)
            leaf = image(1, 12, 6, 5).requires_grad_()
            if checkpointed:
                output = checkpoint(layer, leaf, use_reentrant=reentrant)
            else:
                output = layer(leaf)
            layer.zero_grad()
            output.sin().sum().backward()
            gradients.append([leaf.grad, *(parameter.grad for parameter in layer.parameters())])
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted)

    @biases
    def test_channels_last(self, bias: str | None) -> None:
        layer = make(position_bias=bias, stride=2)
        x = image(2, 12, 6, 5)
        expected = layer(x)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)

    @biases
    @pytest.mark.parametrize("use_offsets", [True, False])
    def test_empty_batch(self, bias: str | None, use_offsets: bool) -> None:
        layer = make(position_bias=bias, stride=2, use_offsets=use_offsets)
        for backend in ("auto", "reference"):
            layer.backend = backend
            x = torch.zeros(0, 12, 6, 4).double().requires_grad_()
            output = layer(x)
            assert output.shape == x.shape
            output.sum().backward()
            assert x.grad.shape == x.shape
        assert layer.predict_positions(x)[0].shape == (0, 3, 3, 2, 2)
        assert layer.attention(x, torch.arange(3)).shape == (0, 6, 3, 6)

    def test_config_and_repr(self) -> None:
        layer = MODELS.build(
            dict(type="mmdeform.DeformableAttention2d", embed_dims=8, num_heads=2, feat_size=[3, 4])
        )
        layer.init_weights()
        assert layer.rpe_table.shape == (2, 5, 7)
        assert "8, num_heads=2, num_groups=1, stride=(1, 1)" in repr(layer)
        assert "version='pp', position_bias='relative'" in repr(layer)

    def test_transplant_in_place_of_a_convolution(self) -> None:
        model = Transplant(
            nn.ModuleDict(dict(block=nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))),
            rules=[
                dict(
                    select="block.0",
                    type="mmdeform.DeformableAttention2d",
                    embed_dims=8,
                    num_heads=2,
                    padding=0,
                )
            ],
        )
        layer = model["block"][0]
        assert isinstance(layer, DeformableAttention2d)
        assert layer.kernel_size == (3, 3) and layer.stride == (1, 1)
        assert model["block"](torch.randn(1, 8, 5, 6)).shape == (1, 8, 5, 6)
