// Backward kernels of deformable convolution.

#pragma once

#include "cuda/deform_conv2d_columns.cuh"
#include "cuda/segment_sum.cuh"

namespace mmdeform {

// Outputs.
template <typename A, typename C>
struct DeformConv2dGradients {
  A* __restrict__ input;   // (N, H, W, C), zeroed; null: computed elsewhere
  C* __restrict__ offset;  // (N, D, T, 2, Ho, Wo)
  C* __restrict__ mask;    // (N, D, T, Ho, Wo); null: no mask
};

// Gradients of one point.
template <typename A>
struct DeformConv2dPointGradient {
  A h, w, mask;
};

// Works on kVector channels of a sample: turns the gradient of its columns into the columns, adds
// the gradient of the input and the products of the gradient with the four corners.
template <int kVector, typename T, typename A>
__device__ __forceinline__ void backward_channels(const T* image, A* grad_image, int stride,
                                                  const DeformConv2dSample<A>& sample, int W,
                                                  T* column, A dot[4]) {
  Vector<T, kVector> corners[4];
  const Vector<T, kVector> grad_column = load_vector<kVector>(column);
  load_corners(image, stride, sample.at, W, corners);
  A value[kVector] = {};
  blend_corners(corners, sample.at, value);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A weight = corner_weight(sample.at, k) * sample.mask;
    A grad_corner[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const A grad = static_cast<A>(grad_column.data[i]);
      dot[k] += grad * static_cast<A>(corners[k].data[i]);
      grad_corner[i] = weight * grad;
    }
    if (grad_image != nullptr && has_corner(sample.at, k)) {
      reduce_add(grad_image + static_cast<int64_t>(stride) * corner_pixel(sample.at, W, k),
                 grad_corner);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) value[i] *= sample.mask;
  store_converted(column, value);
}

template <typename A>
__device__ __forceinline__ DeformConv2dPointGradient<A> sum_sample_gradient(
    const DeformConv2dSample<A>& sample, const A dot[4], int lanes) {
  A mask = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) mask += corner_weight(sample.at, k) * dot[k];
  const A h = sum_over_lanes(derivative_h(sample.at, dot), lanes);
  const A w = sum_over_lanes(derivative_w(sample.at, dot), lanes);
  mask = sum_over_lanes(mask, lanes);
  // A mask that is not finite must not turn the gradient of a point outside into NaN.
  if (sample.at.corners == 0) return {0, 0, 0};
  return {sample.mask * h, sample.mask * w, mask};
}

// Lanes as in the forward kernel. Gradients of the block's points are gathered in shared memory and
// stored together, neighbours side by side.
template <typename T, typename C, int kVector>
__global__ void __launch_bounds__(kDeformConv2dThreads, 2) deform_conv2d_backward_kernel(
    const T* __restrict__ input,  // (N, H, W, C)
    DeformConv2dOffsets<C> offsets, DeformConv2dShape shape, DeformConv2dTile tile, int lanes,
    T* __restrict__ columns,  // in: their gradient; (G, count, T, C/G)
    DeformConv2dGradients<accumulation_t<T>, C> gradients) {
  using A = accumulation_t<T>;
  MMDEFORM_SHARED(DeformConv2dSample<A>, samples, kDeformConv2dPoints);
  MMDEFORM_SHARED(DeformConv2dPointGradient<A>, results, kDeformConv2dPoints);
  load_samples(shape, tile, offsets, samples);
  const int lane = threadIdx.x % lanes;
  for (int s = threadIdx.x / lanes; s < kDeformConv2dPoints; s += kDeformConv2dThreads / lanes) {
    const DeformConv2dSample<A> sample = samples[s];
    const int channels = sample.row < 0 ? 0 : shape.channels_per_deform_group();
    A dot[4] = {};
    for (int c = lane * kVector; c < channels; c += lanes * kVector) {
      const int channel = sample.first_channel + c;
      const int64_t offset = sample.first_pixel * shape.C + channel;
      backward_channels<kVector>(
          input + offset, gradients.input == nullptr ? nullptr : gradients.input + offset, shape.C,
          sample, shape.W, columns + column_index(shape, tile, sample, channel), dot);
    }
    const auto gradient = sum_sample_gradient(sample, dot, lanes);
    if (lane == 0) results[s] = gradient;
  }
  __syncthreads();
  const int64_t point = static_cast<int64_t>(blockIdx.x) * kDeformConv2dPoints + threadIdx.x;
  if (threadIdx.x >= kDeformConv2dPoints || point >= tile.points(shape)) return;
  const DeformConv2dPointIndex index(shape, tile, point);
  const DeformConv2dPointGradient<A> gradient = results[threadIdx.x];
  gradients.offset[index.offset_index] = static_cast<C>(gradient.h);
  gradients.offset[index.offset_index + shape.Ho * shape.Wo] = static_cast<C>(gradient.w);
  if (gradients.mask != nullptr) gradients.mask[index.mask_index] = static_cast<C>(gradient.mask);
}

// sum += addend
template <typename T, typename A>
__global__ void __launch_bounds__(kDeformConv2dThreads)
    accumulate_kernel(const T* __restrict__ addend, int64_t count, A* __restrict__ sum) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) sum[i] += static_cast<A>(addend[i]);
}

// Destination and weight of each corner of a tile's points, for segment_sum.cuh: entry
// 4 * point + k adds to row key of the gradient of the input, seen as (N * H * W * D, C / D).
template <typename A, typename C>
__global__ void __launch_bounds__(kDeformConv2dThreads)
    deform_conv2d_entries_kernel(DeformConv2dOffsets<C> offsets, DeformConv2dShape shape,
                                 DeformConv2dTile tile, int64_t* __restrict__ keys,
                                 A* __restrict__ weights) {
  const int64_t point = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (point >= tile.points(shape)) return;
  const DeformConv2dPointIndex index(shape, tile, point);
  const auto sample = load_sample<A>(shape, tile, offsets, index);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t pixel = sample.first_pixel + corner_pixel(sample.at, shape.W, k);
    keys[4 * point + k] =
        has_corner(sample.at, k) ? pixel * shape.D + index.deform_group : kNoSegment;
    weights[4 * point + k] = corner_weight(sample.at, k) * sample.mask;
  }
}

// The part of the columns' gradient that an entry adds to its destination.
template <typename T>
struct DeformConv2dEntrySource {
  const T* __restrict__ grad_columns;
  DeformConv2dShape shape;
  DeformConv2dTile tile;

  __device__ __forceinline__ const T* operator()(int64_t entry, int channel) const {
    const int64_t point = entry / 4;
    const int group_and_tap = static_cast<int>(divide(point, tile.count));
    const int pixel = static_cast<int>(point - static_cast<int64_t>(group_and_tap) * tile.count);
    const int deform_group = group_and_tap / shape.taps();
    const int tap = group_and_tap - deform_group * shape.taps();
    DeformConv2dSample<accumulation_t<T>> sample{};
    sample.row = (static_cast<int64_t>(pixel) * shape.taps() + tap) * shape.channels_per_group();
    channel += deform_group * shape.channels_per_deform_group();
    return grad_columns + column_index(shape, tile, sample, channel);
  }
};

}  // namespace mmdeform
