// Forward kernel of deformable attention.

#pragma once

#include <limits>

#include "cuda/dat_attn_tiles.cuh"

namespace mmdeform {

// The softmax is kept up to date while the keys pass by: sums are relative to the greatest logit so
// far, and are scaled down when it grows.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kDatAttnThreads)
    dat_attn_forward_kernel(DatAttnInputs<T> in,
                            T* __restrict__ output,                       // (B, M, Dh, H, W)
                            accumulation_t<T>* __restrict__ logsumexp) {  // (B, M, H, W)
  using A = accumulation_t<T>;
  using Query = DatAttnQuery<T, kLanes>;
  using Tile = DatAttnKeyTile<T, kLanes>;
  MMDEFORM_SHARED(Tile, tile, 1);
  const int blocks = dat_attn_query_blocks<T, kLanes>(in), head = blockIdx.x / blocks;
  const Query at(in, head, (blockIdx.x - head * blocks) * Query::Channels::kOwners);
  const auto query = at.load(in, in.query);

  typename Query::Channels sum;
  A weights = 0, greatest = std::numeric_limits<A>::lowest();
  for (int first = 0; first < in.Ns; first += Query::Channels::kTileRows) {
    const int count = tile->load(in, head, first);
    for (int n = 0; n < count; ++n) {
      const A logit = at.logit(in, query, *tile, n);
      if (logit > greatest) {
        const A factor = std::exp(greatest - logit);
        sum.scale(factor);
        weights *= factor;
        greatest = logit;
      }
      const A weight = std::exp(logit - greatest);
      weights += weight;
      sum.add(weight, tile->value(n));
    }
  }
  at.store(in, sum, 1 / weights, output);
  if (at.exists(in) && Query::Channels::lane() == 0) {
    logsumexp[at.number(in)] = greatest + std::log(weights);
  }
}

}  // namespace mmdeform
