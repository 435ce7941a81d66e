// Host side of every CUDA kernel: device, stream, launch, registration.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

// Dispatch key under which the kernels register; the emulator's build registers them for the CPU.
#ifndef MMDEFORM_CUDA_DISPATCH_KEY
#define MMDEFORM_CUDA_DISPATCH_KEY CUDA
#endif

namespace mmdeform {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Makes the device of a tensor current for its lifetime and launches on its current stream.
class CudaLauncher {
 public:
  explicit CudaLauncher(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Launches `blocks` blocks in one dimension; none is legal and does nothing.
  template <typename... Parameters, typename... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                  size_t shared_bytes, const Arguments&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), name, ": expected at most ",
                    std::numeric_limits<int32_t>::max(), " thread blocks, got ", blocks);
    const dim3 grid(static_cast<unsigned>(blocks));
#ifdef __CUDACC__
    kernel<<<grid, threads, shared_bytes, stream_>>>(static_cast<Parameters>(arguments)...);
#else
    emulator::launch(name, grid, threads, shared_bytes, kernel, arguments...);
#endif
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace mmdeform
