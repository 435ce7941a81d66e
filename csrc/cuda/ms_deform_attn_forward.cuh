// Forward kernel of multi-scale deformable attention.

#pragma once

#include "cuda/ms_deform_attn_points.cuh"

namespace mmdeform {

// A lane owns kVector neighbouring channels of a row. The lanes of a row locate kLanes points at a
// time, one each, and share them by shuffle.
template <typename T, typename C, int kVector, int kLanes>
__global__ void __launch_bounds__(256)
    ms_deform_attn_forward_kernel(const T* __restrict__ value,  // (N, S, M, Dh)
                                  MsDeformAttnPoints<C> points, MsDeformAttnShape shape,
                                  T* __restrict__ output) {  // (N, Lq, M, Dh)
  using A = accumulation_t<T>;
  MMDEFORM_DYNAMIC_SHARED(MsDeformAttnLevel, levels);
  load_levels(points, shape, levels);
  const MsDeformAttnThread<kLanes> thread(shape);
  const int64_t token_stride = static_cast<int64_t>(shape.M) * shape.Dh;

  for (int first_channel = 0; first_channel < shape.Dh; first_channel += kLanes * kVector) {
    const int channel = first_channel + thread.lane * kVector;
    const bool owns_channel = thread.active && channel < shape.Dh;
    const T* image = value + thread.first + channel;
    A sum[kVector] = {};
    for (int base = 0; base < shape.points(); base += kLanes) {
      MsDeformAttnPoint<A> own{};
      if (thread.active && base + thread.lane < shape.points()) {
        own = load_point<A>(points, shape, levels, thread.row, base + thread.lane);
      }
      const int count = min(kLanes, shape.points() - base);
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        MsDeformAttnPoint<A> point = broadcast<kLanes>(own, j);
        if (!owns_channel) point.at.corners = 0;  // no branch: loads of several points overlap
        Vector<T, kVector> corners[4];
        load_corners(image, token_stride, point.at, point.W, corners);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const A weight = point.weight * corner_weight(point.at, k);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum[i] += weight * static_cast<A>(corners[k].data[i]);
        }
      }
    }
    if (owns_channel) store_converted(output + thread.row * shape.Dh + channel, sum);
  }
}

}  // namespace mmdeform
