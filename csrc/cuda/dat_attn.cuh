// What the kernels of deformable attention compute with: inputs, positions, bias.

#pragma once

#include "common/cuda_device.cuh"

namespace mmdeform {

constexpr int kDatAttnThreads = 128;
constexpr int kDatAttnMaxChannels = 256;

// Blocks enough to fill a GPU. Where queries or keys are fewer a kernel splits its sums into
// partial ones, so this also limits their number; it is no property of the device, so that results
// are the same on all. The emulator's build sets fewer, so that small tensors take both ways.
#ifndef MMDEFORM_CUDA_DAT_ATTN_BLOCKS
#define MMDEFORM_CUDA_DAT_ATTN_BLOCKS 512
#endif
constexpr int64_t kDatAttnBlocks = MMDEFORM_CUDA_DAT_ATTN_BLOCKS;

// Inputs, contiguous. A head is counted through all images: image * M + m.
template <typename T>
struct DatAttnInputs {
  using A = accumulation_t<T>;

  const T* __restrict__ query;      // (B, M, Dh, H, W)
  const T* __restrict__ key;        // (B, M, Dh, Ns)
  const T* __restrict__ value;      // (B, M, Dh, Ns)
  const A* __restrict__ positions;  // (B, G, Ns, 2): y, x
  const A* __restrict__ table;      // (M, Th, Tw)
  int64_t B;
  int M, G, Dh, H, W, Ns, Th, Tw;
  A scale;
  bool align_corners;

  __host__ __device__ int queries() const { return H * W; }
  __host__ __device__ int heads() const { return static_cast<int>(B) * M; }

  // First element of a head of query or of anything of its shape; of key or of anything of its.
  __device__ int64_t query_head(int head) const {
    return static_cast<int64_t>(head) * Dh * queries();
  }
  __device__ int64_t key_head(int head) const { return static_cast<int64_t>(head) * Dh * Ns; }
  __device__ const A* head_positions(int head) const {
    return positions + static_cast<int64_t>(head / (M / G)) * Ns * 2;
  }
  __device__ const A* head_table(int head) const {
    return table + static_cast<int64_t>(head % M) * Th * Tw;
  }

  // Normalised position of row or column i of `size`.
  __device__ A query_position(int i, int size) const {
    if (!align_corners) return static_cast<A>(2 * i + 1) / static_cast<A>(size) - 1;
    return size == 1 ? 0 : static_cast<A>(2 * i) / static_cast<A>(size - 1) - 1;
  }
};

// Row or column of a table of `size` at the displacement from a key to a query.
template <typename A>
__device__ __forceinline__ A dat_attn_table_position(A query, A key, int size) {
  const A displacement = (query - key) * static_cast<A>(0.5);
  return multiply_rounded((displacement + 1) * static_cast<A>(0.5), static_cast<A>(size - 1));
}

// Change of that row or column with the key's position.
template <typename A>
__device__ __forceinline__ A dat_attn_table_slope(int size) {
  return static_cast<A>(-0.25) * static_cast<A>(size - 1);
}

// The bias of a pair of query and key, and what its gradients need.
template <typename A>
struct DatAttnBias {
  BilinearPoint<A> point;
  A corners[4];

  __device__ DatAttnBias(const A* __restrict__ table, int Th, int Tw, A query_y, A query_x, A key_y,
                         A key_x)
      : point(bilinear_point(dat_attn_table_position(query_y, key_y, Th),
                             dat_attn_table_position(query_x, key_x, Tw), Th, Tw)) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      corners[k] = has_corner(point, k) ? table[corner_pixel(point, Tw, k)] : 0;
    }
  }

  __device__ A value() const {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += corner_weight(point, k) * corners[k];
    return sum;
  }
};

}  // namespace mmdeform
