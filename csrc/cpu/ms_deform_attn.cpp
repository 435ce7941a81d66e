// Multi-scale deformable attention on the CPU: checks, memory and parallel loops around the
// kernels of ms_deform_attn_kernel.cpp.
#include "cpu/ms_deform_attn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/ms_deform_attn_checks.h"
#include "cpu/tensor.h"

namespace mmdeform {
namespace {

// Multiply-adds below which a second thread does not pay.
constexpr int64_t kGrain = 1 << 17;
// Samples per token from which it pays to copy a head's value before sampling it.
constexpr int64_t kSamplesPerCopy = 16;

const MsDeformAttnTable& table() { MMDEFORM_SELECT_KERNELS(ms_deform_attn_table) }

// A call's arguments as the kernels want them, and the memory behind them.
struct Call {
  Tensor value, locations, weights;
  std::vector<double> sizes;  // width and height as A
  std::vector<int32_t> integer_sizes;
  std::vector<int64_t> starts;
  std::vector<int64_t> zeros;
  MsDeformAttnArgs args;

  Call(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
       const Tensor& locations, const Tensor& weights)
      : value(value.stride(3) == 1 ? value : torch::stable::contiguous(value)),
        locations(torch::stable::contiguous(locations)),
        weights(torch::stable::contiguous(weights)) {
    args.tokens = value.size(1);
    args.queries = locations.size(1);
    args.heads = value.size(2);
    args.channels = value.size(3);
    args.points = locations.size(3) * locations.size(4);
    const int64_t item = value.element_size();
    args.value = this->value.const_data_ptr();
    args.value_image_bytes = this->value.stride(0) * item;
    args.value_token_bytes = this->value.stride(1) * item;
    args.value_head_bytes = this->value.stride(2) * item;
    args.locations = this->locations.const_data_ptr();
    args.weights = this->weights.const_data_ptr();
    zeros.resize(args.channels);
    args.zeros = zeros.data();
    if (value.scalar_type() == ScalarType::Double) {
      set_levels<double>(spatial_shapes, level_start_index, locations.size(4));
    } else {
      set_levels<float>(spatial_shapes, level_start_index, locations.size(4));
    }
  }
  Call(const Call&) = delete;

  template <typename A>
  void set_levels(const Tensor& spatial_shapes, const Tensor& level_start_index, int64_t points) {
    const Tensor shapes = torch::stable::contiguous(spatial_shapes);
    const Tensor first = torch::stable::contiguous(level_start_index);
    const int64_t* shape = static_cast<const int64_t*>(shapes.const_data_ptr());
    const int64_t* start = static_cast<const int64_t*>(first.const_data_ptr());
    sizes.resize(2 * args.points);
    integer_sizes.resize(2 * args.points);
    starts.resize(args.points);
    A* width_a = reinterpret_cast<A*>(sizes.data());
    A* height_a = width_a + args.points;
    int32_t* width = integer_sizes.data();
    int32_t* height = width + args.points;
    for (int64_t level = 0; level < first.size(0); ++level) {
      const int64_t h = shape[2 * level], w = shape[2 * level + 1];
      check_level(level, h, w, start[level], args.tokens);
      for (int64_t i = level * points; i < (level + 1) * points; ++i) {
        width_a[i] = static_cast<A>(w);
        height_a[i] = static_cast<A>(h);
        width[i] = static_cast<int32_t>(w);
        height[i] = static_cast<int32_t>(h);
        starts[i] = start[level];
      }
    }
    args.width_a = width_a;
    args.height_a = height_a;
    args.width = width;
    args.height = height;
    args.start = starts.data();
  }

  // Calls function(begin, end, scratch) in parallel for ranges of [0, count), each of which takes
  // `cost` multiply-adds.
  template <typename F>
  void parallel(int64_t count, int64_t cost, const F& function) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> scratch(kMsDeformAttnScratch * args.points);
      function(begin, end, scratch.data());
    });
  }

  // Runs forward or backward_points on all rows, one head after another.
  void run(void (*kernel)(const MsDeformAttnArgs&, const MsDeformAttnBlock&, int64_t*,
                          void*)) const {
    parallel(units() * args.queries, row_cost(), [&](int64_t begin, int64_t end, int64_t* scratch) {
      std::optional<Tensor> copy;
      for (int64_t row = begin; row < end;) {
        const int64_t unit = row / args.queries, first = row % args.queries;
        const int64_t last = std::min(args.queries, first + end - row);
        const bool copies = 4 * args.points * (last - first) > kSamplesPerCopy * args.tokens;
        if (copies && !copy) {
          copy = torch::stable::empty({args.tokens * args.channels}, value.scalar_type());
        }
        kernel(args, {unit / args.heads, unit % args.heads, first, last}, scratch,
               copies ? copy->mutable_data_ptr() : nullptr);
        row += last - first;
      }
    });
  }

  int64_t units() const { return value.size(0) * args.heads; }
  int64_t row_cost() const { return 4 * args.points * args.channels; }
};

Tensor ms_deform_attn_cpu(const Tensor& value, const Tensor& spatial_shapes,
                          const Tensor& level_start_index, const Tensor& sampling_locations,
                          const Tensor& attention_weights) {
  check_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations,
                       attention_weights);
  Call call(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const MsDeformAttnKernels& kernels =
      select_kernels(table(), "value", value.scalar_type(), sampling_locations.scalar_type());
  MsDeformAttnArgs& args = call.args;
  Tensor output = torch::stable::new_empty(
      value, {value.size(0), args.queries, args.heads * args.channels}, value.scalar_type());
  args.output = output.mutable_data_ptr();
  call.run(kernels.forward);
  return output;
}

// Writes grad_value; each task owns some channels of one image and head, so that tasks never write
// to the same place and sums are always taken in the same order.
void backward_value(const Call& call, const MsDeformAttnKernels& kernels) {
  const MsDeformAttnArgs& args = call.args;
  const int64_t units = call.units();
  // Split channels only where there are more threads than images and heads, and by whole
  // cache lines.
  constexpr int64_t kBlock = 16;
  const int64_t blocks = (args.channels + kBlock - 1) / kBlock;
  const int64_t wanted = torch::stable::get_num_threads() / std::max<int64_t>(1, units);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, blocks));
  const int64_t width = (blocks + parts - 1) / parts * kBlock;
  const int64_t cost = args.queries * call.row_cost() + args.tokens * args.channels;
  call.parallel(units * parts, cost / parts, [&](int64_t begin, int64_t end, int64_t* scratch) {
    const bool wide = call.value.scalar_type() == ScalarType::Double;
    Tensor sums = torch::stable::empty({(args.tokens + 1) * std::min(width, args.channels)},
                                       wide ? ScalarType::Double : ScalarType::Float);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / parts, channel = task % parts * width;
      const int64_t channels = std::min(width, args.channels - channel);
      if (channels <= 0) continue;
      kernels.backward_value(args, unit / args.heads, unit % args.heads, channel, channels, scratch,
                             sums.mutable_data_ptr());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward_cpu(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& level_start_index, const Tensor& sampling_locations,
    const Tensor& attention_weights, bool /*deterministic: always*/) {
  check_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations,
                       attention_weights);
  check_ms_deform_attn_grad(grad_output, value, sampling_locations);
  Call call(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const MsDeformAttnKernels& kernels =
      select_kernels(table(), "value", value.scalar_type(), sampling_locations.scalar_type());
  MsDeformAttnArgs& args = call.args;
  const auto new_like = [](const Tensor& tensor) {
    return torch::stable::new_empty(tensor, tensor.sizes(), tensor.scalar_type());
  };
  Tensor grad_value = new_like(value);
  Tensor grad_locations = new_like(sampling_locations);
  Tensor grad_weights = new_like(attention_weights);
  const Tensor grad = torch::stable::contiguous(grad_output);
  args.grad_output = grad.const_data_ptr();
  args.grad_value = grad_value.mutable_data_ptr();
  args.grad_locations = grad_locations.mutable_data_ptr();
  args.grad_weights = grad_weights.mutable_data_ptr();
  call.run(kernels.backward_points);
  backward_value(call, kernels);
  return {grad_value, grad_locations, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(mmdeform, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn_cpu));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward_cpu));
}

}  // namespace
}  // namespace mmdeform
