// Weighted sums of sampled points: what operators share whose groups of adjacent channels have
// their points in common, be they heads of attention or groups of DCNv3.
//
// An operator brings a source of points, a struct that is passed to the kernels:
//
//   Coordinate                    dtype of positions and weights
//   Shared                        element of what a block keeps in shared memory
//   PointsShape shape
//   size_t shared_bytes()         on the host
//   prepare(Shared*)              fills shared memory; all threads of the block take part
//   row(RowIndex, const Shared*)  what the points of one row have in common
//   load(row, i)                  point i of a row, a WeightedPoint
//   store(PointGradients, row, i, PointGradient)

#pragma once

#include "common/cuda_device.cuh"

namespace mmdeform {

// The value has the shape (N, pixels, groups, channels), the output (N, queries, groups, channels).
struct PointsShape {
  int64_t N, pixels, queries;
  int groups, channels;
  int points;  // per row

  __host__ __device__ int64_t rows() const { return N * queries * groups; }
};

// A row is one group of one query.
struct RowIndex {
  int64_t row;
  int64_t image, query;  // the query within its image
  int group;

  __device__ __forceinline__ RowIndex(const PointsShape& shape, int64_t row) : row(row) {
    const int64_t first_group = divide(row, shape.groups);
    group = static_cast<int>(row - first_group * shape.groups);
    image = divide(first_group, shape.queries);
    query = first_group - image * shape.queries;
  }
};

template <typename A>
struct WeightedPoint {
  BilinearPoint<A> at;  // at.pixel counts the pixels of an image
  int W;                // pixels from one image row to the next, below 2**28
  A weight;
};

// Gradients of one point: of its position in pixels, and of its weight.
template <typename A>
struct PointGradient {
  A x, y, weight;
};

// Where gradients of positions and weights go; laid out as these are.
template <typename C>
struct PointGradients {
  C* __restrict__ positions;
  C* __restrict__ weights;
};

// The point of lane `source` within each group of kLanes lanes; all lanes must take part.
template <int kLanes, typename A>
__device__ __forceinline__ WeightedPoint<A> broadcast(const WeightedPoint<A>& point, int source) {
  const unsigned packed = __shfl_sync(
      kFullMask, static_cast<unsigned>(point.W) << 4 | point.at.corners, source, kLanes);
  WeightedPoint<A> result;
  result.at.pixel = __shfl_sync(kFullMask, point.at.pixel, source, kLanes);
  result.at.corners = packed & 0xf;
  result.at.lh = __shfl_sync(kFullMask, point.at.lh, source, kLanes);
  result.at.lw = __shfl_sync(kFullMask, point.at.lw, source, kLanes);
  result.W = static_cast<int>(packed >> 4);
  result.weight = __shfl_sync(kFullMask, point.weight, source, kLanes);
  return result;
}

// What one thread works on: kLanes neighbouring threads share a row.
template <int kLanes>
struct RowThread {
  RowIndex index;
  bool active;    // false past the last row; such lanes still take part in shuffles
  int lane;       // within the row's lanes
  int64_t first;  // element of the value at pixel 0 of the row's image and group

  __device__ __forceinline__ explicit RowThread(const PointsShape& shape)
      : index(shape,
              static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes) {
    active = index.row < shape.rows();
    lane = threadIdx.x % kLanes;
    first = (index.image * shape.pixels * shape.groups + index.group) * shape.channels;
  }
};

}  // namespace mmdeform
