// Gradients of queries, keys, values and positions of deformable attention. The weights are made
// again from the logits and their logsumexp.

#pragma once

#include "cuda/dat_attn_tiles.cuh"

namespace mmdeform {

// What came back, and what the forward pass left. Its output is not needed: rounded to 16 bits it
// would cost the fp32 gradients of positions and table their precision.
template <typename T>
struct DatAttnGradInputs {
  using A = accumulation_t<T>;

  const T* __restrict__ grad_output;  // (B, M, Dh, H, W)
  const A* __restrict__ logsumexp;    // (B, M, H, W)
  // (B, M, H, W): the mean of the gradients of a query's weights, which comes off each of them.
  // Written with the gradients of the queries, read by the other kernels.
  A* __restrict__ delta;
};

// The mean is known only behind the last key, so what it takes off the sum is kept apart.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kDatAttnThreads)
    dat_attn_grad_query_kernel(DatAttnInputs<T> in, DatAttnGradInputs<T> grad,
                               T* __restrict__ grad_query) {  // (B, M, Dh, H, W)
  using A = accumulation_t<T>;
  using Query = DatAttnQuery<T, kLanes>;
  using Tile = DatAttnKeyTile<T, kLanes>;
  MMDEFORM_SHARED(Tile, tile, 1);
  const int blocks = dat_attn_query_blocks<T, kLanes>(in), head = blockIdx.x / blocks;
  const Query at(in, head, (blockIdx.x - head * blocks) * Query::Channels::kOwners);
  const auto query = at.load(in, in.query), grad_output = at.load(in, grad.grad_output);
  const A logsumexp = at.exists(in) ? grad.logsumexp[at.number(in)] : 0;

  typename Query::Channels mean_key, sum;
  A delta = 0;
  for (int first = 0; first < in.Ns; first += Query::Channels::kTileRows) {
    const int count = tile->load(in, head, first);
    for (int n = 0; n < count; ++n) {
      const A weight = std::exp(at.logit(in, query, *tile, n) - logsumexp);
      const A weighted = weight * grad_output.dot(tile->value(n));
      delta += weighted;
      mean_key.add(weight, tile->key(n));
      sum.add(weighted, tile->key(n));
    }
  }
  sum.add(-delta, mean_key);
  at.store(in, sum, in.scale, grad_query);
  if (at.exists(in) && Query::Channels::lane() == 0) grad.delta[at.number(in)] = delta;
}

// What threads that own keys meet: queries with their gradients, in shared memory.
template <typename T, int kLanes>
struct DatAttnQueryTile {
  using A = accumulation_t<T>;
  using Channels = DatAttnChannels<A, kLanes>;
  struct Row {
    A y, x, logsumexp, delta;
  };

  typename Channels::TileVector queries[Channels::kTileVectors];
  typename Channels::TileVector grads[Channels::kTileVectors];
  Row rows[Channels::kTileRows];

  // Loads queries from `first` on, up to `last`, and returns their number; barriers as for keys.
  __device__ int load(const DatAttnInputs<T>& in, const DatAttnGradInputs<T>& grad, int head,
                      int first, int last) {
    __syncthreads();
    const int64_t start = in.query_head(head);
    Channels::load_tile(in.query + start, in.Dh, in.queries(), first, queries);
    Channels::load_tile(grad.grad_output + start, in.Dh, in.queries(), first, grads);
    const int count = min(Channels::kTileRows, last - first);
    for (int n = threadIdx.x; n < count; n += kDatAttnThreads) {
      const int i = (first + n) / in.W, j = first + n - i * in.W;
      const int64_t number = static_cast<int64_t>(head) * in.queries() + first + n;
      rows[n] = {in.query_position(i, in.H), in.query_position(j, in.W), grad.logsumexp[number],
                 grad.delta[number]};
    }
    __syncthreads();
    return count;
  }

  __device__ const typename Channels::TileVector* query(int n) const {
    return queries + n * Channels::kRowVectors;
  }
  __device__ const typename Channels::TileVector* grad_output(int n) const {
    return grads + n * Channels::kRowVectors;
  }
};

// Sums over a run of queries, (runs, B, M, ...) in the accumulation type. Positions get one for
// each head, for a block knows only one of the heads of their group.
template <typename A>
struct DatAttnKeyGradients {
  A* __restrict__ key;        // (runs, B, M, Dh, Ns)
  A* __restrict__ value;      // (runs, B, M, Dh, Ns)
  A* __restrict__ positions;  // (runs, B, M, Ns, 2)
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kDatAttnThreads)
    dat_attn_grad_key_kernel(DatAttnInputs<T> in, DatAttnGradInputs<T> grad, int run_queries,
                             DatAttnKeyGradients<accumulation_t<T>> gradients) {
  using A = accumulation_t<T>;
  using Channels = DatAttnChannels<A, kLanes>;
  using Tile = DatAttnQueryTile<T, kLanes>;
  MMDEFORM_SHARED(Tile, tile, 1);
  const int blocks = (in.Ns - 1) / Channels::kOwners + 1;
  const int run_and_head = blockIdx.x / blocks, run = run_and_head / in.heads();
  const int head = run_and_head - run * in.heads();
  const int index = (blockIdx.x - run_and_head * blocks) * Channels::kOwners + threadIdx.x / kLanes;
  const bool exists = index < in.Ns;
  const Channels key(in.key + in.key_head(head), in.Dh, in.Ns, index);
  const Channels value(in.value + in.key_head(head), in.Dh, in.Ns, index);
  const A* position = in.head_positions(head) + static_cast<int64_t>(exists ? index : 0) * 2;
  const A key_y = position[0], key_x = position[1];

  Channels grad_key, grad_value;
  A grad_y = 0, grad_x = 0;
  const int last =
      static_cast<int>(min(static_cast<int64_t>(in.queries()), (run + int64_t{1}) * run_queries));
  for (int first = run * run_queries; first < last; first += Channels::kTileRows) {
    const int count = tile->load(in, grad, head, first, last);
    for (int n = 0; n < count; ++n) {
      const auto row = tile->rows[n];
      const DatAttnBias<A> bias(in.head_table(head), in.Th, in.Tw, row.y, row.x, key_y, key_x);
      const A logit = in.scale * key.dot(tile->query(n)) + bias.value();
      const A weight = std::exp(logit - row.logsumexp);
      const A grad_logit = weight * (value.dot(tile->grad_output(n)) - row.delta);
      grad_value.add(weight, tile->grad_output(n));
      grad_key.add(grad_logit, tile->query(n));
      grad_y += grad_logit * derivative_h(bias.point, bias.corners);
      grad_x += grad_logit * derivative_w(bias.point, bias.corners);
    }
  }
  grad_key.store(gradients.key + in.key_head(run_and_head), in.Dh, in.Ns, index, in.scale);
  grad_value.store(gradients.value + in.key_head(run_and_head), in.Dh, in.Ns, index, A(1));
  if (exists && Channels::lane() == 0) {
    A* target = gradients.positions + (static_cast<int64_t>(run_and_head) * in.Ns + index) * 2;
    target[0] = grad_y * dat_attn_table_slope<A>(in.Th);
    target[1] = grad_x * dat_attn_table_slope<A>(in.Tw);
  }
}

}  // namespace mmdeform
