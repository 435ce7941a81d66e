// Sampling points of deformable convolution.

#pragma once

#include "common/cuda_device.cuh"

namespace mmdeform {

struct DeformConv2dShape {
  int64_t N;
  int C, H, W;
  int O, Kh, Kw;
  int Ho, Wo;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int G, D;

  __host__ __device__ int taps() const { return Kh * Kw; }
  __host__ __device__ int channels_per_group() const { return C / G; }
  __host__ __device__ int channels_per_deform_group() const { return C / D; }
  __host__ __device__ int64_t output_pixels() const { return N * Ho * Wo; }
};

// Neighbouring output pixels, counted over the whole batch, that are worked on together. Their
// columns have the shape (G, count, T, C/G).
struct DeformConv2dTile {
  int64_t first;
  int count;

  __host__ __device__ int64_t points(const DeformConv2dShape& shape) const {
    return static_cast<int64_t>(shape.D) * shape.taps() * count;
  }
};

// Inputs that say where to sample; contiguous.
template <typename C>
struct DeformConv2dOffsets {
  const C* __restrict__ offset;  // (N, D, T, 2, Ho, Wo): dy, dx
  const C* __restrict__ mask;    // (N, D, T, Ho, Wo) or null
};

// A point is one tap of one deform group at one output pixel. Within a tile points are numbered
// with the pixel running fastest, as the offsets lie in memory.
struct DeformConv2dPointIndex {
  int pixel;  // within the tile
  int deform_group;
  int tap;
  int64_t image;
  int out_h, out_w;
  int64_t mask_index;    // element of the mask
  int64_t offset_index;  // element of the offset: dy; dx follows Ho * Wo elements later

  __device__ __forceinline__ DeformConv2dPointIndex(const DeformConv2dShape& shape,
                                                    const DeformConv2dTile& tile, int64_t point) {
    const int taps = shape.taps(), out_size = shape.Ho * shape.Wo;
    const int group_and_tap = static_cast<int>(divide(point, tile.count));
    pixel = static_cast<int>(point - static_cast<int64_t>(group_and_tap) * tile.count);
    deform_group = group_and_tap / taps;
    tap = group_and_tap - deform_group * taps;
    image = divide(tile.first + pixel, out_size);
    const int place = static_cast<int>(tile.first + pixel - image * out_size);
    out_h = place / shape.Wo;
    out_w = place - out_h * shape.Wo;
    const int64_t plane = image * shape.D * taps + group_and_tap;
    mask_index = plane * out_size + place;
    offset_index = 2 * plane * out_size + place;
  }
};

// A point, ready to be sampled.
template <typename A>
struct DeformConv2dSample {
  BilinearPoint<A> at;
  A mask;
  int first_channel;    // of the deform group
  int64_t first_pixel;  // of the image, counted over the batch
  int64_t row;          // element of the columns at channel 0 of conv group 0; -1: no such point
};

template <typename A, typename C>
__device__ __forceinline__ DeformConv2dSample<A> load_sample(const DeformConv2dShape& shape,
                                                             const DeformConv2dTile& tile,
                                                             const DeformConv2dOffsets<C>& offsets,
                                                             const DeformConv2dPointIndex& index) {
  const int tap_h = index.tap / shape.Kw, tap_w = index.tap - tap_h * shape.Kw;
  const C* offset = offsets.offset + index.offset_index;
  const A h =
      static_cast<A>(index.out_h * shape.stride_h - shape.pad_h + tap_h * shape.dilation_h) +
      static_cast<A>(offset[0]);
  const A w =
      static_cast<A>(index.out_w * shape.stride_w - shape.pad_w + tap_w * shape.dilation_w) +
      static_cast<A>(offset[shape.Ho * shape.Wo]);
  DeformConv2dSample<A> sample;
  sample.at = bilinear_point(h, w, shape.H, shape.W);
  sample.mask = offsets.mask == nullptr ? A(1) : static_cast<A>(offsets.mask[index.mask_index]);
  sample.first_channel = index.deform_group * shape.channels_per_deform_group();
  sample.first_pixel = index.image * shape.H * shape.W;
  sample.row =
      (static_cast<int64_t>(index.pixel) * shape.taps() + index.tap) * shape.channels_per_group();
  return sample;
}

// Element of the columns that holds a channel of a sample.
template <typename A>
__device__ __forceinline__ int64_t column_index(const DeformConv2dShape& shape,
                                                const DeformConv2dTile& tile,
                                                const DeformConv2dSample<A>& sample, int channel) {
  if (shape.G == 1) return sample.row + channel;
  const int per_group = shape.channels_per_group();
  const int group = channel / per_group;
  return sample.row + group * (static_cast<int64_t>(tile.count) * shape.taps() - 1) * per_group +
         channel;
}

// Points of one thread block; each is located once and then sampled by several lanes.
constexpr int kDeformConv2dPoints = 64;
constexpr int kDeformConv2dThreads = 256;

// Locates the block's points. All threads of the block must take part.
template <typename A, typename C>
__device__ __forceinline__ void load_samples(const DeformConv2dShape& shape,
                                             const DeformConv2dTile& tile,
                                             const DeformConv2dOffsets<C>& offsets,
                                             DeformConv2dSample<A>* samples) {
  if (threadIdx.x < kDeformConv2dPoints) {
    const int64_t point = static_cast<int64_t>(blockIdx.x) * kDeformConv2dPoints + threadIdx.x;
    DeformConv2dSample<A> sample{};
    sample.row = -1;
    if (point < tile.points(shape)) {
      sample = load_sample<A>(shape, tile, offsets, DeformConv2dPointIndex(shape, tile, point));
    }
    samples[threadIdx.x] = sample;
  }
  __syncthreads();
}

}  // namespace mmdeform
