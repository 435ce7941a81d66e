// RoI pooling, one axis at a time: where the samples of a bin lie and how they weigh the pixels.
//
// The samples of a bin form a grid, and each axis decides by itself which of them contribute. Their
// sum is therefore a sum over pixels of rows.weight(y) * columns.weight(x) * pixel(y, x). Kernels
// look at each pixel once, however many samples lie around it.

#pragma once

#include "common/cuda_device.cuh"

namespace mmdeform {

// R RoIs are pooled from images of H x W pixels into Ph x Pw bins. Each of the K classes pools its
// own C / K neighbouring channels from its own places.
struct RoiPoolShape {
  int64_t R, images;
  int C, K, H, W, Ph, Pw;

  __host__ __device__ int bins() const { return Ph * Pw; }
  __host__ __device__ int class_channels() const { return C / K; }
  __host__ __device__ int64_t items() const { return R * K * bins(); }
};

// An item is a bin of one RoI and class; items are numbered in the order (R, K, Ph, Pw).
struct RoiPoolIndex {
  int64_t roi;
  int k, bin, row, column;

  __device__ __forceinline__ RoiPoolIndex(const RoiPoolShape& shape, int64_t roi, int k, int bin)
      : roi(roi), k(k), bin(bin) {
    row = bin / shape.Pw;
    column = bin - row * shape.Pw;
  }

  __device__ __forceinline__ static RoiPoolIndex of_item(const RoiPoolShape& shape, int64_t item) {
    const int64_t region = divide(item, shape.bins()), roi = divide(region, shape.K);
    return {shape, roi, static_cast<int>(region - roi * shape.K),
            static_cast<int>(item - region * shape.bins())};
  }
};

// Indices first..last; none where last < first.
template <typename A>
struct RoiPoolRange {
  A first, last;
};

// Which of the positions start + i * step, 0 <= i < count, may lie in [lower, upper]: all that do
// and few others.
template <typename A>
__device__ __forceinline__ RoiPoolRange<A> positions_between(A start, A step, A count, A lower,
                                                             A upper) {
  constexpr int kFew = 8;  // not worth choosing from
  if (count <= kFew || step == 0) return {0, count - 1};
  const A a = (lower - start) / step, b = (upper - start) / step;
  const A first = std::floor(std::fmin(a, b)), last = std::ceil(std::fmax(a, b));
  if (!(first <= last)) return {0, -1};  // NaN
  return {std::fmax(first, A(0)), std::fmin(last, count - 1)};
}

// What the samples along an axis add up to at one pixel.
template <typename A>
struct RoiPoolWeight {
  int pixel;  // -1: not touched by any sample
  A value;    // the sum of the samples' weights
  A slope;    // its derivative by the position of the bin, right-sided at integers
};

// The samples of a bin along one axis. Those more than `margin` outside the image do not
// contribute; others are clamped to it.
template <typename A>
struct RoiPoolAxis {
  A start, step, first;     // sample i lies at start + (first + i) * step
  A margin;                 // in pixels
  int count;                // samples that may contribute
  int size;                 // pixels of the image
  int first_pixel, pixels;  // a range that holds all touched pixels
  A divisor;                // of the sum of samples, along this axis
  A reach;                  // derivative of the positions by the offset

  // Samples at start + (shift + i) * step, i = 0..total-1, at most `limit` of them inside the
  // image. There are none where the total is not a number.
  __device__ __forceinline__ static RoiPoolAxis of(A start, A step, A shift, A total, int limit,
                                                   int size, A margin) {
    RoiPoolAxis axis{start, step, shift, margin, 0, size, 0, 0, total, 0};
    if (!(total >= 1)) return axis;
    const RoiPoolRange<A> range = positions_between(start + multiply_rounded(shift, step), step,
                                                    total, -margin, size - 1 + margin);
    if (range.last < range.first) return axis;
    axis.first = range.first + shift;
    axis.count = static_cast<int>(std::fmin(range.last - range.first + 1, static_cast<A>(limit)));
    const A one_end = axis.clamped(axis.position(0));
    const A other_end = axis.clamped(axis.position(axis.count - 1));
    axis.first_pixel = static_cast<int>(std::fmin(one_end, other_end));
    const int last_pixel = min(static_cast<int>(std::fmax(one_end, other_end)) + 1, size - 1);
    axis.pixels = last_pixel - axis.first_pixel + 1;
    return axis;
  }

  __device__ __forceinline__ A position(int i) const {
    return start + multiply_rounded(first + i, step);
  }

  __device__ __forceinline__ bool contributes(A position) const {
    return position >= -margin && position <= size - 1 + margin;
  }

  // NaN becomes 0.
  __device__ __forceinline__ A clamped(A position) const {
    return std::fmin(std::fmax(position, A(0)), static_cast<A>(size - 1));
  }

  __device__ __forceinline__ RoiPoolWeight<A> weight(int pixel) const {
    RoiPoolWeight<A> result{-1, 0, 0};
    if (pixel < first_pixel || pixel >= first_pixel + pixels) return result;
    const A lower = pixel == 0 ? -margin : static_cast<A>(pixel - 1);
    const A upper = pixel == size - 1 ? size - 1 + margin : static_cast<A>(pixel + 1);
    const RoiPoolRange<A> range =
        positions_between(position(0), step, static_cast<A>(count), lower, upper);
    for (int i = static_cast<int>(range.first); i <= static_cast<int>(range.last); ++i) {
      const A exact = position(i);
      if (!contributes(exact)) continue;
      const A inside = clamped(exact), low = std::floor(inside);
      const A slope = exact >= 0 && exact < size - 1 ? 1 : 0;  // a clamped sample stays in place
      if (static_cast<int>(low) == pixel) {
        result = {pixel, result.value + (1 - (inside - low)), result.slope - slope};
      } else if (static_cast<int>(low) + 1 == pixel) {
        result = {pixel, result.value + (inside - low), result.slope + slope};
      }
    }
    return result;
  }

  __device__ __forceinline__ int contributing_samples() const {
    int result = 0;
    for (int i = 0; i < count; ++i) result += contributes(position(i)) ? 1 : 0;
    return result;
  }
};

// What the sum of a bin's samples is multiplied with. A grid that is not a number has no samples.
template <typename A>
__device__ __forceinline__ A mean_scale(A rows, A columns, A mask) {
  const A samples = rows * columns;
  return mask / (samples > 1 ? samples : 1);
}

}  // namespace mmdeform
