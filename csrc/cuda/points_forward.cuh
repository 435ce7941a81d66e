// Forward kernel of weighted sums of sampled points.

#pragma once

#include "cuda/points.cuh"

namespace mmdeform {

// A lane owns kVector neighbouring channels of a row. The lanes of a row locate kLanes points at a
// time, one each, and share them by shuffle. With fewer lanes than a warp they cover a row at once,
// else they walk along it.
template <typename T, typename Source, int kVector, int kLanes>
__global__ void __launch_bounds__(256)
    points_forward_kernel(const T* __restrict__ value, Source source, T* __restrict__ output) {
  using A = accumulation_t<T>;
  constexpr int kUnrolled = kLanes < 4 ? kLanes : 4;
  MMDEFORM_DYNAMIC_SHARED(typename Source::Shared, shared);
  source.prepare(shared);
  const PointsShape& shape = source.shape;
  const RowThread<kLanes> thread(shape);
  const auto row = source.row(thread.index, shared);
  const int pixel_stride = shape.groups * shape.channels;

  const int end_channel = kLanes < kWarpSize ? 1 : shape.channels;
  for (int first_channel = 0; first_channel < end_channel; first_channel += kLanes * kVector) {
    const int channel = first_channel + thread.lane * kVector;
    const bool owns_channel = thread.active && channel < shape.channels;
    const T* image = value + thread.first + channel;
    A sum[kVector] = {};
    for (int base = 0; base < shape.points; base += kLanes) {
      WeightedPoint<A> own{};
      if (thread.active && base + thread.lane < shape.points) {
        own = source.load(row, base + thread.lane);
      }
      const int count = min(kLanes, shape.points - base);
#pragma unroll kUnrolled
      for (int j = 0; j < count; ++j) {
        WeightedPoint<A> point = broadcast<kLanes>(own, j);
        if (!owns_channel) point.at.corners = 0;  // no branch: loads of several points overlap
        Vector<T, kVector> corners[4];
        load_corners(image, pixel_stride, point.at, point.W, corners);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const A weight = point.weight * corner_weight(point.at, k);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum[i] += weight * static_cast<A>(corners[k].data[i]);
        }
      }
    }
    if (owns_channel) store_converted(output + thread.index.row * shape.channels + channel, sum);
  }
}

}  // namespace mmdeform
