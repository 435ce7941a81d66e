// Backward kernels of weighted sums of sampled points.

#pragma once

#include "cuda/points.cuh"
#include "cuda/segment_sum.cuh"

namespace mmdeform {

// Products of the output gradient with the four corners of a point over the channels of one lane.
// Adds the gradient of the corners to grad_image unless that is null.
template <int kVector, typename T, typename A>
__device__ __forceinline__ void multiply_corners(const T* image, A* grad_image, int pixel_stride,
                                                 const WeightedPoint<A>& point,
                                                 const Vector<T, kVector>& grad_output, A dot[4]) {
  Vector<T, kVector> corners[4];
  load_corners(image, pixel_stride, point.at, point.W, corners);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A weight = point.weight * corner_weight(point.at, k);
    A grad_corner[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const A grad = static_cast<A>(grad_output.data[i]);
      dot[k] += grad * static_cast<A>(corners[k].data[i]);
      grad_corner[i] = weight * grad;
    }
    if (grad_image != nullptr && has_corner(point.at, k)) {
      reduce_add(corner_address(grad_image, pixel_stride, point.at, point.W, k), grad_corner);
    }
  }
}

template <int kLanes, typename A>
__device__ __forceinline__ PointGradient<A> sum_point_gradient(const WeightedPoint<A>& point,
                                                               const A dot[4]) {
  A weight = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) weight += corner_weight(point.at, k) * dot[k];
  return {point.weight * sum_over_lanes(derivative_w(point.at, dot), kLanes),
          point.weight * sum_over_lanes(derivative_h(point.at, dot), kLanes),
          sum_over_lanes(weight, kLanes)};
}

// Lanes as in the forward kernel; each lane keeps and stores the gradient of the point it located.
// With fewer lanes than a warp the lanes cover a row at once, else they walk along it. Without the
// bound of two blocks per multiprocessor, sm_80 takes 198 registers for 16-bit types.
template <typename T, typename Source, int kVector, int kLanes>
__global__ void __launch_bounds__(256, 2) points_backward_kernel(
    const T* __restrict__ grad_output, const T* __restrict__ value, Source source,
    accumulation_t<T>* __restrict__ grad_value,  // zeroed; null: computed elsewhere
    PointGradients<typename Source::Coordinate> gradients) {
  using A = accumulation_t<T>;
  constexpr bool kRowAtOnce = kLanes < kWarpSize;
  MMDEFORM_DYNAMIC_SHARED(typename Source::Shared, shared);
  source.prepare(shared);
  const PointsShape& shape = source.shape;
  const RowThread<kLanes> thread(shape);
  const auto row = source.row(thread.index, shared);
  const int pixel_stride = shape.groups * shape.channels;
  const int first_channel = thread.lane * kVector;
  const int end_channel = thread.active ? shape.channels : 0;
  const T* grad_row = grad_output + thread.index.row * shape.channels;
  Vector<T, kVector> grad{};
  if (kRowAtOnce && first_channel < end_channel) {
    grad = load_vector<kVector>(grad_row + first_channel);
  }

  for (int base = 0; base < shape.points; base += kLanes) {
    const bool owns_point = thread.active && base + thread.lane < shape.points;
    WeightedPoint<A> own{};
    if (owns_point) own = source.load(row, base + thread.lane);
    PointGradient<A> own_gradient{};
    const int count = min(kLanes, shape.points - base);
    for (int j = 0; j < count; ++j) {
      const WeightedPoint<A> point = broadcast<kLanes>(own, j);
      A dot[4] = {};
      for (int channel = first_channel; channel < end_channel; channel += kLanes * kVector) {
        if (!kRowAtOnce) grad = load_vector<kVector>(grad_row + channel);
        const int64_t offset = thread.first + channel;
        A* grad_image = grad_value == nullptr ? nullptr : grad_value + offset;
        multiply_corners(value + offset, grad_image, pixel_stride, point, grad, dot);
        if (kRowAtOnce) break;
      }
      const auto gradient = sum_point_gradient<kLanes>(point, dot);
      if (thread.lane == j) own_gradient = gradient;
    }
    if (owns_point) {
      // A weight that is not finite must not turn the gradient of a point outside into NaN.
      if (own.at.corners == 0) own_gradient = {};
      source.store(gradients, row, base + thread.lane, own_gradient);
    }
  }
}

// Destination and weight of each corner of rows first_row..first_row + rows, for segment_sum.cuh:
// entry 4 * (row * points + point) + k.
template <typename A, typename Source>
__global__ void __launch_bounds__(256)
    points_entries_kernel(Source source, int64_t first_row, int64_t rows,
                          int64_t* __restrict__ keys, A* __restrict__ weights) {
  MMDEFORM_DYNAMIC_SHARED(typename Source::Shared, shared);
  source.prepare(shared);
  const PointsShape& shape = source.shape;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= rows * shape.points) return;
  const int64_t row = divide(index, shape.points);
  const RowIndex row_index(shape, first_row + row);
  const auto point =
      source.load(source.row(row_index, shared), static_cast<int>(index - row * shape.points));
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t pixel = row_index.image * shape.pixels + corner_pixel(point.at, point.W, k);
    keys[4 * index + k] =
        has_corner(point.at, k) ? pixel * shape.groups + row_index.group : kNoSegment;
    weights[4 * index + k] = point.weight * corner_weight(point.at, k);
  }
}

// The row that an entry adds to its destination.
template <typename T>
struct PointsEntrySource {
  const T* __restrict__ grad_output;  // at the first row of the entries
  int entries_per_row;
  int channels;

  __device__ __forceinline__ const T* operator()(int64_t entry, int channel) const {
    return grad_output + divide(entry, entries_per_row) * channels + channel;
  }
};

}  // namespace mmdeform
