"""Sampling of the keys of DAT: mmdeform.ops.dat_sample."""

import math

import pytest
import torch

from mmdeform.ops import dat_sample

from .contracts.operator import TYPES, off_integer_lines
from .dat import assert_close


class TestSample:
    """mmdeform.ops.dat_sample."""

    def arguments(self, types: str, device: str, size: tuple[int, int] = (5, 7)) -> tuple:
        data, coordinates = TYPES[types]
        pixels = off_integer_lines(2, 3, 11, 2, low=-2, high=max(size))
        extent = torch.tensor(size) - 1
        positions = torch.where(extent > 0, 2 * pixels / extent.clamp(min=1) - 1, 0.25)
        input = torch.randn(2, 6, *size, dtype=torch.float64)
        return input.to(device, data), positions.to(device, coordinates)

    @pytest.mark.parametrize("size", [(5, 7), (1, 7), (6, 1), (1, 1)], ids=str)
    @pytest.mark.parametrize("types", TYPES)
    def test_equals_grid_sample(self, types: str, size: tuple[int, int], device: str) -> None:
        arguments = self.arguments(types, device, size)
        results = []
        for backend in ("auto", "reference"):
            input, positions = (tensor.detach().requires_grad_() for tensor in arguments)
            samples = dat_sample(input, positions, backend)
            assert samples.shape == (2, 6, 11)
            assert samples.dtype == input.dtype
            assert samples.is_contiguous()
            weights = torch.linspace(-1, 1, 11, dtype=samples.dtype, device=device)
            grads = torch.autograd.grad((samples * weights).sum(), (input, positions))
            results.append(
                dict(zip(("output", "input", "positions"), (samples, *grads), strict=True))
            )
        # Positions of a 16-bit dtype may round to a pixel's edge, where gradients jump.
        if types in ("fp16", "bf16"):
            results = [{**result, "positions": torch.zeros(1)} for result in results]
        assert results[0]["output"].abs().max() > 0.5
        assert_close(*results, 20 * torch.finfo(TYPES[types][0]).eps)

    def test_groups_sample_their_own_channels(self, device: str) -> None:
        input, positions = self.arguments("fp64", device)
        together = dat_sample(input, positions)
        for group in range(3):
            own = slice(2 * group, 2 * group + 2)
            alone = dat_sample(input[:, own], positions[:, group : group + 1])
            torch.testing.assert_close(together[:, own], alone)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
    def test_bad_positions(self, bad: float, backend: str, device: str) -> None:
        for size in ((5, 7), (1, 1)):
            input, positions = self.arguments("fp32", device, size)
            expected = dat_sample(input, positions)
            positions[1, 2, 3, 0] = bad
            expected[1, 4:, 3] = 0
            positions.requires_grad_()
            output = dat_sample(input, positions, backend)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            output.sum().backward()
            assert positions.grad.isfinite().all()
            assert not positions.grad[1, 2, 3].any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_autocast(self, dtype: torch.dtype, device: str) -> None:
        input, positions = self.arguments("fp32", device)
        with torch.autocast(device, dtype):
            output = dat_sample(input, positions)
        assert torch.equal(output, dat_sample(input.to(dtype), positions))

    def test_compiles(self, device: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(dat_sample, backend="aot_eager", fullgraph=True, dynamic=True)
        for size in ((5, 7), (6, 9)):
            arguments = self.arguments("fp32", device, size)
            torch.testing.assert_close(compiled(*arguments), dat_sample(*arguments))

    @pytest.mark.parametrize(
        ("input", "positions", "message"),
        [
            ((6, 5, 7), (2, 3, 11, 2), r"input: expected shape \(B, C, H, W\), got \(6, 5, 7\)"),
            ((2, 6, 5, 7), (1, 3, 11, 2), r"positions: expected .*2, G, Ns, 2.* got \(1, 3, 11, 2"),
            ((2, 6, 5, 7), (2, 3, 11, 3), r"positions: expected .*2, G, Ns, 2.* got \(2, 3, 11, 3"),
            ((2, 6, 5, 7), (2, 4, 11, 2), r"positions: expected groups .* 6 channels .*, got 4"),
            ((2, 6, 5, 7), (2, 0, 11, 2), r"positions: expected groups .*, got 0"),
        ],
    )
    def test_refuses(self, input: tuple, positions: tuple, message: str) -> None:
        with pytest.raises(ValueError, match="^" + message):
            dat_sample(torch.zeros(input), torch.zeros(positions))

    def test_refuses_types(self) -> None:
        zeros = torch.zeros(1, 1, 2, 2)
        with pytest.raises(ValueError, match=r"positions: expected a floating.* got torch.int64"):
            dat_sample(zeros, zeros.long())
        with pytest.raises(ValueError, match=r"input: expected a floating.* got torch.int64"):
            dat_sample(zeros.long(), zeros)
        with pytest.raises(ValueError, match=r"positions: expected on cpu as input, got meta"):
            dat_sample(zeros, zeros.to("meta"))
        with pytest.raises(ValueError, match=r"backend: expected one of auto, .* got 'cpu'"):
            dat_sample(zeros, zeros, "cpu")
