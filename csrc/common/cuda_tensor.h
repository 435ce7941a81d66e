// Host-side helpers on tensors for CUDA operators: layout, dtype dispatch, aten operators.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/cuda_device.cuh"
#include "common/dtypes.h"

namespace mmdeform {

using Shape = std::vector<int64_t>;

// Calls an aten operator whose arguments are given in full. Returns its results.
template <typename... Results, typename... Arguments>
std::tuple<Results...> call_aten(const char* name, const char* overload,
                                 const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), sizeof...(Results))> stack{
      torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::unbox_to_tuple<Results...>(stack.data());
}

inline Tensor permute(const Tensor& tensor, const Shape& dims) {
  return std::get<0>(call_aten<Tensor>("aten::permute", "", tensor, dims));
}

// out = a @ b for batches of matrices.
inline void bmm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  call_aten<Tensor>("aten::bmm", "out", a, b, out);
}

// The first elements of a flat buffer, seen as a tensor of this shape.
inline Tensor view_front(Tensor& buffer, const Shape& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return torch::stable::view(torch::stable::narrow(buffer, 0, 0, count), shape);
}

// At an address fit for 16-byte accesses.
inline Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  return address % kVectorBytes == 0 ? tensor : torch::stable::clone(tensor);
}

inline Tensor aligned_contiguous(const Tensor& tensor) {
  return aligned(torch::stable::contiguous(tensor));
}

// (A, B, H, W) with elements in the order (A, H, W, B).
inline Tensor aligned_channels_last(const Tensor& tensor) {
  return aligned(torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast));
}

// Elements of one vector access over rows of these lengths: 16 bytes, or 1 where a row does not
// consist of whole vectors.
inline int vector_length(const Tensor& tensor, std::initializer_list<int64_t> rows) {
  const auto length = static_cast<int64_t>(kVectorBytes / tensor.element_size());
  for (const int64_t row : rows) {
    if (row % length != 0) return 1;
  }
  return static_cast<int>(length);
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

}  // namespace mmdeform
