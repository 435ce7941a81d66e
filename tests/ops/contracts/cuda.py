"""What a CUDA kernel promises beyond right numbers; every test here needs a GPU."""

import pytest
import torch
from torch import Tensor

from .operator import TYPES, Arguments, Operator, assert_near


class CudaContract(Operator):
    # Not one mark on the class: classes that inherit it would get it for all their tests.

    def cuda_arguments(self, device: str, types: tuple = TYPES["fp32"]) -> tuple[Arguments, Tensor]:
        arguments = self.place(self.cases["asymmetric"].make(), types, device)
        return arguments, self.grad_output(arguments)

    def expected(self, arguments: Arguments, grad_output: Tensor) -> dict[str, Tensor]:
        fp64 = self.place(arguments, TYPES["fp64"])
        return self.run(self.reference, fp64, grad_output.double().cpu())

    @pytest.mark.cuda
    def test_current_stream(self, cuda: str) -> None:
        """Work on a side stream waits for what that stream still computes."""
        arguments, grad_output = self.cuda_arguments(cuda)
        expected = self.expected(arguments, grad_output)
        late = self.place(arguments, device=cuda)
        with torch.no_grad():
            for key in self.differentiable(late):
                late[key].zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            with torch.no_grad():
                for key in self.differentiable(late):
                    late[key].copy_(arguments[key])
            actual = self.run(self.call, late, grad_output)
        stream.synchronize()
        assert_near(actual, expected, torch.float32)

    @pytest.mark.cuda
    def test_graph_capture(self, types: tuple, cuda: str) -> None:
        arguments, grad_output = self.cuda_arguments(cuda, types)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(self.call, arguments, grad_output)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.run(self.call, arguments, grad_output)
        fresh = self.place(self.cases["asymmetric"].make(), types, cuda)
        with torch.no_grad():
            for key in self.differentiable(arguments):
                arguments[key].copy_(fresh[key])
        graph.replay()
        torch.cuda.synchronize()
        assert_near(captured, self.expected(fresh, grad_output), types[0])

    @pytest.mark.cuda
    def test_no_synchronisation(self, cuda: str) -> None:
        arguments, grad_output = self.cuda_arguments(cuda)
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = self.run(self.call, arguments, grad_output)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_near(actual, self.expected(arguments, grad_output), torch.float32)

    @pytest.mark.cuda
    def test_second_device(self, cuda: str) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        assert torch.cuda.current_device() == 0
        arguments, grad_output = self.cuda_arguments("cuda:1")
        actual = self.run(self.call, arguments, grad_output)
        assert all(tensor.device == torch.device("cuda:1") for tensor in actual.values())
        assert_near(actual, self.expected(arguments, grad_output), torch.float32)

    @pytest.mark.cuda
    def test_deterministic_backward(self, types: tuple, cuda: str, poisoned: None) -> None:
        arguments = self.place(self.contended(), types, cuda)
        grad_output = self.grad_output(arguments)
        first = self.run(self.call, arguments, grad_output)
        for _ in range(3):
            again = self.run(self.call, arguments, grad_output)
            for key, tensor in first.items():
                assert torch.equal(tensor, again[key]), key

    @pytest.mark.cuda
    def test_two_devices_are_refused(self, cuda: str) -> None:
        """Tensors on two devices are refused, not read."""
        arguments, _ = self.cuda_arguments(cuda)
        for key in self.differentiable(arguments)[1:]:
            mixed = {**arguments, key: arguments[key].detach().cpu()}
            with pytest.raises(ValueError, match=f"{key}: expected on cuda:0"):
                self.call(mixed)
