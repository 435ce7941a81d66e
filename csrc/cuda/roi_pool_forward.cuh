// Forward kernel of RoI pooling.

#pragma once

#include "cuda/roi_pool_pixels.cuh"

namespace mmdeform {

// The bins of a RoI and class are cut into tiles and their channels into chunks of one vector per
// lane; a thread block works on one tile and chunk.
struct RoiPoolTiles {
  int tile_bins, tiles, chunks;
};

constexpr int kRoiPoolMaxTileBins = 64;

// Elements of one bin in the tile of a thread block. One vector more than a warp writes, so that
// lanes which read the same channels of neighbouring bins find them in different banks.
template <int kVector>
constexpr int kRoiPoolTileRow = (kWarpSize + 1) * kVector;

// A warp sums a bin. Bins lie side by side in the output, but channels in the registers of a warp:
// the tile is turned around in shared memory, where it fits, instead of in a second pass over the
// output.
template <typename T, int kVector, typename Bins>
__global__ void __launch_bounds__(kRoiPoolThreads, sizeof(T) == 8 ? 2 : 3)
    roi_pool_forward_kernel(const T* __restrict__ input,  // (images, H, W, C)
                            Bins bins, RoiPoolShape shape, RoiPoolTiles tiles,
                            T* __restrict__ output) {  // (R, C, Ph, Pw)
  using A = accumulation_t<T>;
  MMDEFORM_SHARED(RoiPoolScratch<A>, scratch, kRoiPoolWarps);
  MMDEFORM_DYNAMIC_SHARED(T, tile);  // (tile_bins, kRoiPoolTileRow)
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int region_and_tile = blockIdx.x / tiles.chunks;
  const int first_channel = (blockIdx.x - region_and_tile * tiles.chunks) * kWarpSize * kVector;
  const int region = region_and_tile / tiles.tiles;
  const int first_bin = (region_and_tile - region * tiles.tiles) * tiles.tile_bins;
  const int tile_bins = min(tiles.tile_bins, shape.bins() - first_bin);
  const int roi = region / shape.K, k = region - roi * shape.K;
  const int channels = shape.class_channels();
  const int channel = first_channel + lane * kVector;
  // Lanes without a channel read the first one and write nothing.
  const int64_t first = static_cast<int64_t>(k) * channels + (channel < channels ? channel : 0);

  for (int b = warp; b < tile_bins; b += kRoiPoolWarps) {
    const RoiPoolIndex index(shape, roi, k, first_bin + b);
    const RoiPoolAxis<A> axis = bins.axis(shape, index, lane_has_rows());
    const A scale = mean_scale(__shfl_sync(kFullMask, axis.divisor, kHalfWarp),
                               __shfl_sync(kFullMask, axis.divisor, 0), bins.mask(shape, index));
    const T* image = input + bins.image(shape, index) * shape.H * shape.W * shape.C + first;
    A sum[kVector] = {};
    RoiPoolPixels<A> pixels(axis, shape.W, scratch + warp);
    while (pixels.next()) {
#pragma unroll 4
      for (int j = 0; j < pixels.count; ++j) {
        const int64_t pixel = __shfl_sync(kFullMask, pixels.own.index, j);
        const A weight = __shfl_sync(kFullMask, pixels.own.value, j);
        const Vector<T, kVector> values = load_vector<kVector>(image + pixel * shape.C);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += weight * static_cast<A>(values.data[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] *= scale;
    store_converted(tile + b * kRoiPoolTileRow<kVector> + lane * kVector, sum);
  }
  __syncthreads();

  T* target = output + (static_cast<int64_t>(region) * channels + first_channel) * shape.bins();
  const int vectors = min(kWarpSize, (channels - first_channel) / kVector);
  for (int i = threadIdx.x; i < vectors * tile_bins; i += kRoiPoolThreads) {
    const int vector = i / tile_bins, b = i - vector * tile_bins;
    const Vector<T, kVector> values =
        load_vector<kVector>(tile + b * kRoiPoolTileRow<kVector> + vector * kVector);
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      target[static_cast<int64_t>(vector * kVector + c) * shape.bins() + first_bin + b] =
          values.data[c];
    }
  }
}

}  // namespace mmdeform
