// Sampling points of multi-scale deformable attention.

#pragma once

#include "common/cuda_device.cuh"

namespace mmdeform {

struct MsDeformAttnShape {
  int64_t N, S, Lq;
  int M, Dh, L, P;

  __host__ __device__ int64_t rows() const { return N * Lq * M; }  // one per image, query and head
  __host__ __device__ int points() const { return L * P; }         // per row
};

struct MsDeformAttnLevel {
  int H, W, start;
};

// Inputs that say where to sample; all contiguous.
template <typename C>
struct MsDeformAttnPoints {
  const int64_t* __restrict__ spatial_shapes;     // (L, 2): H, W
  const int64_t* __restrict__ level_start_index;  // (L)
  const C* __restrict__ sampling_locations;       // (N, Lq, M, L, P, 2): x, y
  const C* __restrict__ attention_weights;        // (N, Lq, M, L, P)
};

// Reads the levels into shared memory and stops the kernel where one does not fit into the value.
// All threads of the block must take part.
template <typename C>
__device__ __forceinline__ void load_levels(const MsDeformAttnPoints<C>& points,
                                            const MsDeformAttnShape& shape,
                                            MsDeformAttnLevel* levels) {
  for (int l = threadIdx.x; l < shape.L; l += blockDim.x) {
    const int64_t H = points.spatial_shapes[2 * l], W = points.spatial_shapes[2 * l + 1];
    const int64_t start = points.level_start_index[l], S = shape.S;
    const bool fits = H >= 0 && W >= 0 && start >= 0 && start <= S &&
                      (H == 0 || W == 0 || (H <= S && W <= S && start + H * W <= S));
    if (!fits) __trap();
    const bool empty = H == 0 || W == 0;
    levels[l] = {empty ? 0 : static_cast<int>(H), empty ? 0 : static_cast<int>(W),
                 static_cast<int>(start)};
  }
  __syncthreads();
}

template <typename A>
struct MsDeformAttnPoint {
  BilinearPoint<A> at;  // at.pixel is a token of the value
  int W;
  A weight;
};

template <typename A, typename C>
__device__ __forceinline__ MsDeformAttnPoint<A> load_point(const MsDeformAttnPoints<C>& points,
                                                           const MsDeformAttnShape& shape,
                                                           const MsDeformAttnLevel* levels,
                                                           int64_t row, int point) {
  const MsDeformAttnLevel level = levels[point / shape.P];
  const int64_t index = row * shape.points() + point;
  const Vector<C, 2> location = load_vector<2>(points.sampling_locations + 2 * index);
  const A x = multiply_rounded(static_cast<A>(location.data[0]), static_cast<A>(level.W));
  const A y = multiply_rounded(static_cast<A>(location.data[1]), static_cast<A>(level.H));
  BilinearPoint<A> at =
      bilinear_point(y - static_cast<A>(0.5), x - static_cast<A>(0.5), level.H, level.W);
  at.pixel += level.start;
  return {at, level.W, static_cast<A>(points.attention_weights[index])};
}

// The point of lane `source` within each group of kLanes lanes; all lanes must take part.
template <int kLanes, typename A>
__device__ __forceinline__ MsDeformAttnPoint<A> broadcast(const MsDeformAttnPoint<A>& point,
                                                          int source) {
  // The host has checked that a token index, and so W, fits into 28 bits.
  const unsigned packed = __shfl_sync(
      kFullMask, static_cast<unsigned>(point.W) << 4 | point.at.corners, source, kLanes);
  MsDeformAttnPoint<A> result;
  result.at.pixel = __shfl_sync(kFullMask, point.at.pixel, source, kLanes);
  result.at.corners = packed & 0xf;
  result.at.lh = __shfl_sync(kFullMask, point.at.lh, source, kLanes);
  result.at.lw = __shfl_sync(kFullMask, point.at.lw, source, kLanes);
  result.W = static_cast<int>(packed >> 4);
  result.weight = __shfl_sync(kFullMask, point.weight, source, kLanes);
  return result;
}

// What one thread works on: kLanes neighbouring threads share a row, that is one head of one query.
template <int kLanes>
struct MsDeformAttnThread {
  int64_t row;
  bool active;    // false past the last row; such lanes still take part in shuffles
  int lane;       // within the row's lanes
  int64_t first;  // element of the value at token 0 of the row's image and head

  __device__ __forceinline__ explicit MsDeformAttnThread(const MsDeformAttnShape& shape) {
    row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
    active = row < shape.rows();
    lane = threadIdx.x % kLanes;
    const int64_t query = divide(row, shape.M);
    const int64_t image = divide(query, shape.Lq);
    first = (image * shape.S * shape.M + (row - query * shape.M)) * shape.Dh;
  }
};

}  // namespace mmdeform
