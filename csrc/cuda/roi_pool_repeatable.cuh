// The gradient of the input of RoI pooling in a fixed order: each pixel has one owner that adds up
// what all bins give it. Sorting contributions (segment_sum.cuh) is no choice here: where the
// number of samples depends on the RoIs, their number is known on the device alone.

#pragma once

#include "cuda/roi_pool_pixels.cuh"

namespace mmdeform {

// The pixels that an item may touch.
struct RoiPoolBox {
  int image;
  int first_row, rows, first_column, columns;
};

template <typename A, typename Bins>
__global__ void __launch_bounds__(kRoiPoolThreads)
    roi_pool_boxes_kernel(Bins bins, RoiPoolShape shape, RoiPoolBox* __restrict__ boxes) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= shape.items()) return;
  const RoiPoolIndex index = RoiPoolIndex::of_item(shape, item);
  const RoiPoolAxis<A> y = bins.axis(shape, index, true), x = bins.axis(shape, index, false);
  boxes[item] = {static_cast<int>(bins.image(shape, index)), y.first_pixel, y.pixels, x.first_pixel,
                 x.pixels};
}

// Pixels of one row that a warp owns.
constexpr int kRoiPoolOwnedPixels = 8;

__host__ __device__ inline int64_t roi_pool_owners(const RoiPoolShape& shape, int chunks) {
  const int per_row = (shape.W + kRoiPoolOwnedPixels - 1) / kRoiPoolOwnedPixels;
  return shape.images * shape.K * chunks * shape.H * per_row;
}

// A warp owns some pixels of a row and a chunk of the channels of one class. Its lanes look for
// bins that may touch them, then take them in order.
template <typename T, int kVector, typename Bins>
__global__ void __launch_bounds__(kRoiPoolThreads, 2)
    roi_pool_grad_input_kernel(const T* __restrict__ grad_output,  // (R, Ph, Pw, C)
                               Bins bins, const RoiPoolBox* __restrict__ boxes, RoiPoolShape shape,
                               int chunks,
                               accumulation_t<T>* __restrict__ grad_input) {  // (images, H, W, C)
  using A = accumulation_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t owner = static_cast<int64_t>(blockIdx.x) * kRoiPoolWarps + threadIdx.x / kWarpSize;
  if (owner >= roi_pool_owners(shape, chunks)) return;
  const int per_row = (shape.W + kRoiPoolOwnedPixels - 1) / kRoiPoolOwnedPixels;
  const int64_t line = divide(owner, per_row), plane = divide(line, shape.H);
  const int64_t image_and_class = divide(plane, chunks);
  const int64_t image = divide(image_and_class, shape.K);
  const int column = static_cast<int>(owner - line * per_row) * kRoiPoolOwnedPixels;
  const int row = static_cast<int>(line - plane * shape.H);
  const int chunk = static_cast<int>(plane - image_and_class * chunks);
  const int k = static_cast<int>(image_and_class - image * shape.K);
  const int channel = (chunk * kWarpSize + lane) * kVector;
  const bool owns_channel = channel < shape.class_channels();
  const int64_t first = static_cast<int64_t>(k) * shape.class_channels() + channel;

  A sums[kRoiPoolOwnedPixels][kVector] = {};
  const int64_t bin_count = shape.R * shape.bins();
  for (int64_t base = 0; base < bin_count; base += kWarpSize) {
    bool found = false;
    if (base + lane < bin_count) {
      const int64_t roi = divide(base + lane, shape.bins());
      const RoiPoolBox box = boxes[(roi * (shape.K - 1) + k) * shape.bins() + base + lane];
      found = box.image == image && row >= box.first_row && row < box.first_row + box.rows &&
              column < box.first_column + box.columns &&
              column + kRoiPoolOwnedPixels > box.first_column;
    }
    for (unsigned left = __ballot_sync(kFullMask, found); left != 0; left &= left - 1) {
      const int64_t position = base + __ffs(left) - 1, roi = divide(position, shape.bins());
      const RoiPoolIndex index(shape, roi, k, static_cast<int>(position - roi * shape.bins()));
      const RoiPoolAxis<A> axis = bins.axis(shape, index, lane_has_rows());
      RoiPoolWeight<A> own{-1, 0, 0};
      if (lane < kRoiPoolOwnedPixels) own = axis.weight(column + lane);
      if (lane == kHalfWarp) own = axis.weight(row);
      const unsigned touched = __ballot_sync(kFullMask, own.pixel >= 0);
      const A scale = mean_scale(__shfl_sync(kFullMask, axis.divisor, kHalfWarp),
                                 __shfl_sync(kFullMask, axis.divisor, 0), bins.mask(shape, index));
      const A row_weight = __shfl_sync(kFullMask, own.value, kHalfWarp) * scale;
      if (!(touched >> kHalfWarp)) continue;
      Vector<T, kVector> grad{};
      if (owns_channel) grad = load_vector<kVector>(grad_output + position * shape.C + first);
#pragma unroll
      for (int p = 0; p < kRoiPoolOwnedPixels; ++p) {
        const A weight = __shfl_sync(kFullMask, own.value, p) * row_weight;
        if (!(touched >> p & 1)) continue;
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[p][i] += weight * static_cast<A>(grad.data[i]);
      }
    }
  }
  if (!owns_channel) return;
  A* target = grad_input + ((image * shape.H + row) * shape.W + column) * shape.C + first;
#pragma unroll
  for (int p = 0; p < kRoiPoolOwnedPixels; ++p) {
    if (column + p < shape.W) store_converted(target + p * static_cast<int64_t>(shape.C), sums[p]);
  }
}

}  // namespace mmdeform
