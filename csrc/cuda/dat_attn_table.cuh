// Gradient of the bias table of deformable attention, without atomics.

#pragma once

#include "cuda/dat_attn_backward.cuh"

namespace mmdeform {

// A block owns a head and a run of pieces, each as many neighbouring queries of one image as it has
// room for. Its threads form groups, which share the keys of a tile; within a group each thread
// owns columns of the group's own sums. Threads only ever add to what they own.
struct DatAttnTablePlan {
  int pieces;        // of an image
  int runs;          // of all pieces of all images
  int groups;        // divides kDatAttnThreads
  bool sums_shared;  // the groups' sums lie in shared memory; else there is one group
};

template <typename T, int kLanes>
struct DatAttnTableScratch {
  using A = accumulation_t<T>;
  using Channels = DatAttnChannels<A, kLanes>;

  DatAttnKeyTile<T, kLanes> tile;
  A grad_logits[Channels::kTileRows][Channels::kOwners];
  A y[Channels::kOwners], x[Channels::kOwners];  // of the queries
};

// Adds the gradients of a tile's logits to the table's. What bilinear interpolation gives to the
// queries of one row it takes from two rows of the table, with the same weights for all of them, so
// they are summed for each column of the table first.
template <typename T, int kLanes>
__device__ void dat_attn_add_to_table(const DatAttnInputs<T>& in,
                                      const DatAttnTableScratch<T, kLanes>& scratch, int keys,
                                      int first, int last, int groups, accumulation_t<T>* sums) {
  using A = accumulation_t<T>;
  const int group_threads = kDatAttnThreads / groups, group = threadIdx.x / group_threads;
  const A first_x = in.query_position(0, in.W), last_x = in.query_position(in.W - 1, in.W);
  for (int n = group; n < keys; n += groups) {
    const A key_y = scratch.tile.y(n), key_x = scratch.tile.x(n);
    // Columns of the table at the ends of a row of queries. NaN fails the comparison.
    const A begin = dat_attn_table_position(first_x, key_x, in.Tw);
    const A end = dat_attn_table_position(last_x, key_x, in.Tw);
    if (!(end > -1 && begin < in.Tw)) continue;
    const A queries_per_column =
        end > begin ? static_cast<A>(in.W - 1) / (end - begin) : static_cast<A>(in.W);
    for (int i = first / in.W; i <= (last - 1) / in.W; ++i) {
      const int row_start = i * in.W;
      const int from = max(first, row_start), to = min(last, row_start + in.W);
      const A h = dat_attn_table_position(scratch.y[from - first], key_y, in.Th);
      if (!(h > -1 && h < in.Th)) continue;
      const A h_floor = std::floor(h), lh = h - h_floor;
      const int h_low = static_cast<int>(h_floor);
      for (int c = threadIdx.x % group_threads; c < in.Tw; c += group_threads) {
        const A near = (static_cast<A>(c) - 1 - begin) * queries_per_column;
        const A far = (static_cast<A>(c) + 1 - begin) * queries_per_column;
        const int j_first = max(from, row_start + static_cast<int>(std::floor(near)));
        const int j_last = min(to - 1, row_start + static_cast<int>(std::ceil(far)));
        A sum = 0;
        for (int j = j_first - first; j <= j_last - first; ++j) {
          const A w = dat_attn_table_position(scratch.x[j], key_x, in.Tw);
          const A tent = 1 - std::abs(w - static_cast<A>(c));
          if (tent > 0) sum += tent * scratch.grad_logits[n][j];
        }
        A* const cell = sums + static_cast<int64_t>(h_low) * in.Tw + c;
        if (h_low >= 0) cell[0] += (1 - lh) * sum;
        if (h_low + 1 < in.Th) cell[in.Tw] += lh * sum;
      }
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kDatAttnThreads)
    dat_attn_grad_table_kernel(DatAttnInputs<T> in, DatAttnGradInputs<T> grad,
                               DatAttnTablePlan plan,
                               accumulation_t<T>* __restrict__ partial) {  // (M, runs, Th, Tw)
  using A = accumulation_t<T>;
  using Query = DatAttnQuery<T, kLanes>;
  using Channels = typename Query::Channels;
  using Scratch = DatAttnTableScratch<T, kLanes>;
  MMDEFORM_SHARED(Scratch, scratch, 1);
  MMDEFORM_DYNAMIC_SHARED(A, shared_sums);  // (groups, Th, Tw)
  const int m = blockIdx.x / plan.runs, run = blockIdx.x - m * plan.runs;
  const int64_t pieces = in.B * plan.pieces;
  const int cells = in.Th * in.Tw, thread = threadIdx.x;
  A* const target = partial + static_cast<int64_t>(blockIdx.x) * cells;
  A* const sums = plan.sums_shared ? shared_sums : target;
  const int group_threads = kDatAttnThreads / plan.groups;
  A* const own = sums + thread / group_threads * static_cast<int64_t>(cells);
  for (int c = thread % group_threads; c < in.Tw; c += group_threads) {
    for (int r = 0; r < in.Th; ++r) own[static_cast<int64_t>(r) * in.Tw + c] = 0;
  }

  for (int64_t piece = run * pieces / plan.runs; piece < (run + 1) * pieces / plan.runs; ++piece) {
    const int image = static_cast<int>(piece / plan.pieces);
    const int first = static_cast<int>(piece - image * int64_t{plan.pieces}) * Channels::kOwners;
    const int last = min(first + Channels::kOwners, in.queries());
    const Query at(in, image * in.M + m, first);
    const auto query = at.load(in, in.query), grad_output = at.load(in, grad.grad_output);
    const A logsumexp = at.exists(in) ? grad.logsumexp[at.number(in)] : 0;
    const A delta = at.exists(in) ? grad.delta[at.number(in)] : 0;
    for (int first_key = 0; first_key < in.Ns; first_key += Channels::kTileRows) {
      const int count = scratch->tile.load(in, at.head, first_key);
      const bool writes = Channels::lane() == 0;
      if (writes) scratch->y[at.index - first] = at.y, scratch->x[at.index - first] = at.x;
      for (int n = 0; n < count; ++n) {
        const A weight = std::exp(at.logit(in, query, scratch->tile, n) - logsumexp);
        const A grad_weight = grad_output.dot(scratch->tile.value(n));
        if (writes) scratch->grad_logits[n][at.index - first] = weight * (grad_weight - delta);
      }
      __syncthreads();
      dat_attn_add_to_table(in, *scratch, count, first, last, plan.groups, own);
    }
  }
  if (!plan.sums_shared) return;
  __syncthreads();
  for (int cell = thread; cell < cells; cell += kDatAttnThreads) {
    A sum = 0;
    for (int g = 0; g < plan.groups; ++g) sum += shared_sums[g * cells + cell];
    target[cell] = sum;
  }
}

}  // namespace mmdeform
