// What the driver (deform_conv2d.cpp) asks of the kernels (deform_conv2d_kernel.cpp).
//
// The image is held channels last in the accumulation type A, followed by one pixel of zeros that
// stands for everything outside the image. Output pixels are processed in tiles. Within a tile the
// sampling corners are computed once per tap and deform group; channels are then processed in
// segments, which lie inside one convolution group and one deform group.
#pragma once

#include "common/deform_conv2d_geometry.h"
#include "cpu/capability.h"
#include "cpu/storage.h"

namespace mmdeform {

constexpr int64_t kTilePixels = 128;
constexpr int64_t kMaxSegment = 128;
// Rows of column buffers are not a power of two apart, which would crowd few cache sets.
constexpr int64_t kColumnStride = kMaxSegment + 16;
// Kernels read whole vectors past the last channel of a segment.
constexpr int64_t kReadSlack = 16;

struct Segment {
  int64_t begin, length;  // channels
  int64_t group, deform_group;
  int64_t padded_begin;  // sum of the earlier segments' lengths, each rounded up to whole panels
};

struct DeformConv2dPlan {
  DeformConv2dGeometry geometry;
  const Segment* segments;
  int64_t segment_count;
  int64_t padded_channels;      // sum of padded segment lengths
  int64_t padded_out_channels;  // output channels of one group, rounded up to whole panels
};

// The four pixels around a sampling position, and where it lies between them.
template <typename A>
struct Corners {
  int32_t index[4];  // top left, top right, bottom left, bottom right
  A fraction_y, fraction_x, mask;
};

struct Tile {
  int64_t begin, count;  // output pixels of one image
};

template <typename T, typename C>
struct DeformConv2dKernelsOf {
  using A = Accumulation<T>;

  // Pixels [begin, begin + count) of a channels-first image to channels-last rows.
  void (*image_to_rows)(const DeformConv2dPlan&, const T* image, bool channels_last, int64_t begin,
                        int64_t count, A* rows);
  // The reverse, for a gradient.
  void (*rows_to_image)(const DeformConv2dPlan&, const A* rows, int64_t begin, int64_t count,
                        T* image);

  // Corners of the tile for deform group d and one tap: [count].
  void (*corners)(const DeformConv2dPlan&, Tile, const C* offset, const C* mask, int64_t d,
                  int64_t tap, Corners<A>* corners);

  // Weights of one segment: [tap][panel of output channels][channel][columns].
  void (*pack_weight)(const DeformConv2dPlan&, const T* weight, const Segment&, A* packed);
  // Transposed weights of one segment: [tap][panel of channels][output channel][columns].
  void (*pack_weight_transposed)(const DeformConv2dPlan&, const T* weight, const Segment&,
                                 A* packed);

  // One tile of the output of one image. corners: [d][tap][kTilePixels]; columns:
  // kTilePixels x kColumnStride; sums: kTilePixels x padded_out_channels.
  void (*forward_tile)(const DeformConv2dPlan&, Tile, const A* rows, const Corners<A>* corners,
                       const A* packed_weight, const T* bias, A* columns, A* sums, T* output);

  // grad_output of a tile and group as rows [pixel][output channel] and as packed panels
  // [panel][pixel][columns], for one panel of output channels.
  void (*pack_gradient)(const DeformConv2dPlan&, Tile, const T* grad_output, int64_t group,
                        int64_t panel, A* rows, A* packed);

  // One tile and segment of the backward pass: adds to grad_rows (the segment's channels only) and
  // to grad_weight [tap][padded channel][padded output channel]; writes sums over the segment's
  // channels of the gradients of (mask, y, x) to partial [tap][kTilePixels][3].
  void (*backward_tile)(const DeformConv2dPlan&, Tile, const Segment&, const A* rows,
                        const Corners<A>* corners, const A* packed_weight, const A* gradient_rows,
                        const A* gradient_packed, A* columns, A* grad_columns, A* grad_rows,
                        A* grad_weight, A* partial);

  // Sums partial over the segments of deform group d into the gradients of offset and mask.
  void (*reduce_offset)(const DeformConv2dPlan&, Tile, const A* partial, int64_t d, int64_t tap,
                        const Corners<A>* corners, C* grad_offset, C* grad_mask);

  // grad_weight of all images in flight, summed, to the layout of the weight, for one segment.
  void (*unpack_weight)(const DeformConv2dPlan&, const A* grad_weight, int64_t images,
                        const Segment&, T* weight);
};

struct DeformConv2dKernels : DeformConv2dKernelsOf<double, double>,
                             DeformConv2dKernelsOf<float, float>,
                             DeformConv2dKernelsOf<Half, Half>,
                             DeformConv2dKernelsOf<Half, float>,
                             DeformConv2dKernelsOf<BFloat16, BFloat16>,
                             DeformConv2dKernelsOf<BFloat16, float> {
  int64_t panel_columns_float, panel_columns_double;
};

MMDEFORM_DECLARE_KERNELS(DeformConv2dKernels, deform_conv2d_kernels)

}  // namespace mmdeform
