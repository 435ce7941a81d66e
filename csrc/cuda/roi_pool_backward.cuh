// Backward kernels of RoI pooling.

#pragma once

#include "cuda/roi_pool_pixels.cuh"

namespace mmdeform {

// Outputs. G is the type of the gradients of offsets and mask.
template <typename A, typename G>
struct RoiPoolGradients {
  A* __restrict__ input;   // (images, H, W, C), zeroed; null: computed elsewhere
  G* __restrict__ offset;  // (R, K, 2, Ph, Pw): x, y; null: no offsets
  G* __restrict__ mask;    // (R, K, Ph, Pw); null: no mask
};

// A warp per item: a lane owns kVector channels at a time and adds up its share of the gradients
// of the bin's position and mask; they are summed over the lanes and stored once.
template <typename T, int kVector, typename Bins, typename G>
__global__ void __launch_bounds__(kRoiPoolThreads, 2)
    roi_pool_backward_kernel(const T* __restrict__ grad_output,  // (R, Ph, Pw, C)
                             const T* __restrict__ input,        // (images, H, W, C)
                             Bins bins, RoiPoolShape shape,
                             RoiPoolGradients<accumulation_t<T>, G> gradients) {
  using A = accumulation_t<T>;
  MMDEFORM_SHARED(RoiPoolScratch<A>, scratch, kRoiPoolWarps);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRoiPoolWarps + warp;
  if (item >= shape.items()) return;
  const RoiPoolIndex index = RoiPoolIndex::of_item(shape, item);
  const RoiPoolAxis<A> axis = bins.axis(shape, index, lane_has_rows());
  const A divisor_y = __shfl_sync(kFullMask, axis.divisor, kHalfWarp);
  const A divisor_x = __shfl_sync(kFullMask, axis.divisor, 0);
  const A scale = mean_scale(divisor_y, divisor_x, bins.mask(shape, index));
  const int channels = shape.class_channels();
  const int64_t first = static_cast<int64_t>(index.k) * channels;
  const int64_t image = bins.image(shape, index) * shape.H * shape.W * shape.C + first;
  const T* grad_row = grad_output + (index.roi * shape.bins() + index.bin) * shape.C + first;

  bool touched = false;
  A sum_value = 0, sum_x = 0, sum_y = 0;
  for (int first_channel = 0; first_channel < channels; first_channel += kWarpSize * kVector) {
    const int channel = first_channel + lane * kVector;
    const bool owns_channel = channel < channels;
    Vector<T, kVector> grad{};
    if (owns_channel) grad = load_vector<kVector>(grad_row + channel);
    RoiPoolPixels<A> pixels(axis, shape.W, scratch + warp);
    while (pixels.next()) {
      touched = true;
#pragma unroll 2
      for (int j = 0; j < pixels.count; ++j) {
        const int64_t pixel = __shfl_sync(kFullMask, pixels.own.index, j);
        const A value = __shfl_sync(kFullMask, pixels.own.value, j);
        const A slope_x = __shfl_sync(kFullMask, pixels.own.slope_x, j);
        const A slope_y = __shfl_sync(kFullMask, pixels.own.slope_y, j);
        const int64_t element = image + pixel * shape.C + channel;
        Vector<T, kVector> values{};
        if (owns_channel) values = load_vector<kVector>(input + element);
        const A weight = value * scale;
        A dot = 0, grad_pixel[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const A g = static_cast<A>(grad.data[i]);
          dot += g * static_cast<A>(values.data[i]);
          grad_pixel[i] = weight * g;
        }
        sum_value += value * dot;
        sum_x += slope_x * dot;
        sum_y += slope_y * dot;
        if (gradients.input != nullptr && owns_channel) {
          reduce_add(gradients.input + element, grad_pixel);
        }
      }
    }
  }
  sum_value = sum_over_lanes(sum_value, kWarpSize);
  sum_x = sum_over_lanes(sum_x, kWarpSize);
  sum_y = sum_over_lanes(sum_y, kWarpSize);
  // The first lane of each half stores the gradient of its axis. A RoI that is not finite must not
  // turn the gradient of a bin without samples into NaN.
  if (gradients.offset != nullptr && lane % kHalfWarp == 0) {
    const A gradient = touched ? axis.reach * scale * (lane_has_rows() ? sum_y : sum_x) : 0;
    const int64_t plane = 2 * (index.roi * shape.K + index.k) + (lane_has_rows() ? 1 : 0);
    gradients.offset[plane * shape.bins() + index.bin] = static_cast<G>(gradient);
  }
  if (gradients.mask != nullptr && lane == 0) {
    gradients.mask[item] = static_cast<G>(sum_value * mean_scale(divisor_y, divisor_x, A(1)));
  }
}

}  // namespace mmdeform
