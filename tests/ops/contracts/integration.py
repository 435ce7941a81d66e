"""Good citizens of torch: dtypes, autocast, fake tensors, opcheck, torch.compile, autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .operator import TYPES, Arguments, Case, Operator, assert_near

HALF_TYPES = [torch.float16, torch.bfloat16]
OPCHECK_TYPES = ["fp64", "fp32", "bf16-fp32"]


class IntegrationContract(Operator):
    def sized(self, size: int) -> Arguments:
        """The asymmetric case with another batch, image and output size for each ``size``."""
        raise NotImplementedError

    @pytest.mark.emulated
    @pytest.mark.parametrize(
        ("given", "used"),
        [("fp32-fp16", "fp32"), ("fp16-fp64", "fp16-fp32"), ("fp64-fp32", "fp64")],
    )
    def test_coordinates_are_promoted(self, given: str, used: str, device: str) -> None:
        names = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16}
        types = tuple(names[name] for name in given.split("-"))
        arguments = self.place(self.cases["asymmetric"].make(), types, device)
        promoted = self.place(arguments, TYPES[used], device)
        grad_output = self.grad_output(promoted)
        actual = self.run(self.call, arguments, grad_output)
        expected = self.run(self.call, promoted, grad_output)
        for key, tensor in expected.items():
            wanted = tensor if key == "output" else tensor.to(arguments[key].dtype)
            torch.testing.assert_close(actual[key], wanted, rtol=1e-6, atol=1e-6)

    @pytest.mark.emulated
    def test_one_coordinate_in_another_dtype(self, device: str) -> None:
        arguments = self.place(self.cases["asymmetric"].make(), TYPES["fp16-fp32"], device)
        for key in self.coordinates:
            mixed = {**arguments, key: arguments[key].detach().half()}
            same = {**mixed, key: mixed[key].float()}
            torch.testing.assert_close(self.call(mixed), self.call(same), rtol=0, atol=0)

    @pytest.mark.emulated
    @pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
    def test_autocast(self, dtype: torch.dtype, device: str) -> None:
        arguments = self.place(self.cases["asymmetric"].make(), TYPES["fp32"], device)
        with torch.autocast(device, dtype):
            output = self.call(arguments)
        assert output.dtype == dtype
        cast = self.place(arguments, (dtype, torch.float32), device)
        grad_output = self.grad_output(cast)
        expected = self.run(self.call, cast, grad_output)
        assert torch.equal(output, expected["output"])
        keys = self.differentiable(arguments)
        grads = torch.autograd.grad(output, [arguments[key] for key in keys], grad_output)
        for key, grad in zip(keys, grads, strict=True):
            assert grad.dtype == torch.float32, key
            torch.testing.assert_close(grad, expected[key].float(), rtol=1e-5, atol=1e-5)

    @pytest.mark.emulated
    def test_autocast_leaves_fp64_alone(self, device: str) -> None:
        arguments = self.place(self.cases["asymmetric"].make(), TYPES["fp64"], device)
        with torch.autocast(device, torch.bfloat16):
            output = self.call(arguments)
        assert torch.equal(output, self.call(arguments))

    def test_meta_tensors(self, case: Case, types: tuple) -> None:
        arguments = self.place(case.make(), types)
        output = self.call(arguments)
        meta = self.call(self.place(arguments, types, "meta"))
        assert (meta.shape, meta.dtype, meta.stride()) == (
            output.shape, output.dtype, output.stride()
        )  # fmt: skip

    @pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
    @pytest.mark.parametrize("dtypes", OPCHECK_TYPES)
    def test_opcheck(self, dtypes: str, requires_grad: bool, device: str) -> None:
        arguments = self.place(
            self.cases["asymmetric"].make(), TYPES[dtypes], device, requires_grad=requires_grad
        )
        torch.library.opcheck(self.schema.default, self.schema_arguments(arguments))

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("dtypes", OPCHECK_TYPES)
    def test_opcheck_backward(self, dtypes: str, deterministic: bool, device: str) -> None:
        arguments = self.place(
            self.cases["asymmetric"].make(), TYPES[dtypes], device, requires_grad=False
        )
        grad_output = self.grad_output(arguments)
        torch.library.opcheck(
            self.backward_schema.default,
            self.backward_arguments(grad_output, arguments, deterministic),
        )

    def test_opcheck_every_case(self, case: Case) -> None:
        arguments = self.place(case.make())
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            self.schema.default, self.schema_arguments(arguments), test_utils=utilities
        )
        grad_output = self.grad_output(arguments)
        arguments = self.place(arguments, requires_grad=False)
        torch.library.opcheck(
            self.backward_schema.default,
            self.backward_arguments(grad_output, arguments),
            test_utils=utilities,
        )

    def compiled_run(self, backend: Any, dynamic: bool, device: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(self.call, backend=backend, fullgraph=True, dynamic=dynamic)
        for size in (1, 2, 3) if dynamic else (1,):
            arguments = self.place(self.sized(size), TYPES["fp32"], device)
            grad_output = self.grad_output(arguments)
            expected = self.run(self.call, arguments, grad_output)
            # Other sizes must not compile again.
            with torch.compiler.set_stance("default" if size == 1 else "fail_on_recompile"):
                actual = self.run(compiled, arguments, grad_output)
            assert_near(actual, expected, torch.float32)

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compile(self, dynamic: bool, device: str) -> None:
        self.compiled_run("aot_eager", dynamic, device)

    @pytest.mark.slow
    def test_compile_with_inductor(self, device: str) -> None:
        self.compiled_run("inductor", True, device)

    def test_compile_under_autocast(self, device: str) -> None:
        torch._dynamo.reset()
        arguments = self.place(self.sized(1), TYPES["fp32"], device, requires_grad=False)
        compiled = torch.compile(self.call, backend="aot_eager", fullgraph=True)
        with torch.autocast(device, torch.bfloat16):
            expected = self.call(arguments)
            actual = compiled(arguments)
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant: bool, device: str) -> None:
        arguments = self.place(self.cases["asymmetric"].make(), TYPES["fp32"], device)
        grad_output = self.grad_output(arguments)

        def checkpointed(arguments: Arguments) -> Tensor:
            return checkpoint(lambda *_: self.call(arguments), *leaves, use_reentrant=reentrant)

        leaves = [arguments[key] for key in self.differentiable(arguments)]
        results = []
        for function in (self.call, checkpointed):
            function(arguments).backward(grad_output)
            results.append([leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected)

    @pytest.mark.emulated
    def test_double_backward_is_refused(self, device: str) -> None:
        arguments = self.place(self.cases["asymmetric"].make(), TYPES["fp64"], device)
        leaves = [arguments[key] for key in self.differentiable(arguments)]
        grads = torch.autograd.grad(self.call(arguments).square().sum(), leaves, create_graph=True)
        for grad, key in zip(grads, self.differentiable(arguments), strict=True):
            if key == "bias":  # a plain sum, computed outside the operator
                continue
            with pytest.raises(RuntimeError, match=f"{self.name}: double backward is not impl"):
                grad.sum().backward(retain_graph=True)
