// Sampling points of DCNv3 and DCNv4.

#pragma once

#include "cuda/points.cuh"

namespace mmdeform {

// Where the numbers of one group at one output pixel begin.
struct Dcnv3Strides {
  int64_t pixel, group;

  __device__ __forceinline__ int64_t operator()(int64_t pixel_index, int group_index) const {
    return pixel_index * pixel + group_index * group;
  }
};

// A source of points, see points.cuh: queries are output pixels, points are taps.
template <typename C>
struct Dcnv3Points {
  using Coordinate = C;
  using Shared = char;  // none
  using A = accumulation_t<C>;

  PointsShape shape;
  const C* __restrict__ offset;  // per output pixel and group K times x, y
  const C* __restrict__ mask;    // per output pixel and group K weights
  Dcnv3Strides offset_strides, mask_strides;
  int H, W, Wo;
  int kernel_h;
  int stride_h, stride_w;
  int start_h, start_w;  // centre of the kernel at output pixel (0, 0)
  int dilation_h, dilation_w;
  int center_h, center_w;  // from the first tap
  int removed_tap;         // K where none is
  A offset_scale;

  struct Row {
    A x, y;  // centre of the kernel
    int64_t offset, mask;
  };

  size_t shared_bytes() const { return 0; }

  __device__ __forceinline__ void prepare(char*) const {}

  __device__ __forceinline__ Row row(const RowIndex& index, const char*) const {
    const int query = static_cast<int>(index.query);
    const int out_h = query / Wo, out_w = query - out_h * Wo;
    const int64_t pixel = index.image * shape.queries + index.query;
    return {static_cast<A>(out_w * stride_w + start_w), static_cast<A>(out_h * stride_h + start_h),
            offset_strides(pixel, index.group), mask_strides(pixel, index.group)};
  }

  __device__ __forceinline__ WeightedPoint<A> load(const Row& row, int i) const {
    // Taps are column-major: the row changes fastest.
    const int tap = i < removed_tap ? i : i + 1;
    const int tap_w = tap / kernel_h, tap_h = tap - tap_w * kernel_h;
    // DCNv4's pairs of odd groups may lie at odd places: no vector load.
    const C* pair = offset + row.offset + 2 * i;
    const A x = static_cast<A>(tap_w * dilation_w - center_w) + static_cast<A>(pair[0]);
    const A y = static_cast<A>(tap_h * dilation_h - center_h) + static_cast<A>(pair[1]);
    return {bilinear_point(row.y + multiply_rounded(offset_scale, y),
                           row.x + multiply_rounded(offset_scale, x), H, W),
            W, static_cast<A>(mask[row.mask + i])};
  }

  __device__ __forceinline__ void store(const PointGradients<C>& gradients, const Row& row, int i,
                                        const PointGradient<A>& gradient) const {
    C* pair = gradients.positions + row.offset + 2 * i;
    pair[0] = static_cast<C>(gradient.x * offset_scale);
    pair[1] = static_cast<C>(gradient.y * offset_scale);
    gradients.weights[row.mask + i] = static_cast<C>(gradient.weight);
  }
};

}  // namespace mmdeform
