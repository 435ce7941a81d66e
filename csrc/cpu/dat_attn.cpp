// Attention of DAT on the CPU: checks, memory and parallel loops around the kernels of
// dat_attn_kernel.cpp.
#include "cpu/dat_attn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/dat_attn_checks.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace mmdeform {
namespace {

// Chunks of tiles over all units: enough for as many threads, and a bound on the memory of sums.
constexpr int64_t kItems = 32;
// Queries that a chunk has at least.
constexpr int64_t kQueriesPerChunk = 256;

const DatAttnTable& table() { MMDEFORM_SELECT_KERNELS(dat_attn_table) }

// A call's arguments as the kernels want them, and the memory behind them.
struct Call {
  Tensor query, key, value, positions, bias_table;
  const DatAttnKernels& kernels;
  ScalarType sums_type;
  DatAttnArgs args;

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& positions,
       const Tensor& bias_table, double scale, bool align_corners)
      : query(torch::stable::contiguous(query)),
        key(torch::stable::contiguous(key)),
        value(torch::stable::contiguous(value)),
        positions(torch::stable::contiguous(positions)),
        bias_table(torch::stable::contiguous(bias_table)),
        kernels(select_kernels(table(), "query", query.scalar_type(), positions.scalar_type())),
        sums_type(accumulation_type(query.scalar_type())) {
    args.batch = query.size(0);
    args.heads = query.size(1);
    args.groups = positions.size(1);
    args.channels = query.size(2);
    args.height = query.size(3);
    args.width = query.size(4);
    args.keys = key.size(3);
    args.table_height = bias_table.size(1);
    args.table_width = bias_table.size(2);
    args.scale = scale;
    args.align_corners = align_corners;
    const int64_t most = args.height * args.width / kQueriesPerChunk;
    args.chunks =
        std::clamp<int64_t>(kItems / std::max<int64_t>(1, units()), 1, std::max<int64_t>(1, most));
    args.query = this->query.const_data_ptr();
    args.key = this->key.const_data_ptr();
    args.value = this->value.const_data_ptr();
    args.positions = this->positions.const_data_ptr();
    args.table = this->bias_table.const_data_ptr();
  }
  Call(const Call&) = delete;

  int64_t units() const { return args.batch * args.heads; }

  Tensor sums(int64_t count) const { return scratch(query, sums_type, count); }

  // Runs forward or backward on all chunks of all units.
  void run(void (*kernel)(const DatAttnArgs&, int64_t, int64_t, void*), int64_t numbers) const {
    const int64_t items = units() * args.chunks;
    const Tensor memory = sums(worker_count(items) * numbers);
    char* first = static_cast<char*>(memory.mutable_data_ptr());
    const int64_t bytes = numbers * memory.element_size();
    parallel_items(items, [&](int64_t worker, int64_t item) {
      kernel(args, item / args.chunks, item % args.chunks, first + worker * bytes);
    });
  }
};

std::tuple<Tensor, Tensor> dat_attn_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const Tensor& positions, const Tensor& bias_table,
                                        double scale, bool align_corners) {
  check_dat_attn(query, key, value, positions, bias_table, scale);
  Call call(query, key, value, positions, bias_table, scale, align_corners);
  DatAttnArgs& args = call.args;
  Tensor output = torch::stable::new_empty(query, query.sizes(), query.scalar_type());
  Tensor logsumexp = torch::stable::new_empty(
      query, {args.batch, args.heads, args.height, args.width}, call.sums_type);
  args.output = output.mutable_data_ptr();
  args.logsumexp = logsumexp.mutable_data_ptr();
  call.run(call.kernels.forward, call.kernels.forward_scratch(args));
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dat_attn_backward_cpu(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& positions, const Tensor& bias_table, const Tensor& output,
    const Tensor& logsumexp, double scale, bool align_corners, bool /*deterministic: always*/) {
  check_dat_attn(query, key, value, positions, bias_table, scale);
  check_dat_attn_grad(grad_output, query, output, logsumexp);
  Call call(query, key, value, positions, bias_table, scale, align_corners);
  const DatAttnKernels& kernels = call.kernels;
  DatAttnArgs& args = call.args;
  const Tensor grad = torch::stable::contiguous(grad_output);
  const Tensor whole_output = torch::stable::contiguous(output);
  const Tensor whole_logsumexp = torch::stable::contiguous(logsumexp);
  args.grad_output = grad.const_data_ptr();
  // The backward pass only reads these two.
  args.output = const_cast<void*>(whole_output.const_data_ptr());
  args.logsumexp = const_cast<void*>(whole_logsumexp.const_data_ptr());
  const auto new_like = [](const Tensor& tensor) {
    return torch::stable::new_empty(tensor, tensor.sizes(), tensor.scalar_type());
  };
  Tensor grad_query = new_like(query), grad_key = new_like(key), grad_value = new_like(value);
  Tensor grad_positions = new_like(positions), grad_table = new_like(bias_table);
  args.grad_query = grad_query.mutable_data_ptr();
  args.grad_key = grad_key.mutable_data_ptr();
  args.grad_value = grad_value.mutable_data_ptr();
  args.grad_positions = grad_positions.mutable_data_ptr();
  args.grad_table = grad_table.mutable_data_ptr();
  const int64_t items = call.units() * args.chunks;
  const bool split = args.chunks > 1;
  const Tensor key_sums = call.sums(split ? 2 * items * kernels.unit_sums(args) : 0);
  const Tensor position_sums = call.sums(items * kernels.position_sums(args));
  const Tensor table_sums = call.sums(items * args.table_height * args.table_width);
  args.key_sums = split ? key_sums.mutable_data_ptr() : nullptr;
  args.position_sums = position_sums.mutable_data_ptr();
  args.table_sums = table_sums.mutable_data_ptr();
  call.run(kernels.backward, kernels.backward_scratch(args));
  if (split) {
    parallel_items(call.units(), [&](int64_t, int64_t unit) { kernels.finish_unit(args, unit); });
  }
  parallel_items(args.batch * args.groups, [&](int64_t, int64_t item) {
    kernels.finish_positions(args, item / args.groups, item % args.groups);
  });
  parallel_items(args.heads, [&](int64_t, int64_t head) { kernels.finish_table(args, head); });
  return {grad_query, grad_key, grad_value, grad_positions, grad_table};
}

STABLE_TORCH_LIBRARY_IMPL(mmdeform, CPU, m) {
  m.impl("dat_attn", TORCH_BOX(&dat_attn_cpu));
  m.impl("dat_attn_backward", TORCH_BOX(&dat_attn_backward_cpu));
}

}  // namespace
}  // namespace mmdeform
