// Forward kernels of deformable convolution: columns of sampled values for a matrix product, and
// the tiles it reads and writes.

#pragma once

#include "cuda/deform_conv2d_points.cuh"

namespace mmdeform {

// Blend of the four corners, not yet modulated.
template <int kVector, typename T, typename A>
__device__ __forceinline__ void blend_corners(const Vector<T, kVector> (&corners)[4],
                                              const BilinearPoint<A>& at, A (&value)[kVector]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A weight = corner_weight(at, k);
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] += weight * static_cast<A>(corners[k].data[i]);
  }
}

// `lanes` neighbouring threads share a point and own kVector neighbouring channels each.
template <typename T, typename C, int kVector>
__global__ void __launch_bounds__(kDeformConv2dThreads)
    deform_conv2d_columns_kernel(const T* __restrict__ input,  // (N, H, W, C)
                                 DeformConv2dOffsets<C> offsets, DeformConv2dShape shape,
                                 DeformConv2dTile tile, int lanes,
                                 T* __restrict__ columns) {  // (G, count, T, C/G)
  using A = accumulation_t<T>;
  MMDEFORM_SHARED(DeformConv2dSample<A>, samples, kDeformConv2dPoints);
  load_samples(shape, tile, offsets, samples);
  const int lane = threadIdx.x % lanes;
  for (int s = threadIdx.x / lanes; s < kDeformConv2dPoints; s += kDeformConv2dThreads / lanes) {
    const DeformConv2dSample<A> sample = samples[s];
    if (sample.row < 0) continue;
    const T* image = input + sample.first_pixel * shape.C + sample.first_channel;
#pragma unroll 2
    for (int c = lane * kVector; c < shape.channels_per_deform_group(); c += lanes * kVector) {
      Vector<T, kVector> corners[4];
      load_corners(image + c, shape.C, sample.at, shape.W, corners);
      A value[kVector] = {};
      blend_corners(corners, sample.at, value);
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[i] *= sample.mask;
      store_converted(columns + column_index(shape, tile, sample, sample.first_channel + c), value);
    }
  }
}

// Where one thread of the kernels below works: element (channel, pixel) of a tile (O, count), and
// the same element of the output (N, O, Ho, Wo).
struct DeformConv2dTileElement {
  int channel;
  bool active;
  int64_t in_tile, in_output;

  __device__ __forceinline__ DeformConv2dTileElement(const DeformConv2dShape& shape,
                                                     const DeformConv2dTile& tile) {
    const int blocks_per_channel = (tile.count + blockDim.x - 1) / blockDim.x;
    channel = blockIdx.x / blocks_per_channel;
    const int pixel = (blockIdx.x - channel * blocks_per_channel) * blockDim.x + threadIdx.x;
    active = pixel < tile.count;
    const int out_size = shape.Ho * shape.Wo;
    const int64_t image = divide(tile.first + pixel, out_size);
    in_tile = static_cast<int64_t>(channel) * tile.count + pixel;
    in_output = (image * shape.O + channel) * out_size + (tile.first + pixel - image * out_size);
  }
};

// Moves a finished tile into the output and adds the bias.
template <typename T>
__global__ void __launch_bounds__(kDeformConv2dThreads)
    deform_conv2d_store_tile_kernel(const T* __restrict__ tile_output,  // (O, count)
                                    const T* __restrict__ bias,         // (O) or null
                                    DeformConv2dShape shape, DeformConv2dTile tile,
                                    T* __restrict__ output) {  // (N, O, Ho, Wo)
  using A = accumulation_t<T>;
  const DeformConv2dTileElement element(shape, tile);
  if (!element.active) return;
  const T value = tile_output[element.in_tile];
  output[element.in_output] =
      bias == nullptr
          ? value
          : static_cast<T>(static_cast<A>(value) + static_cast<A>(bias[element.channel]));
}

// Takes a tile out of the gradient of the output.
template <typename T>
__global__ void __launch_bounds__(kDeformConv2dThreads)
    deform_conv2d_load_tile_kernel(const T* __restrict__ grad_output,  // (N, O, Ho, Wo)
                                   DeformConv2dShape shape, DeformConv2dTile tile,
                                   T* __restrict__ tile_grad) {  // (O, count)
  const DeformConv2dTileElement element(shape, tile);
  if (element.active) tile_grad[element.in_tile] = grad_output[element.in_output];
}

}  // namespace mmdeform
