// Repeatable scatter-add: contributions are sorted by destination and each destination is summed by
// one owner in a fixed order, so no two threads add to the same place.

#pragma once

#include <cstdint>
#include <limits>
#include <optional>

#include "common/cuda_device.cuh"
#include "common/cuda_launch.h"
#include "common/cuda_tensor.h"

namespace mmdeform {

constexpr int64_t kNoSegment = std::numeric_limits<int64_t>::max();  // key of no destination

// Entries per sort; with keys, order, weights and the sort's own copies about 100 MB. The
// emulator's build sets fewer, so that small tensors take several sorts.
#ifndef MMDEFORM_CUDA_SORTED_ENTRIES
#define MMDEFORM_CUDA_SORTED_ENTRIES (int64_t{1} << 21)
#endif
constexpr int64_t kMaxSortedEntries = MMDEFORM_CUDA_SORTED_ENTRIES;

// Adds weights[e] * source(e, channel) of every entry e to row keys[e] of destination. `keys` are
// sorted, `order` holds the entries in that order. The group of threads at the first entry of a
// segment sums all of it.
template <typename A, int kVector, typename Source>
__global__ void __launch_bounds__(256, 4)
    segment_sum_kernel(const int64_t* __restrict__ keys, const int64_t* __restrict__ order,
                       const A* __restrict__ weights, int64_t entries, int row_length, int lanes,
                       Source source, A* __restrict__ destination) {
  const int64_t first = divide(static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, lanes);
  if (first >= entries) return;
  const int64_t key = keys[first];
  if (key == kNoSegment || (first > 0 && keys[first - 1] == key)) return;
  const int lane = threadIdx.x % lanes;
  for (int channel = lane * kVector; channel < row_length; channel += lanes * kVector) {
    A sum[kVector] = {};
    for (int64_t i = first; i < entries && keys[i] == key; ++i) {
      const int64_t entry = order[i];
      const A weight = weights[entry];
      const auto row = load_vector<kVector>(source(entry, channel));
#pragma unroll
      for (int c = 0; c < kVector; ++c) sum[c] += weight * static_cast<A>(row.data[c]);
    }
    A* target = destination + key * row_length + channel;
#pragma unroll
    for (int c = 0; c < kVector; ++c) target[c] += sum[c];
  }
}

// The smallest power of two of lanes, at least 4 and at most a warp, that covers a row.
inline int lanes_for(int64_t row_length, int vector) {
  int lanes = 4;
  while (lanes < kWarpSize && lanes * vector < row_length) lanes *= 2;
  return lanes;
}

// Host side: `keys` and `weights` hold one element per entry.
template <typename A, int kVector, typename Source>
void segment_sum(const CudaLauncher& launch, const Tensor& keys, const Tensor& weights,
                 int64_t row_length, const Source& source, A* destination) {
  const int64_t entries = keys.numel();
  const auto [sorted, order] = call_aten<Tensor, Tensor>(
      "aten::sort", "stable", keys, std::optional<bool>(true), int64_t{0}, false);
  const int lanes = lanes_for(row_length, kVector);
  launch("segment_sum_kernel", segment_sum_kernel<A, kVector, Source>,
         ceil_div(entries * lanes, 256), 256, 0, data_of<int64_t>(sorted), data_of<int64_t>(order),
         data_of<A>(weights), entries, static_cast<int>(row_length), lanes, source, destination);
}

}  // namespace mmdeform
