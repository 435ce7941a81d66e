"""Tensors of more than 2**31 elements, and more than 65 535 of everything a grid may count."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdeform.ops import (
    dat_attn,
    dcnv3,
    deform_conv2d,
    deform_ps_roi_pool,
    deform_roi_pool,
    ms_deform_attn,
)

BF16 = torch.bfloat16
LIMIT = 2**31


def require_memory(device: str, gibibytes: float) -> None:
    """Skips where less memory is free."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free memory, {free / 2**30:.1f} are free")


def zeros(*size: int, device: str) -> Tensor:
    """More than 2**31 zeros in bf16; pages that nobody touches cost nothing."""
    tensor = torch.zeros(size, dtype=BF16, device=device)
    assert tensor.numel() > LIMIT
    return tensor


def gradients(output: Tensor, grad_output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return (output, *torch.autograd.grad(output, leaves, grad_output))


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.large
class TestMoreThan31Bits:
    """The part behind element 2**31 equals the same part computed alone."""

    def test_deform_conv2d_images(self, kernel_device: str) -> None:
        require_memory(kernel_device, 12)
        size = (129, 64, 512, 512)
        last = slice(128, None)
        input = zeros(*size, device=kernel_device)
        input[last] = torch.randn(size[1:], device=kernel_device)
        offset = 20 * torch.rand(129, 2, 8, 8, device=kernel_device)
        weight = torch.randn(4, 64, 1, 1, device=kernel_device).to(BF16)
        grad_output = torch.randn(129, 4, 8, 8, device=kernel_device).to(BF16)
        leaves = [input.requires_grad_(), offset.requires_grad_()]
        actual = gradients(deform_conv2d(input, offset, weight, stride=64), grad_output, *leaves)
        alone = [leaf.detach()[last].clone().requires_grad_() for leaf in leaves]
        expected = gradients(deform_conv2d(*alone, weight, stride=64), grad_output[last], *alone)
        assert all(tensor.abs().max() > 0.5 for tensor in expected)
        assert_equal(tuple(tensor[last] for tensor in actual), expected)

    def test_deform_conv2d_one_image(self, kernel_device: str) -> None:
        require_memory(kernel_device, 14)
        input = zeros(1, 2049, 1024, 1024, device=kernel_device)
        input[:, 2048:] = torch.randn(1024, 1024, device=kernel_device)
        offset = 20 * torch.rand(1, 2, 8, 8, device=kernel_device)
        weight = torch.ones(1, 2049, 1, 1, device=kernel_device, dtype=BF16)
        actual = deform_conv2d(input, offset, weight, stride=128)
        expected = deform_conv2d(input[:, 2048:], offset, weight[:, 2048:], stride=128)
        assert expected.abs().max() > 0.5
        assert_equal((actual,), (expected,))

    def test_deform_conv2d_offsets(self, kernel_device: str) -> None:
        require_memory(kernel_device, 8)
        input = torch.randn(1, 1, 2064, 2063, device=kernel_device).to(BF16)
        weight = torch.randn(1, 1, 16, 16, device=kernel_device).to(BF16)
        offset = zeros(1, 512, 2049, 2048, device=kernel_device)
        offset[:, :, 2048:] = 20 * torch.rand(512, 1, 2048, device=kernel_device)
        actual = deform_conv2d(input, offset, weight)
        # Offsets point down: the last row of outputs needs the last 16 rows of pixels alone.
        expected = deform_conv2d(input[:, :, 2048:], offset[:, :, 2048:], weight)
        assert expected.abs().max() > 0.5
        assert_equal((actual[:, :, 2048:],), (expected,))

    def test_dcnv3_images(self, kernel_device: str) -> None:
        require_memory(kernel_device, 12)
        last = slice(128, None)
        input = zeros(129, 512, 512, 64, device=kernel_device)
        input[last] = torch.randn(512, 512, 64, device=kernel_device)
        offset = 20 * torch.rand(129, 8, 8, 8, device=kernel_device)
        mask = torch.rand(129, 8, 8, 4, device=kernel_device)
        grad_output = torch.randn(129, 8, 8, 64, device=kernel_device).to(BF16)
        geometry = dict(kernel_size=1, stride=64, padding=0, groups=4)
        leaves = [tensor.requires_grad_() for tensor in (input, offset, mask)]
        actual = gradients(dcnv3(*leaves, **geometry), grad_output, *leaves)
        alone = [leaf.detach()[last].clone().requires_grad_() for leaf in leaves]
        expected = gradients(dcnv3(*alone, **geometry), grad_output[last], *alone)
        assert all(tensor.abs().max() > 0.5 for tensor in expected)
        assert_equal(tuple(tensor[last] for tensor in actual), expected)

    def test_dcnv3_one_image(self, kernel_device: str) -> None:
        """The last rows of pixels lie behind element 2**31."""
        require_memory(kernel_device, 14)
        input = zeros(1, 8200, 512, 512, device=kernel_device)
        input[:, 8192:] = torch.randn(8, 512, 512, device=kernel_device)
        offset = 7 * torch.rand(1, 1, 8, 8, device=kernel_device)
        far = offset.clone()
        far[..., 1::2] += 8192  # rows
        mask = torch.rand(1, 1, 8, 4, device=kernel_device)
        geometry = dict(kernel_size=1, stride=(8200, 64), padding=0, groups=4)
        grad_output = torch.randn(1, 1, 8, 512, device=kernel_device).to(BF16)
        leaves = [tensor.requires_grad_() for tensor in (input, far, mask)]
        actual = gradients(dcnv3(*leaves, **geometry), grad_output, *leaves)
        alone = [t.detach().clone().requires_grad_() for t in (input[:, 8192:], offset, mask)]
        expected = gradients(dcnv3(*alone, **geometry), grad_output, *alone)
        assert all(tensor.abs().max() > 0.5 for tensor in expected)
        output, grad_input, grad_offset, grad_mask = actual
        assert_equal((output, grad_input[:, 8192:], grad_offset, grad_mask), expected)

    def test_dcnv3_offsets(self, kernel_device: str) -> None:
        require_memory(kernel_device, 12)
        input = torch.randn(1, 2064, 2063, 1, device=kernel_device).to(BF16)
        offset = zeros(1, 2049, 2048, 512, device=kernel_device)
        mask = torch.zeros(1, 2049, 2048, 256, dtype=BF16, device=kernel_device)
        offset[:, 2048:] = 20 * torch.rand(1, 2048, 512, device=kernel_device)
        mask[:, 2048:] = torch.rand(1, 2048, 256, device=kernel_device)
        geometry = dict(kernel_size=16, padding=0)
        actual = dcnv3(input, offset, mask, **geometry)
        # Offsets point down: the last row of outputs needs the last 16 rows of pixels alone.
        parts = (input[:, 2048:], offset[:, 2048:], mask[:, 2048:])
        expected = dcnv3(*parts, **geometry)
        assert expected.abs().max() > 0.5
        assert_equal((actual[:, 2048:],), (expected,))
        assert not actual[:, :2048].any()

    def test_ms_deform_attn_images(self, kernel_device: str) -> None:
        require_memory(kernel_device, 12)
        last = slice(128, None)
        value = zeros(129, 4096, 8, 512, device=kernel_device)
        value[last] = torch.randn(4096, 8, 512, device=kernel_device)
        shapes = torch.tensor([[64, 64]], device=kernel_device)
        locations = torch.rand(129, 3, 8, 1, 4, 2, device=kernel_device)
        weights = torch.rand(129, 3, 8, 1, 4, device=kernel_device)
        grad_output = torch.randn(129, 3, 4096, device=kernel_device).to(BF16)
        leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
        output = ms_deform_attn(leaves[0], shapes, None, *leaves[1:])
        actual = gradients(output, grad_output, *leaves)
        alone = [leaf.detach()[last].clone().requires_grad_() for leaf in leaves]
        output = ms_deform_attn(alone[0], shapes, None, *alone[1:])
        expected = gradients(output, grad_output[last], *alone)
        assert all(tensor.abs().max() > 0.5 for tensor in expected)
        assert_equal(tuple(tensor[last] for tensor in actual), expected)

    def test_ms_deform_attn_one_image(self, kernel_device: str) -> None:
        """The second level begins at element 2**31."""
        require_memory(kernel_device, 12)
        start = 512 * 512
        value = zeros(1, start + 512, 8, 1024, device=kernel_device)
        value[:, start:] = torch.randn(512, 8, 1024, device=kernel_device)
        shapes = torch.tensor([[512, 512], [16, 32]], device=kernel_device)
        locations = torch.rand(1, 3, 8, 2, 4, 2, device=kernel_device)
        weights = torch.rand(1, 3, 8, 2, 4, device=kernel_device)
        grad_output = torch.randn(1, 3, 8192, device=kernel_device).to(BF16)
        leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
        output = ms_deform_attn(leaves[0], shapes, None, *leaves[1:])
        actual = gradients(output, grad_output, *leaves)
        parts = [value[:, start:], locations[:, :, :, 1:], weights[:, :, :, 1:]]
        alone = [part.detach().clone().requires_grad_() for part in parts]
        output = ms_deform_attn(alone[0], shapes[1:], None, *alone[1:])
        expected = gradients(output, grad_output, *alone)
        assert all(tensor.abs().max() > 0.5 for tensor in expected)
        output, grad_value, grad_locations, grad_weights = actual
        parts = (grad_value[:, start:], grad_locations[:, :, :, 1:], grad_weights[:, :, :, 1:])
        assert_equal((output, *parts), expected)

    def test_ms_deform_attn_locations(self, kernel_device: str) -> None:
        require_memory(kernel_device, 10)
        queries, last = 2**24 + 1000, slice(2**24, None)
        value = torch.randn(1, 6, 1, 1, device=kernel_device).to(BF16)
        shapes = torch.tensor([[2, 3]], device=kernel_device)
        locations = zeros(1, queries, 1, 1, 64, 2, device=kernel_device)
        weights = torch.zeros(1, queries, 1, 1, 64, dtype=BF16, device=kernel_device)
        locations[:, last] = torch.rand(1000, 1, 1, 64, 2, device=kernel_device)
        weights[:, last] = torch.rand(1000, 1, 1, 64, device=kernel_device)
        actual = ms_deform_attn(value, shapes, None, locations, weights)
        expected = ms_deform_attn(value, shapes, None, locations[:, last], weights[:, last])
        assert expected.abs().max() > 0.5
        assert_equal((actual[:, last],), (expected,))
        assert not actual[:, : 2**24].any()

    def test_dat_attn_queries(self, kernel_device: str) -> None:
        """The last image begins at element 2**31."""
        require_memory(kernel_device, 10)
        query = zeros(129, 8, 64, 256, 128, device=kernel_device)
        query[128] = torch.randn(8, 64, 256, 128, device=kernel_device)
        key, value = (torch.randn(129, 8, 64, 3, device=kernel_device).to(BF16) for _ in range(2))
        positions = torch.rand(129, 2, 3, 2, device=kernel_device)
        table = torch.randn(8, 5, 7, device=kernel_device)
        actual = dat_attn(query, key, value, positions, table)
        parts = [tensor[128:] for tensor in (query, key, value, positions)]
        expected = dat_attn(*parts, table)
        assert expected.abs().max() > 0.5
        assert_equal((actual[128:],), (expected,))

    def test_deform_roi_pool_images(self, kernel_device: str) -> None:
        """All RoIs lie in the last image, which begins at element 2**31."""
        require_memory(kernel_device, 12)
        input = zeros(129, 64, 512, 512, device=kernel_device)
        input[128] = torch.randn(64, 512, 512, device=kernel_device)
        corners = 450 * torch.rand(7, 2, device=kernel_device)
        rois = torch.cat([corners, corners + 60], 1)
        offset = torch.randn(7, 2, 3, 3, device=kernel_device).requires_grad_()
        grad_output = torch.randn(7, 64, 3, 3, device=kernel_device).to(BF16)

        def pool(image: int, input: Tensor) -> tuple[Tensor, ...]:
            indexed = torch.nn.functional.pad(rois, (1, 0), value=image)
            output = deform_roi_pool(input, indexed, offset, 3, sampling_ratio=2)
            return gradients(output, grad_output, input, offset)

        output, grad_input, grad_offset = pool(128, input.requires_grad_())
        expected = pool(0, input.detach()[128:].clone().requires_grad_())
        assert all(tensor.abs().max() > 0.5 for tensor in expected)
        assert_equal((output, grad_input[128:], grad_offset), expected)
        assert not grad_input[::16][:8].any()

    def test_deform_roi_pool_channels(self, kernel_device: str) -> None:
        require_memory(kernel_device, 16)
        input = zeros(1, 2049, 1024, 1024, device=kernel_device)
        input[:, 2048:] = 1 + torch.rand(1024, 1024, device=kernel_device)
        rois = torch.tensor([[0.0, 700, 900, 800, 1020]], device=kernel_device)
        actual = deform_roi_pool(input, rois, None, 7, sampling_ratio=2)
        expected = deform_roi_pool(input[:, 2048:], rois, None, 7, sampling_ratio=2)
        assert expected.abs().max() > 0.5
        assert_equal((actual[:, 2048:],), (expected,))
        assert not actual[:, :2048].any()

    def test_deform_ps_roi_pool_channels(self, kernel_device: str) -> None:
        """The last cell of the last class."""
        require_memory(kernel_device, 16)
        input = zeros(1, 513 * 4, 1024, 1024, device=kernel_device)
        input[:, -1] = 1 + torch.rand(1024, 1024, device=kernel_device)
        rois = torch.tensor([[0.0, 700, 900, 800, 1020]], device=kernel_device)
        actual = deform_ps_roi_pool(input, rois, None, 2, 1.0, 513, 2, 2, 4, 0.1)
        expected = deform_ps_roi_pool(input[:, -4:], rois, None, 2, 1.0, 1, 2, 2, 4, 0.1)
        assert expected.abs().max() > 0.5
        assert_equal((actual[:, 512:],), (expected,))
        assert not actual[:, :512].any()

    def test_deform_roi_pool_rois(self, kernel_device: str) -> None:
        require_memory(kernel_device, 10)
        count = 2**17
        input = torch.randn(1, 257, 3, 4, device=kernel_device).to(BF16)
        rois = torch.tensor([[0.0, -1, -2, 5, 6]], device=kernel_device).repeat(count, 1)
        rois[-9:, 1:] = torch.tensor([0.0, 1, 3, 3], device=kernel_device)
        actual = deform_roi_pool(input, rois, None, 8, sampling_ratio=1)
        assert actual.numel() > LIMIT
        expected = deform_roi_pool(input, rois[-10:], None, 8, sampling_ratio=1)
        assert expected.abs().max() > 0.5
        assert_equal((actual[-10:],), (expected,))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sharing out so little work takes longer than doing it, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
class TestMoreThan65535:
    """Grids of CUDA blocks count to 65 535 in two of three directions."""

    @pytest.mark.parametrize(
        ("size", "groups"),
        [((65_537, 1, 2, 1), 1), ((1, 65_537, 1, 2), 65_537), ((1, 1, 4097, 4099), 1),
         ((1, 1, 1, 65_537), 1), ((2, 1, 65_537, 1), 1)],
        ids=["images", "channels", "pixels", "columns", "rows"],
    )  # fmt: skip
    def test_deform_conv2d(self, size: tuple, groups: int, kernel_device: str) -> None:
        """A 1x1 kernel of ones that samples where it stands changes nothing."""
        input = torch.randn(size, device=kernel_device).requires_grad_()
        offset = torch.zeros(size[0], 2, *size[2:], device=kernel_device).requires_grad_()
        weight = torch.ones(size[1], 1, 1, 1, device=kernel_device).requires_grad_()
        output = deform_conv2d(input, offset, weight)
        assert torch.equal(output, input)
        grad_output = torch.randn(size, device=kernel_device)
        grad_input, grad_offset, grad_weight = torch.autograd.grad(
            output, (input, offset, weight), grad_output
        )
        assert torch.equal(grad_input, grad_output)
        product = (input * grad_output).detach()
        torch.testing.assert_close(
            grad_weight.flatten(), product.sum((0, 2, 3)), rtol=1e-3, atol=1e-2
        )
        right = torch.nn.functional.pad(input.detach(), (0, 1))[..., 1:] - input.detach()
        torch.testing.assert_close(
            grad_offset[:, 1], (right * grad_output).sum(1), rtol=1e-3, atol=1e-2
        )

    @pytest.mark.parametrize(
        ("size", "groups"),
        [((65_537, 1, 2, 1), 1), ((1, 1, 2, 65_537), 65_537), ((1, 1, 2, 65_537), 1),
         ((1, 1031, 1033, 1), 1), ((1, 1, 65_537, 1), 1), ((2, 65_537, 1, 1), 1)],
        ids=["images", "groups", "channels", "pixels", "columns", "rows"],
    )  # fmt: skip
    def test_dcnv3(self, size: tuple, groups: int, kernel_device: str) -> None:
        """A 1x1 kernel that samples where it stands weighs its pixel."""
        input = torch.randn(size, device=kernel_device).requires_grad_()
        offset = torch.zeros(*size[:3], 2 * groups, device=kernel_device).requires_grad_()
        mask = torch.rand(*size[:3], groups, device=kernel_device).requires_grad_()
        output = dcnv3(input, offset, mask, kernel_size=1, padding=0, groups=groups)
        expected = input * mask.repeat_interleave(size[3] // groups, 3)
        assert torch.equal(output, expected)
        grad_output = torch.randn(size, device=kernel_device)
        actual = torch.autograd.grad(output, (input, mask, offset), grad_output)
        wanted = torch.autograd.grad(expected, (input, mask), grad_output)
        for one, other in zip(actual, wanted, strict=False):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)
        right = torch.nn.functional.pad(input.detach(), (0, 0, 0, 1))[:, :, 1:] - input.detach()
        products = (right * grad_output).unflatten(3, (groups, -1)).sum(4) * mask
        torch.testing.assert_close(actual[2][..., ::2], products, rtol=1e-3, atol=1e-2)

    @pytest.mark.parametrize(
        ("images", "queries", "heads", "channels"),
        [(65_537, 1, 1, 2), (1, 1_100_000, 1, 1), (1, 1, 65_537, 2), (1, 1, 1, 65_537)],
        ids=["images", "queries", "heads", "channels"],
    )
    def test_ms_deform_attn(
        self, images: int, queries: int, heads: int, channels: int, kernel_device: str
    ) -> None:
        """Every query looks at the one pixel there is, with its own weight."""
        value = torch.randn(images, 1, heads, channels, device=kernel_device).requires_grad_()
        shapes = torch.tensor([[1, 1]], device=kernel_device)
        locations = torch.full((images, queries, heads, 1, 1, 2), 0.5, device=kernel_device)
        weights = torch.rand(images, queries, heads, 1, 1, device=kernel_device).requires_grad_()
        output = ms_deform_attn(value, shapes, None, locations, weights)
        expected = weights[:, :, :, 0] * value.flatten(1).unflatten(1, (1, heads, channels))
        assert torch.equal(output, expected.flatten(2))
        grad_output = torch.randn_like(output)
        actual = torch.autograd.grad(output, (value, weights), grad_output)
        wanted = torch.autograd.grad(expected.flatten(2), (value, weights), grad_output)
        for one, other in zip(actual, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)

    @pytest.mark.parametrize(
        ("images", "heads", "size", "keys", "cells"),
        [(65_537, 1, (1, 1), 1, (1, 1)), (1, 65_537, (1, 1), 1, (1, 1)),
         (1, 1, (65_537, 1), 2, (2, 1)), (1, 1, (1, 65_537), 2, (1, 2)),
         (1, 1, (1, 2), 65_537, (1, 2)), (1, 1, (1, 2), 2, (65_537, 1)),
         (1, 1, (2, 1), 2, (1, 65_537))],
        ids=["images", "heads", "rows", "columns", "keys", "table-rows", "table-columns"],
    )  # fmt: skip
    def test_dat_attn(
        self, images: int, heads: int, size: tuple, keys: int, cells: tuple, kernel_device: str
    ) -> None:
        # In fp64: in a table of 65 537 cells fp32 places are off by a thousandth of a cell.
        arguments = (
            torch.randn(images, heads, 2, *size),
            torch.randn(images, heads, 2, keys),
            torch.randn(images, heads, 2, keys),
            1.8 * torch.rand(images, heads, keys, 2) - 0.9,
            torch.randn(heads, *cells),
        )
        leaves = [tensor.to(kernel_device).double().requires_grad_() for tensor in arguments]
        output = dat_attn(*leaves)
        expected = dat_attn(*leaves, backend="reference")
        torch.testing.assert_close(output, expected)
        grad_output = torch.randn_like(output)
        actual = torch.autograd.grad(output, leaves, grad_output)
        wanted = torch.autograd.grad(expected, leaves, grad_output)
        for one, other in zip(actual, wanted, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize(
        ("images", "rois", "channels", "bins"),
        [(65_537, 65_537, 1, (1, 1)), (1, 1, 65_537, (1, 1)), (1, 2, 1, (65_537, 1)),
         (1, 2, 1, (1, 65_537))],
        ids=["rois", "channels", "rows-of-bins", "columns-of-bins"],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["deform_roi_pool", "deform_ps_roi_pool"])
    def test_roi_pool(
        self, name: str, images: int, rois: int, channels: int, bins: tuple, kernel_device: str
    ) -> None:
        """Every bin looks at the one pixel there is."""
        input = torch.randn(images, channels, 1, 1, device=kernel_device).requires_grad_()
        boxes = torch.zeros(rois, 5, device=kernel_device)
        boxes[:, 0] = torch.arange(rois, device=kernel_device) % images
        boxes[:, 3:] = 0 if name == "deform_ps_roi_pool" else 1
        if name == "deform_roi_pool":
            offset = torch.zeros(rois, 2, *bins, device=kernel_device).requires_grad_()
            output = deform_roi_pool(input, boxes, offset, bins, sampling_ratio=1)
        else:
            offset = torch.zeros(rois, 2, 1, 1, device=kernel_device).requires_grad_()
            output = deform_ps_roi_pool(input, boxes, offset, bins, 1.0, channels, 1, 1, 1, 0.1)
        assert torch.equal(output, input[boxes[:, 0].long()].expand_as(output))
        grad_output = torch.randn_like(output)
        grad_input, grad_offset = torch.autograd.grad(output, (input, offset), grad_output)
        expected = torch.zeros_like(input).index_add_(
            0, boxes[:, 0].long(), grad_output.sum((2, 3), keepdim=True)
        )
        torch.testing.assert_close(grad_input, expected, rtol=1e-3, atol=1e-2)
        assert not grad_offset.any()
