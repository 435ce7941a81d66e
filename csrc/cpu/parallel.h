// Loops over work items with one scratch buffer per worker.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/checks.h"

namespace mmdeform {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Workers for a loop over `items`; each gets a contiguous range of them.
inline int64_t worker_count(int64_t items) {
  return std::min<int64_t>(torch::stable::get_num_threads(), items);
}

// Calls function(worker, item) for every item; a worker's items run one after another.
template <typename F>
void parallel_items(int64_t items, const F& function) {
  const int64_t workers = worker_count(items);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const int64_t last = items * (worker + 1) / workers;
      for (int64_t item = items * worker / workers; item < last; ++item) function(worker, item);
    }
  });
}

// An uninitialised buffer of `count` elements of `type` on the CPU, from torch's allocator, so
// that memory is accounted for and poisoned in deterministic mode.
inline Tensor scratch(const Tensor& like, ScalarType type, int64_t count) {
  return torch::stable::new_empty(like, {count}, type);
}

}  // namespace mmdeform
