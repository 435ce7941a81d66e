"""The blocks of DAT against arithmetic written out pixel by pixel."""

import pytest
import torch

pytest.importorskip("mmcv.ops")
from torch import Tensor, nn

from mmdeform.models.backbones.dat import neighborhood
from mmdeform.models.backbones.dat.mlp import MLP, ConvMLP
from mmdeform.models.backbones.dat.neighborhood_attention import NeighborhoodAttention
from mmdeform.models.backbones.dat.spatial_reduction_attention import SpatialReductionAttention
from mmdeform.models.backbones.dat.window_attention import ShiftedWindowAttention, WindowAttention

DIMS, HEADS = 6, 2
SIZES = [(8, 8), (7, 9), (4, 11), (3, 2), (1, 1)]


def randomize(module: nn.Module) -> nn.Module:
    """In double precision, with parameters of order 1, tables included."""
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """One query (M, D), keys and values (N, M, D), bias (M, N): output (M * D,)."""
    logits = torch.einsum("md,nmd->mn", query, keys) * query.shape[-1] ** -0.5 + bias
    return torch.einsum("mn,nmd->md", logits.softmax(-1), values).flatten()


def heads(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (H, W, M, D) of a map (C, H, W)."""
    q, k, v = linear(x.permute(1, 2, 0)).chunk(3, -1)
    return tuple(t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))


def filled(x: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]))


def window_attention(module: WindowAttention, x: Tensor, shift: int) -> Tensor:
    size = module.window_size
    shape = [-(-length // size) * size for length in x.shape[1:]]
    query, key, value = heads(module.proj_qkv, filled(x, *shape))
    table = module.relative_position_bias_table.view(2 * size - 1, 2 * size - 1, HEADS)

    def place(pixel: int, length: int) -> tuple[int, int, bool]:
        """Window along an axis, place in it, and whether it came round from the other end."""
        window, inside = divmod((pixel - shift) % length, size)
        return window, inside, pixel < shift

    output = torch.empty_like(x)
    for y in range(x.shape[1]):
        for left in range(x.shape[2]):
            here = place(y, shape[0]), place(left, shape[1])
            keys, values, bias = [], [], []
            for ky in range(shape[0]):
                for kx in range(shape[1]):
                    there = place(ky, shape[0]), place(kx, shape[1])
                    if any(a[0] != b[0] for a, b in zip(here, there, strict=True)):
                        continue
                    apart = any(a[2] != b[2] for a, b in zip(here, there, strict=True))
                    row, column = (a[1] - b[1] + size - 1 for a, b in zip(here, there, strict=True))
                    bias.append(table[row, column] - 100.0 * apart)
                    keys.append(key[ky, kx])
                    values.append(value[ky, kx])
            out = attend(
                query[y, left], torch.stack(keys), torch.stack(values), torch.stack(bias, -1)
            )
            output[:, y, left] = module.proj_out(out)
    return output


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("cls", "window", "shift"),
    [(WindowAttention, 4, 0), (ShiftedWindowAttention, 4, 2), (ShiftedWindowAttention, 3, 2)],
)
def test_window_attention(cls: type, window: int, shift: int, size: tuple[int, int]) -> None:
    module = randomize(cls(DIMS, HEADS, window))
    x = torch.randn(2, DIMS, *size, dtype=torch.float64)
    expected = torch.stack([window_attention(module, image, shift) for image in x])
    torch.testing.assert_close(module(x), expected)


def test_shift_is_half_a_window_rounded_up() -> None:
    assert ShiftedWindowAttention(DIMS, HEADS, 7).shift == 4


def neighborhood_attention(module: NeighborhoodAttention, x: Tensor) -> Tensor:
    kernel = module.kernel_size
    height, width = (max(kernel, length) for length in x.shape[1:])
    query, key, value = heads(module.qkv, filled(x, height, width))
    output = torch.empty_like(x)
    for y in range(x.shape[1]):
        for left in range(x.shape[2]):
            top = min(max(y - kernel // 2, 0), height - kernel)
            start = min(max(left - kernel // 2, 0), width - kernel)
            rows, columns = slice(top, top + kernel), slice(start, start + kernel)
            down, right = top - y + kernel - 1, start - left + kernel - 1
            bias = module.rpb[:, down : down + kernel, right : right + kernel].flatten(1)
            keys, values = (t[rows, columns].flatten(0, 1) for t in (key, value))
            output[:, y, left] = module.proj(attend(query[y, left], keys, values, bias))
    return output


class TestNeighborhood:
    @pytest.fixture(params=[1, 300, 10**9], ids=["a query", "some rows", "all"], autouse=True)
    def chunk(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
        """Elements gathered at a time: whatever they are, results are the same."""
        monkeypatch.setitem(neighborhood._CHUNK, "cpu", request.param)
        return request.param

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("grad", [False, True])
    def test_against_loops(self, size: tuple[int, int], grad: bool) -> None:
        module = randomize(NeighborhoodAttention(DIMS, HEADS, 3))
        x = torch.randn(2, DIMS, *size, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            got = module(x)
        expected = torch.stack([neighborhood_attention(module, image) for image in x])
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("drop", [0.0, 0.4])
    def test_gradients(self, drop: float) -> None:
        def call(*inputs: Tensor) -> Tensor:
            torch.manual_seed(1)
            return neighborhood.neighborhood_attention(*inputs, drop)

        inputs = [torch.randn(2, 2, 4, 5, 3, dtype=torch.float64) for _ in range(3)]
        inputs.append(torch.randn(2, 5, 5, dtype=torch.float64))
        for tensor in inputs:
            tensor.requires_grad_()
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)

    def test_drops_what_it_says(self) -> None:
        query = torch.zeros(1, 2, 20, 20, 1)
        value = torch.ones(1, 2, 20, 20, 1)
        output = neighborhood.neighborhood_attention(
            query, query, value, torch.zeros(2, 5, 5), 0.25
        )
        kept = output * 9 * 0.75  # of the nine equal weights
        torch.testing.assert_close(kept, kept.round())
        assert kept.mean() == pytest.approx(9 * 0.75, rel=0.05)
        assert kept.std() == pytest.approx((9 * 0.75 * 0.25) ** 0.5, rel=0.1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_gradients_of_half_precision_are_summed_in_fp32(self, dtype: torch.dtype) -> None:
        ramp = torch.arange(40.0).expand(1, 1, 40, 40)[..., None]
        gradients = []
        for data in (torch.float64, dtype):
            zeros = torch.zeros(1, 1, 40, 40, 1, dtype=data)
            bias = torch.zeros(1, 5, 5, dtype=data, requires_grad=True)
            output = neighborhood.neighborhood_attention(zeros, zeros, ramp.to(data), bias)
            gradients += torch.autograd.grad(output.sum(), bias)
        exact, got = gradients
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=0.01, atol=0.5)

    def test_double_backward_is_refused(self) -> None:
        inputs = [torch.randn(1, 1, 3, 3, 2, requires_grad=True) for _ in range(3)]
        output = neighborhood.neighborhood_attention(*inputs, torch.zeros(1, 5, 5))
        (grad,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_spatial_reduction_attention(size: tuple[int, int], ratio: int) -> None:
    module = randomize(SpatialReductionAttention(DIMS, HEADS, ratio))
    x = torch.randn(2, DIMS, *size, dtype=torch.float64)
    shape = [-(-length // ratio) * ratio for length in size]
    expected = []
    for image in x:
        small = image[None]
        if ratio > 1:
            conv = module.proj_ds[0]
            small = nn.functional.conv2d(
                filled(image, *shape)[None], conv.weight, conv.bias, stride=ratio
            )
            small = module.proj_ds[1](small)
        key, value = (
            t[0].flatten(1).t().unflatten(1, (HEADS, -1)) for t in module.kv(small).chunk(2, 1)
        )
        query = module.q(image[None])[0].permute(1, 2, 0).unflatten(-1, (HEADS, -1))
        bias = torch.zeros(HEADS, len(key), dtype=torch.float64)
        rows = [[attend(q, key, value, bias) for q in row] for row in query]
        attended = torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)
        expected.append(module.proj(attended[None])[0])
    torch.testing.assert_close(module(x), torch.stack(expected))


def test_mlps_agree_where_the_convolution_is_zero() -> None:
    conv, plain = randomize(ConvMLP(4, 12)), randomize(MLP(4, 12))
    plain.chunk.linear1.load_state_dict(
        {key: value.squeeze() for key, value in conv.linear1[0].state_dict().items()}
    )
    plain.chunk.linear2.load_state_dict(
        {key: value.squeeze() for key, value in conv.linear2[0].state_dict().items()}
    )
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    assert not torch.allclose(conv(x), plain(x))
    nn.init.zeros_(conv.dwc.weight)
    nn.init.zeros_(conv.dwc.bias)
    torch.testing.assert_close(conv(x), plain(x))
    # Before the activation, and as a residual.
    nn.init.constant_(conv.dwc.bias, 1.0)
    plain.chunk.linear1.bias.data += 1.0
    torch.testing.assert_close(conv(x), plain(x))
