// Backward kernels of multi-scale deformable attention.

#pragma once

#include "cuda/ms_deform_attn_points.cuh"
#include "cuda/segment_sum.cuh"

namespace mmdeform {

// Outputs; all contiguous.
template <typename A, typename C>
struct MsDeformAttnGradients {
  A* __restrict__ value;               // (N, S, M, Dh), zeroed; null: computed elsewhere
  C* __restrict__ sampling_locations;  // (N, Lq, M, L, P, 2)
  C* __restrict__ attention_weights;   // (N, Lq, M, L, P)
};

// Products of the output gradient with the four corners of a point over the channels of one lane.
// Adds the gradient of the corners to grad_image unless that is null.
template <int kVector, typename T, typename A>
__device__ __forceinline__ void multiply_corners(const T* image, A* grad_image,
                                                 int64_t token_stride,
                                                 const MsDeformAttnPoint<A>& point,
                                                 const Vector<T, kVector>& grad_output, A dot[4]) {
  Vector<T, kVector> corners[4];
  load_corners(image, token_stride, point.at, point.W, corners);
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
      reduce_add(grad_image + corner_pixel(point.at, point.W, k) * token_stride, grad_corner);
    }
  }
}

// Gradients of one point: of x, of y, of the attention weight.
template <typename A>
struct MsDeformAttnPointGradient {
  A x, y, weight;
};

template <int kLanes, typename A>
__device__ __forceinline__ MsDeformAttnPointGradient<A> sum_point_gradient(
    const MsDeformAttnPoint<A>& point, const A dot[4]) {
  A weight = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) weight += corner_weight(point.at, k) * dot[k];
  return {point.weight * sum_over_lanes(derivative_w(point.at, dot), kLanes),
          point.weight * sum_over_lanes(derivative_h(point.at, dot), kLanes),
          sum_over_lanes(weight, kLanes)};
}

template <typename A, typename C>
__device__ __forceinline__ void store_point_gradient(const MsDeformAttnGradients<A, C>& gradients,
                                                     const MsDeformAttnLevel& level, int64_t index,
                                                     bool contributes,
                                                     const MsDeformAttnPointGradient<A>& gradient) {
  const A zero = 0;
  const A location[2] = {contributes ? gradient.x * level.W : zero,
                         contributes ? gradient.y * level.H : zero};
  store_converted(gradients.sampling_locations + 2 * index, location);
  gradients.attention_weights[index] = static_cast<C>(contributes ? gradient.weight : zero);
}

// Lanes as in the forward kernel; each lane keeps and stores the gradient of the point it located.
// With fewer lanes than a warp the lanes cover a row at once, else they walk along it. Without the
// bound of two blocks per multiprocessor, sm_80 takes 198 registers for 16-bit types.
template <typename T, typename C, int kVector, int kLanes>
__global__ void __launch_bounds__(256, 2)
    ms_deform_attn_backward_kernel(const T* __restrict__ grad_output,  // (N, Lq, M, Dh)
                                   const T* __restrict__ value,        // (N, S, M, Dh)
                                   MsDeformAttnPoints<C> points, MsDeformAttnShape shape,
                                   MsDeformAttnGradients<accumulation_t<T>, C> gradients) {
  using A = accumulation_t<T>;
  constexpr bool kRowAtOnce = kLanes < kWarpSize;
  MMDEFORM_DYNAMIC_SHARED(MsDeformAttnLevel, levels);
  load_levels(points, shape, levels);
  const MsDeformAttnThread<kLanes> thread(shape);
  const int64_t token_stride = static_cast<int64_t>(shape.M) * shape.Dh;
  const int first_channel = thread.lane * kVector;
  const int end_channel = thread.active ? shape.Dh : 0;
  const T* grad_row = grad_output + thread.row * shape.Dh;
  Vector<T, kVector> grad{};
  if (kRowAtOnce && first_channel < end_channel) {
    grad = load_vector<kVector>(grad_row + first_channel);
  }

  for (int base = 0; base < shape.points(); base += kLanes) {
    const bool owns_point = thread.active && base + thread.lane < shape.points();
    MsDeformAttnPoint<A> own{};
    if (owns_point) own = load_point<A>(points, shape, levels, thread.row, base + thread.lane);
    MsDeformAttnPointGradient<A> own_gradient{};
    const int count = min(kLanes, shape.points() - base);
    for (int j = 0; j < count; ++j) {
      const MsDeformAttnPoint<A> point = broadcast<kLanes>(own, j);
      A dot[4] = {};
      for (int channel = first_channel; channel < end_channel; channel += kLanes * kVector) {
        if (!kRowAtOnce) grad = load_vector<kVector>(grad_row + channel);
        const int64_t offset = thread.first + channel;
        A* grad_image = gradients.value == nullptr ? nullptr : gradients.value + offset;
        multiply_corners(value + offset, grad_image, token_stride, point, grad, dot);
      }
      const auto gradient = sum_point_gradient<kLanes>(point, dot);
      if (thread.lane == j) own_gradient = gradient;
    }
    if (owns_point) {
      store_point_gradient(gradients, levels[(base + thread.lane) / shape.P],
                           thread.row * shape.points() + base + thread.lane, own.at.corners != 0,
                           own_gradient);
    }
  }
}

// Destination and weight of each corner of rows first_row..first_row + rows, for segment_sum.cuh:
// entry 4 * (row * points + point) + k.
template <typename A, typename C>
__global__ void __launch_bounds__(256)
    ms_deform_attn_entries_kernel(MsDeformAttnPoints<C> points, MsDeformAttnShape shape,
                                  int64_t first_row, int64_t rows, int64_t* __restrict__ keys,
                                  A* __restrict__ weights) {
  MMDEFORM_DYNAMIC_SHARED(MsDeformAttnLevel, levels);
  load_levels(points, shape, levels);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= rows * shape.points()) return;
  const int64_t row = first_row + divide(index, shape.points());
  const int64_t query = divide(row, shape.M);
  const int64_t first_token = divide(query, shape.Lq) * shape.S;
  const int point_index = static_cast<int>(index - (row - first_row) * shape.points());
  const auto point = load_point<A>(points, shape, levels, row, point_index);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t token = first_token + corner_pixel(point.at, point.W, k);
    keys[4 * index + k] =
        has_corner(point.at, k) ? token * shape.M + (row - query * shape.M) : kNoSegment;
    weights[4 * index + k] = point.weight * corner_weight(point.at, k);
  }
}

// The row that an entry adds to its destination.
template <typename T>
struct MsDeformAttnEntrySource {
  const T* __restrict__ grad_output;  // at the first row of the entries
  int entries_per_row;
  int Dh;

  __device__ __forceinline__ const T* operator()(int64_t entry, int channel) const {
    return grad_output + divide(entry, entries_per_row) * Dh + channel;
  }
};

}  // namespace mmdeform
