// What the driver of RoI pooling (roi_pool.cpp) asks of the kernels of deform_roi_pool and
// deform_ps_roi_pool (roi_pool_kernel.h), and what it offers to both operators.
//
// A "row" holds a pixel's channels as adjacent numbers of the accumulation type A, in the order
// [cell][output channel], so that the channels which a bin reads lie side by side.
#pragma once

#include "common/roi_pool_geometry.h"
#include "cpu/capability.h"
#include "cpu/storage.h"

namespace mmdeform {

template <typename T, typename C>
struct RoiPoolArgs {
  using A = Accumulation<T>;

  RoiPoolGeometry geometry;
  const A* rois;       // [R][5]
  const C* offset;     // [R][2 * classes][part_h][part_w] or null
  const C* mask;       // [R][bins] or null
  int64_t table_size;  // entries of an axis table, see scratch_bytes
};

// Output channels [channel, channel + channels) of one cell, of one image.
struct RoiPoolTask {
  int64_t cell, channel, channels;
  const int64_t* rois;  // the image's RoIs, in order
  int64_t roi_count;
};

template <typename T, typename C>
struct RoiPoolKernelsOf {
  using A = Accumulation<T>;
  using Args = RoiPoolArgs<T, C>;

  // Pixels [begin, begin + count) of one image (C, H, W) to rows.
  void (*image_to_rows)(const RoiPoolGeometry&, const T* image, int64_t begin, int64_t count,
                        A* rows);
  // One RoI's gradient (output_dim, bins) to [bins][output_dim].
  void (*gradient_to_rows)(const RoiPoolGeometry&, const T* gradient, A* rows);

  // The output (output_dim, bins) of one RoI. image: the rows of its image; sums:
  // [bins][output_dim].
  void (*forward)(const Args&, int64_t roi, const A* image, void* tables, A* sums, T* output);

  // The gradients of one RoI's offset and mask; either may be null. gradient: [bins][output_dim];
  // sums: [2 * classes * parts].
  void (*backward_points)(const Args&, int64_t roi, const A* image, const A* gradient, void* tables,
                          A* sums, C* grad_offset, C* grad_mask);

  // The gradient (C, H, W) of one image, its task's channels. gradients: of all RoIs; sums:
  // [pixels][channels of the task].
  void (*backward_input)(const Args&, const RoiPoolTask&, const A* gradients, void* tables, A* sums,
                         T* grad_image);
};

struct RoiPoolKernels : RoiPoolKernelsOf<double, double>,
                        RoiPoolKernelsOf<float, float>,
                        RoiPoolKernelsOf<Half, Half>,
                        RoiPoolKernelsOf<Half, float>,
                        RoiPoolKernelsOf<BFloat16, BFloat16>,
                        RoiPoolKernelsOf<BFloat16, float> {};

MMDEFORM_DECLARE_KERNELS(RoiPoolKernels, deform_roi_pool_kernels)
MMDEFORM_DECLARE_KERNELS(RoiPoolKernels, deform_ps_roi_pool_kernels)

}  // namespace mmdeform
