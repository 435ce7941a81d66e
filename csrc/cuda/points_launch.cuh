// Host side of the kernels on sampled points.

#pragma once

#include <algorithm>

#include "common/cuda_launch.h"
#include "common/cuda_tensor.h"
#include "cuda/points_backward.cuh"
#include "cuda/points_forward.cuh"
#include "cuda/segment_sum.cuh"

namespace mmdeform {

constexpr int kPointsThreads = 256;

// Calls function(Constant<vector length>, Constant<lanes per row>). 32 lanes serve rows of any
// length, fewer lanes rows of at most one vector each.
template <typename T, typename Function>
void dispatch_row(const Tensor& value, int channels, const Function& function) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  if (vector_length(value, {channels}) != kVector) return function(Constant<1>(), Constant<32>());
  if (channels <= 2 * kVector) return function(Constant<kVector>(), Constant<2>());
  if (channels <= 4 * kVector) return function(Constant<kVector>(), Constant<4>());
  if (channels <= 8 * kVector) return function(Constant<kVector>(), Constant<8>());
  if (channels <= 16 * kVector) return function(Constant<kVector>(), Constant<16>());
  return function(Constant<kVector>(), Constant<32>());
}

// All tensors are contiguous; value is aligned to vectors.
template <typename T, typename Source>
void points_forward(const CudaLauncher& launch, const Tensor& value, const Source& source,
                    const Tensor& output) {
  dispatch_row<T>(value, source.shape.channels, [&](auto vector, auto lanes) {
    launch("points_forward_kernel",
           points_forward_kernel<T, Source, decltype(vector)::value, decltype(lanes)::value>,
           ceil_div(source.shape.rows() * lanes, kPointsThreads), kPointsThreads,
           source.shared_bytes(), data_of<T>(value), source, mutable_data_of<T>(output));
  });
}

// Adds the gradient of the value in a fixed order, a bounded number of rows at a time.
template <typename T, int kVector, typename Source>
void add_grad_value_sorted(const CudaLauncher& launch, const Tensor& grad_output,
                           const Source& source, const Tensor& grad_value) {
  using A = accumulation_t<T>;
  const PointsShape& shape = source.shape;
  const int64_t entries_per_row = 4 * static_cast<int64_t>(shape.points);
  if (entries_per_row == 0) return;
  const int64_t step = std::max<int64_t>(kMaxSortedEntries / entries_per_row, 1);
  for (int64_t row = 0; row < shape.rows(); row += step) {
    const int64_t rows = std::min(step, shape.rows() - row);
    const Tensor keys = new_empty(grad_value, {rows * entries_per_row}, ScalarType::Long);
    const Tensor weights =
        new_empty(grad_value, {rows * entries_per_row}, grad_value.scalar_type());
    launch("points_entries_kernel", points_entries_kernel<A, Source>,
           ceil_div(rows * shape.points, kPointsThreads), kPointsThreads, source.shared_bytes(),
           source, row, rows, mutable_data_of<int64_t>(keys), mutable_data_of<A>(weights));
    const PointsEntrySource<T> rows_of_gradient{data_of<T>(grad_output) + row * shape.channels,
                                                static_cast<int>(entries_per_row), shape.channels};
    segment_sum<A, kVector>(launch, keys, weights, shape.channels, rows_of_gradient,
                            mutable_data_of<A>(grad_value));
  }
}

// grad_value holds zeros in the accumulation dtype. All tensors are contiguous; grad_output and
// value are aligned to vectors.
template <typename T, typename Source>
void points_backward(const CudaLauncher& launch, const Tensor& grad_output, const Tensor& value,
                     const Source& source, bool deterministic, const Tensor& grad_value,
                     const PointGradients<typename Source::Coordinate>& gradients) {
  using A = accumulation_t<T>;
  dispatch_row<T>(value, source.shape.channels, [&](auto vector, auto lanes) {
    constexpr int kVector = decltype(vector)::value;
    if (deterministic) add_grad_value_sorted<T, kVector>(launch, grad_output, source, grad_value);
    launch("points_backward_kernel",
           points_backward_kernel<T, Source, kVector, decltype(lanes)::value>,
           ceil_div(source.shape.rows() * lanes, kPointsThreads), kPointsThreads,
           source.shared_bytes(), data_of<T>(grad_output), data_of<T>(value), source,
           deterministic ? nullptr : mutable_data_of<A>(grad_value), gradients);
  });
}

}  // namespace mmdeform
