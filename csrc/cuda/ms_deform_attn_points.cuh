// Sampling points of multi-scale deformable attention.

#pragma once

#include "cuda/points.cuh"

namespace mmdeform {

struct MsDeformAttnLevel {
  int H, W, start;
};

// A source of points, see points.cuh: the pixels of an image are its tokens, the groups are heads.
// Tensors are contiguous.
template <typename C>
struct MsDeformAttnPoints {
  using Coordinate = C;
  using Shared = MsDeformAttnLevel;
  using A = accumulation_t<C>;

  PointsShape shape;
  int L, P;
  const int64_t* __restrict__ spatial_shapes;     // (L, 2): H, W
  const int64_t* __restrict__ level_start_index;  // (L)
  const C* __restrict__ sampling_locations;       // (N, Lq, M, L, P, 2): x, y
  const C* __restrict__ attention_weights;        // (N, Lq, M, L, P)

  struct Row {
    const MsDeformAttnLevel* levels;
    int64_t first_point;
  };

  size_t shared_bytes() const { return L * sizeof(MsDeformAttnLevel); }

  // Stops the kernel where a level does not fit into the value.
  __device__ __forceinline__ void prepare(MsDeformAttnLevel* levels) const {
    for (int l = threadIdx.x; l < L; l += blockDim.x) {
      const int64_t H = spatial_shapes[2 * l], W = spatial_shapes[2 * l + 1];
      const int64_t start = level_start_index[l], S = shape.pixels;
      const bool fits = H >= 0 && W >= 0 && start >= 0 && start <= S &&
                        (H == 0 || W == 0 || (H <= S && W <= S && start + H * W <= S));
      if (!fits) __trap();
      const bool empty = H == 0 || W == 0;
      levels[l] = {empty ? 0 : static_cast<int>(H), empty ? 0 : static_cast<int>(W),
                   static_cast<int>(start)};
    }
    __syncthreads();
  }

  __device__ __forceinline__ Row row(const RowIndex& index, const MsDeformAttnLevel* levels) const {
    return {levels, index.row * shape.points};
  }

  __device__ __forceinline__ WeightedPoint<A> load(const Row& row, int i) const {
    const MsDeformAttnLevel level = row.levels[i / P];
    const int64_t index = row.first_point + i;
    const Vector<C, 2> location = load_vector<2>(sampling_locations + 2 * index);
    const A x = multiply_rounded(static_cast<A>(location.data[0]), static_cast<A>(level.W));
    const A y = multiply_rounded(static_cast<A>(location.data[1]), static_cast<A>(level.H));
    BilinearPoint<A> at =
        bilinear_point(y - static_cast<A>(0.5), x - static_cast<A>(0.5), level.H, level.W);
    at.pixel += level.start;
    return {at, level.W, static_cast<A>(attention_weights[index])};
  }

  __device__ __forceinline__ void store(const PointGradients<C>& gradients, const Row& row, int i,
                                        const PointGradient<A>& gradient) const {
    const MsDeformAttnLevel level = row.levels[i / P];
    const int64_t index = row.first_point + i;
    const A location[2] = {gradient.x * level.W, gradient.y * level.H};
    store_converted(gradients.positions + 2 * index, location);
    gradients.weights[index] = static_cast<C>(gradient.weight);
  }
};

}  // namespace mmdeform
