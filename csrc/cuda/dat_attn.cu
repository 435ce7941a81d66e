// Deformable attention (DAT) on CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensor.h"
#include "common/dat_attn_checks.h"
#include "cuda/dat_attn_backward.cuh"
#include "cuda/dat_attn_forward.cuh"
#include "cuda/dat_attn_table.cuh"

namespace mmdeform {
namespace {

// Contiguous inputs, kept alive for as long as kernels are launched with their pointers. Positions
// and table are small: in the accumulation dtype, so that kernels need to know one dtype only.
struct Inputs {
  Tensor query, key, value, positions, table;
  double scale;
  bool align_corners;

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& positions,
         const Tensor& table, double scale, bool align_corners)
      : query(torch::stable::contiguous(query)),
        key(torch::stable::contiguous(key)),
        value(torch::stable::contiguous(value)),
        positions(accumulated(positions)),
        table(accumulated(table)),
        scale(scale),
        align_corners(align_corners) {
    // Kernels count in 32 bits within a head, and count heads through all images.
    constexpr int64_t kLimit = (int64_t{1} << 31) - (1 << 16);
    STD_TORCH_CHECK(key.size(2) <= kDatAttnMaxChannels, "key: expected at most ",
                    kDatAttnMaxChannels, " channels per head, got shape ",
                    shape_string(key.sizes()));
    STD_TORCH_CHECK(key.size(3) < kLimit, "key: expected fewer than ", kLimit, " keys, got shape ",
                    shape_string(key.sizes()));
    STD_TORCH_CHECK(
        query.size(0) * query.size(1) < kLimit && query.size(3) * query.size(4) < kLimit,
        "query: expected fewer than ", kLimit, " heads in all images, and pixels, got shape ",
        shape_string(query.sizes()));
    STD_TORCH_CHECK(table.size(1) * table.size(2) < kLimit, "table: expected fewer than ", kLimit,
                    " cells per head, got shape ", shape_string(table.sizes()));
  }

  template <typename T>
  DatAttnInputs<T> data() const {
    using A = accumulation_t<T>;
    const auto size = [](const Tensor& tensor, int dim) {
      return static_cast<int>(tensor.size(dim));
    };
    return {data_of<T>(query), data_of<T>(key), data_of<T>(value),     data_of<A>(positions),
            data_of<A>(table), query.size(0),   size(query, 1),        size(positions, 1),
            size(query, 2),    size(query, 3),  size(query, 4),        size(key, 3),
            size(table, 1),    size(table, 2),  static_cast<A>(scale), align_corners};
  }

 private:
  static Tensor accumulated(const Tensor& tensor) {
    return torch::stable::contiguous(
        torch::stable::to(tensor, accumulation_type(tensor.scalar_type())));
  }
};

// Calls function(Type<T>, Constant<lanes per query or key>): lanes for 32, 64 or 256 channels.
template <typename Function>
void dispatch(const Inputs& in, const Function& function) {
  const ScalarType data = in.query.scalar_type();
  dispatch_dtypes<torch::headeronly::Half, torch::headeronly::BFloat16>(
      "dat_attn", data, data, [&](auto type, auto) {
        using A = accumulation_t<typename decltype(type)::type>;
        constexpr int kChannels = DatAttnChannels<A, 1>::kChannels;
        if (in.query.size(2) <= 32) return function(type, Constant<32 / kChannels>());
        if (in.query.size(2) <= 64) return function(type, Constant<64 / kChannels>());
        function(type, Constant<kDatAttnMaxChannels / kChannels>());
      });
}

// Sums partial results, in the accumulation dtype, into one of this shape and dtype.
Tensor sum_partial(const Tensor& partial, const Shape& dims, const Tensor& like) {
  const Tensor sum = torch::stable::to(torch::stable::sum(partial, dims), like.scalar_type());
  return torch::stable::view(sum, like.sizes());
}

std::tuple<Tensor, Tensor> dat_attn_cuda(const Tensor& query, const Tensor& key,
                                         const Tensor& value, const Tensor& positions,
                                         const Tensor& table, double scale, bool align_corners) {
  check_dat_attn(query, key, value, positions, table, scale);
  const CudaLauncher launch(query);
  const Inputs inputs(query, key, value, positions, table, scale, align_corners);
  const Tensor output = torch::stable::new_empty(query, query.sizes());
  const Tensor logsumexp =
      torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(3), query.size(4)},
                               accumulation_type(query.scalar_type()));
  dispatch(inputs, [&](auto type, auto lanes) {
    using T = typename decltype(type)::type;
    constexpr int kLanes = decltype(lanes)::value;
    const DatAttnInputs<T> in = inputs.data<T>();
    launch("dat_attn_forward_kernel", dat_attn_forward_kernel<T, kLanes>,
           int64_t{in.heads()} * dat_attn_query_blocks<T, kLanes>(in), kDatAttnThreads, 0, in,
           mutable_data_of<T>(output), mutable_data_of<accumulation_t<T>>(logsumexp));
  });
  return {output, logsumexp};
}

struct KeyGradients {
  Tensor key, value, positions;
};

template <typename T, int kLanes>
KeyGradients grad_keys(const CudaLauncher& launch, const Inputs& inputs,
                       const DatAttnGradInputs<T>& grad) {
  using A = accumulation_t<T>;
  using Channels = DatAttnChannels<A, kLanes>;
  const DatAttnInputs<T> in = inputs.data<T>();
  const int64_t blocks = in.heads() * ceil_div(in.Ns, Channels::kOwners);
  const int64_t tiles = ceil_div(in.queries(), Channels::kTileRows);
  // No run is empty, and one in which nothing is left to do is none.
  const int64_t most =
      std::min(tiles, std::max<int64_t>(kDatAttnBlocks / std::max<int64_t>(blocks, 1), 1));
  const int64_t run_tiles = most == 0 ? 1 : ceil_div(tiles, most);
  const int64_t runs = ceil_div(tiles, run_tiles);
  const auto partial = [&](int64_t rows, int64_t columns) {
    const Shape shape{runs, in.B, in.G, in.M / in.G, rows, columns};
    return torch::stable::new_empty(inputs.positions, shape);
  };
  const KeyGradients result{partial(in.Dh, in.Ns), partial(in.Dh, in.Ns), partial(in.Ns, 2)};
  launch("dat_attn_grad_key_kernel", dat_attn_grad_key_kernel<T, kLanes>, runs * blocks,
         kDatAttnThreads, 0, in, grad, static_cast<int>(run_tiles * Channels::kTileRows),
         DatAttnKeyGradients<A>{mutable_data_of<A>(result.key), mutable_data_of<A>(result.value),
                                mutable_data_of<A>(result.positions)});
  return result;
}

// (M, runs, Th, Tw)
template <typename T, int kLanes>
Tensor grad_table(const CudaLauncher& launch, const Inputs& inputs,
                  const DatAttnGradInputs<T>& grad) {
  using A = accumulation_t<T>;
  constexpr int64_t kSharedBytes = 48 * 1024 - sizeof(DatAttnTableScratch<T, kLanes>);
  constexpr int64_t kPartialBytes = int64_t{32} << 20;
  const DatAttnInputs<T> in = inputs.data<T>();
  const int64_t table_bytes = std::max<int64_t>(int64_t{in.Th} * in.Tw * sizeof(A), 1);
  DatAttnTablePlan plan{};
  plan.pieces = dat_attn_query_blocks<T, kLanes>(in);
  plan.runs = static_cast<int>(
      std::min(in.B * plan.pieces,
               std::max<int64_t>(
                   std::min(kDatAttnBlocks, kPartialBytes / table_bytes) / std::max(in.M, 1), 1)));
  plan.sums_shared = table_bytes <= kSharedBytes;
  // As many groups as there are warps to cover the columns, and room for their sums.
  plan.groups = kDatAttnThreads / kWarpSize;
  while (plan.groups > 1 &&
         (plan.groups * table_bytes > kSharedBytes || plan.groups * in.Tw > kDatAttnThreads)) {
    plan.groups /= 2;
  }
  const Shape shape{in.M, plan.runs, in.Th, in.Tw};
  const Tensor partial = torch::stable::new_empty(inputs.table, shape);
  launch("dat_attn_grad_table_kernel", dat_attn_grad_table_kernel<T, kLanes>,
         int64_t{in.M} * plan.runs, kDatAttnThreads,
         plan.sums_shared ? plan.groups * table_bytes : 0, in, grad, plan,
         mutable_data_of<A>(partial));
  return partial;
}

// Every kernel owns what it writes and adds up in a fixed order: always deterministic.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dat_attn_backward_cuda(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& positions, const Tensor& table, const Tensor& output, const Tensor& logsumexp,
    double scale, bool align_corners, bool) {
  check_dat_attn(query, key, value, positions, table, scale);
  check_dat_attn_grad(grad_output, query, output, logsumexp);
  const CudaLauncher launch(query);
  const Inputs inputs(query, key, value, positions, table, scale, align_corners);
  const Tensor grad_outputs = torch::stable::contiguous(grad_output);
  const Tensor logsumexps = torch::stable::contiguous(logsumexp);
  const Tensor delta = torch::stable::new_empty(logsumexps, logsumexps.sizes());
  const Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  KeyGradients partial;
  Tensor partial_table;
  dispatch(inputs, [&](auto type, auto lanes) {
    using T = typename decltype(type)::type;
    using A = accumulation_t<T>;
    constexpr int kLanes = decltype(lanes)::value;
    const DatAttnInputs<T> in = inputs.data<T>();
    const DatAttnGradInputs<T> grad{data_of<T>(grad_outputs), data_of<A>(logsumexps),
                                    mutable_data_of<A>(delta)};
    launch("dat_attn_grad_query_kernel", dat_attn_grad_query_kernel<T, kLanes>,
           int64_t{in.heads()} * dat_attn_query_blocks<T, kLanes>(in), kDatAttnThreads, 0, in, grad,
           mutable_data_of<T>(grad_query));
    partial = grad_keys<T, kLanes>(launch, inputs, grad);
    partial_table = grad_table<T, kLanes>(launch, inputs, grad);
  });
  return {grad_query, sum_partial(partial.key, {0}, key), sum_partial(partial.value, {0}, value),
          sum_partial(partial.positions, {0, 3}, positions),
          sum_partial(partial_table, {1}, table)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, MMDEFORM_CUDA_DISPATCH_KEY, m) {
  m.impl("dat_attn", TORCH_BOX(&dat_attn_cuda));
  m.impl("dat_attn_backward", TORCH_BOX(&dat_attn_backward_cuda));
}

}  // namespace mmdeform
