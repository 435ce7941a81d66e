// The pixels of a bin of RoI pooling, located once by the lanes of a warp.

#pragma once

#include "cuda/roi_pool_axis.cuh"

namespace mmdeform {

constexpr int kRoiPoolThreads = 256;
constexpr int kRoiPoolWarps = kRoiPoolThreads / kWarpSize;
constexpr int kHalfWarp = kWarpSize / 2;

// The lower half of a warp's lanes works on the columns of a bin, the upper half on its rows.
__device__ __forceinline__ bool lane_has_rows() { return threadIdx.x % kWarpSize >= kHalfWarp; }

// A pixel of a bin, its weight in the sum of samples and the derivatives of that weight by the
// position of the bin.
template <typename A>
struct RoiPoolPixel {
  int index;  // y * W + x
  A value, slope_x, slope_y;
};

// What the lanes of a warp share.
template <typename A>
struct RoiPoolScratch {
  RoiPoolAxis<A> axes[2];                  // columns, rows
  RoiPoolWeight<A> weights[2][kHalfWarp];  // of the touched columns and rows of a block of pixels
};

// Walks over the touched pixels of a bin, up to one per lane at a time:
//
//   RoiPoolPixels<A> pixels(axis, W, scratch);
//   while (pixels.next()) {
//     for (int j = 0; j < pixels.count; ++j) ...  // lane j holds pixel j in pixels.own
//   }
//
// `axis` is that of the lane's half. All lanes of the warp must take part; count is the same for
// all. The axes wait in shared memory: few bins are so large that they are needed again.
template <typename A>
class RoiPoolPixels {
 public:
  int count = 0;
  RoiPoolPixel<A> own{};

  __device__ __forceinline__ RoiPoolPixels(const RoiPoolAxis<A>& axis, int W,
                                           RoiPoolScratch<A>* scratch)
      : W_(W), scratch_(scratch), lane_(threadIdx.x % kWarpSize) {
    __syncwarp();  // the bin before has been read
    if (lane_ % kHalfWarp == 0) scratch->axes[lane_ / kHalfWarp] = axis;
    __syncwarp();
    if (scratch->axes[0].pixels == 0) row_ = scratch->axes[1].pixels;  // at the end
  }

  __device__ __forceinline__ bool next() {
    walked_ += kWarpSize;
    while (walked_ >= touched_rows_ * touched_columns_) {
      column_ += kHalfWarp;
      if (column_ >= scratch_->axes[0].pixels) {
        column_ = 0;
        row_ += kHalfWarp;
      }
      if (row_ >= scratch_->axes[1].pixels) return false;
      weigh_block();
      walked_ = 0;
    }
    count = min(kWarpSize, touched_rows_ * touched_columns_ - walked_);
    if (lane_ < count) {
      const int row = (walked_ + lane_) / touched_columns_;
      const RoiPoolWeight<A> y = scratch_->weights[1][row];
      const RoiPoolWeight<A> x = scratch_->weights[0][walked_ + lane_ - row * touched_columns_];
      own = {y.pixel * W_ + x.pixel, y.value * x.value, y.value * x.slope, y.slope * x.value};
    }
    return true;
  }

 private:
  const int W_;
  RoiPoolScratch<A>* const scratch_;
  const int lane_;
  // The current block of kHalfWarp x kHalfWarp pixels; before the first one.
  int column_ = -kHalfWarp, row_ = 0;
  int touched_columns_ = 0, touched_rows_ = 0;
  int walked_ = 0;  // pixels of the block that came before

  // Each lane weighs one column or one row of the block.
  __device__ __forceinline__ void weigh_block() {
    const int half = lane_ / kHalfWarp, i = lane_ % kHalfWarp;
    const RoiPoolAxis<A>& axis = scratch_->axes[half];
    const RoiPoolWeight<A> weight = axis.weight(axis.first_pixel + (half ? row_ : column_) + i);
    const unsigned touched = __ballot_sync(kFullMask, weight.pixel >= 0);
    touched_columns_ = __popc(touched & 0xffffu);
    touched_rows_ = __popc(touched >> kHalfWarp);
    __syncwarp();  // the weights of the block before have been read
    if (weight.pixel >= 0) {
      const unsigned before = (touched >> (half * kHalfWarp)) & ((1u << i) - 1);
      scratch_->weights[half][__popc(before)] = weight;
    }
    __syncwarp();
  }
};

}  // namespace mmdeform
