"""Right numbers: every dtype, every gradient, every memory layout, every time."""

import pytest
import torch
from torch import Tensor

from .operator import TYPES, Arguments, Case, Operator, assert_near, layouts


class _Mutated(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


class NumericsContract(Operator):
    def check(self, arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
        """Compares output and gradients with the fp64 reference; returns the expected ones."""
        grad_output = self.grad_output(arguments)
        actual = self.run(self.call, arguments, grad_output)
        for key, tensor in actual.items():
            assert tensor.is_contiguous(), key
            assert tensor.dtype == (dtype if key == "output" else arguments[key].dtype), key
        fp64 = self.place(arguments, TYPES["fp64"])
        expected = self.run(self.reference, fp64, grad_output.double().cpu())
        assert_near(actual, expected, dtype)
        return expected

    def test_matches_fp64_reference(self, case: Case, types: tuple, device: str) -> None:
        arguments = self.place(case.make(), types, device)
        expected = self.check(arguments, types[0])
        if expected["output"].numel():
            for key, tensor in expected.items():
                # A gradient of zeros would be noticed: it is further away than any tolerance.
                assert tensor.abs().max() > 0.1, key

    @pytest.mark.usefixtures("poisoned")
    def test_every_element_is_written(self, case: Case, device: str) -> None:
        self.check(self.place(case.make(), TYPES["fp32"], device), torch.float32)

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.usefixtures("poisoned")
    def test_backward_writes_every_element(
        self, case: Case, deterministic: bool, device: str
    ) -> None:
        arguments = self.place(case.make(), TYPES["fp32"], device)
        grad_output = self.grad_output(arguments)
        with torch.no_grad():
            grads = self.backward_schema(
                *self.backward_arguments(grad_output, arguments, deterministic)
            )
        fp64 = self.place(arguments, TYPES["fp64"])
        expected = self.run(self.reference, fp64, grad_output.double().cpu())
        returned = dict(zip(self.backward_returns, grads, strict=True))
        present = [key for key in self.backward_returns if arguments[key] is not None]
        assert_near(
            {key: returned[key] for key in present},
            {key: expected[key] for key in present},
            torch.float32,
        )
        for key in set(returned) - set(present):
            assert returned[key].shape == (0,)

    @pytest.mark.emulated
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "channels_last"])
    @pytest.mark.parametrize("dtype", ["fp32", "bf16-fp32"])
    def test_any_memory_layout(self, layout: str, dtype: str, device: str) -> None:
        arguments = self.place(self.cases["asymmetric"].make(), TYPES[dtype], device)
        grad_output = self.grad_output(arguments)
        strided = dict(arguments)
        for key, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                laid_out = layouts(value.detach()).get(layout, value.detach())
                strided[key] = laid_out.requires_grad_()
        strided_grad = layouts(grad_output).get(layout, grad_output)
        assert any(not value.is_contiguous() for value in self.tensors(strided))
        actual = self.run(self.call, strided, strided_grad)
        assert all(tensor.is_contiguous() for tensor in actual.values())
        fp64 = self.place(arguments, TYPES["fp64"])
        expected = self.run(self.reference, fp64, grad_output.double().cpu())
        assert_near(actual, expected, TYPES[dtype][0])

    @pytest.mark.emulated
    def test_expanded_arguments(self, argument: str, device: str) -> None:
        """One argument at a time has stride 0 along its first axis, and so has grad_output."""
        arguments = self.place(self.cases["asymmetric"].make(), TYPES["fp32"], device)
        first = arguments[argument].detach()[:1]
        expanded = {**arguments, argument: first.expand_as(arguments[argument]).requires_grad_()}
        assert not expanded[argument].is_contiguous()
        grad_output = torch.ones((), device=device).expand_as(self.call(arguments))
        fp64 = self.place(expanded, TYPES["fp64"])
        expected = self.run(self.reference, fp64, grad_output.double().cpu())
        assert_near(self.run(self.call, expanded, grad_output), expected, torch.float32)

    def gradient_check(self, argument: str, device: str, factor: float = 1) -> bool:
        arguments = self.place(
            self.cases["tiny"].make(), TYPES["fp64"], device, requires_grad=False
        )
        tensor = arguments.pop(argument).requires_grad_()

        def function(value: Tensor) -> Tensor:
            return self.call({**arguments, argument: _Mutated.apply(value, factor)})

        return torch.autograd.gradcheck(
            function,
            tensor,
            atol=1e-6,
            rtol=1e-5,
            nondet_tol=0 if device == "cpu" else 1e-10,
            raise_exception=False,
        )

    @pytest.mark.emulated
    def test_gradcheck(self, argument: str, device: str) -> None:
        assert self.gradient_check(argument, device)

    @pytest.mark.parametrize("factor", [0, 0.999], ids=["zero", "scaled"])
    def test_gradcheck_notices_a_wrong_gradient(
        self, argument: str, factor: float, device: str
    ) -> None:
        assert not self.gradient_check(argument, device, factor)

    @pytest.mark.emulated
    def test_one_gradient_alone(self, argument: str, device: str) -> None:
        """Only one argument requires a gradient, the others get none."""
        arguments = self.place(self.cases["asymmetric"].make(), TYPES["fp32"], device)
        grad_output = self.grad_output(arguments)
        together = self.run(self.call, arguments, grad_output)
        alone = self.place(arguments, TYPES["fp32"], device, requires_grad=False)
        alone[argument].requires_grad_()
        self.call(alone).backward(grad_output)
        torch.testing.assert_close(alone[argument].grad, together[argument])
        others = {key: value for key, value in alone.items() if key != argument}
        assert all(tensor.grad is None for tensor in self.tensors(others))

    def test_backward_is_repeatable(self, types: tuple, threads: int) -> None:
        """On the CPU always bitwise, whatever the number of threads."""
        arguments = self.place(self.contended(), types)
        grad_output = self.grad_output(arguments)
        first = self.run(self.call, arguments, grad_output)
        for _ in range(3):
            again = self.run(self.call, arguments, grad_output)
            for key, tensor in first.items():
                assert torch.equal(tensor, again[key]), key

    def contended(self) -> Arguments:
        """Arguments in which many samples fall on the same pixels, enough work for two threads."""
        raise NotImplementedError

    @staticmethod
    def tensors(arguments: Arguments) -> list[Tensor]:
        return [value for value in arguments.values() if isinstance(value, Tensor)]
