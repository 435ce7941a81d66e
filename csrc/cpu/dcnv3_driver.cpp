#include "cpu/dcnv3_driver.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/dcnv3.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace mmdeform {
namespace {

// Multiply-adds below which a second thread does not pay.
constexpr int64_t kGrain = 1 << 17;

const Dcnv3Table& table(){MMDEFORM_SELECT_KERNELS(dcnv3_table)}

// The kernels read pixels at one stride, and channels side by side.
Tensor with_pixel_stride(const Tensor& input) {
  const bool fits = input.stride(3) == 1 && input.stride(1) == input.size(2) * input.stride(2);
  return fits ? input : torch::stable::contiguous(input);
}

// A call's arguments as the kernels want them, and the memory behind them.
struct Call {
  Dcnv3Geometry g;
  ScalarType accumulation;
  Tensor input, offset;
  std::optional<Tensor> mask;
  std::vector<double> tap_positions;  // x and y as A
  std::vector<int64_t> channels;
  std::vector<int64_t> zeros;
  Dcnv3Args args;

  Call(const Tensor& input, const Dcnv3Points& points, const Dcnv3Geometry& geometry)
      : g(geometry),
        accumulation(accumulation_type(input.scalar_type())),
        input(with_pixel_stride(input)),
        offset(torch::stable::contiguous(points.offset)),
        zeros(geometry.group_channels) {
    args.geometry = g;
    args.points = g.groups * g.taps();
    args.input = this->input.const_data_ptr();
    args.input_image_bytes = this->input.stride(0) * input.element_size();
    args.input_pixel_bytes = this->input.stride(2) * input.element_size();
    args.offset = offset.const_data_ptr();
    args.offset_row = offset.size(3);
    args.weight = nullptr;
    if (points.mask.has_value()) {
      mask = torch::stable::contiguous(*points.mask);
      args.weight = mask->const_data_ptr();
    }
    args.zeros = zeros.data();
    if (accumulation == ScalarType::Double) {
      set_taps<double>();
    } else {
      set_taps<float>();
    }
  }
  Call(const Call&) = delete;

  template <typename A>
  void set_taps() {
    const int64_t size = divide_up(args.points, kPointBlock) * kPointBlock;
    tap_positions.resize(2 * size);
    channels.resize(size);
    A* x = reinterpret_cast<A*>(tap_positions.data());
    A* y = x + size;
    int64_t i = 0;
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t tap = 0; tap < g.kernel_h * g.kernel_w; ++tap) {
        if (g.remove_center && tap == g.kernel_h * g.kernel_w / 2) continue;
        x[i] = static_cast<A>(tap / g.kernel_h * g.dilation_w - g.center_w());
        y[i] = static_cast<A>(tap % g.kernel_h * g.dilation_h - g.center_h());
        channels[i] = group * g.group_channels;
        ++i;
      }
    }
    args.taps = {x, y, channels.data()};
  }

  // Calls function(begin, end, scratch) in parallel for ranges of [0, count), each of which takes
  // `cost` multiply-adds.
  template <typename F>
  void parallel(int64_t count, int64_t cost, const F& function) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> scratch(dcnv3_scratch(args.points));
      function(begin, end, scratch.data());
    });
  }

  // Runs forward or backward_points on all output pixels.
  void run(void (*kernel)(const Dcnv3Args&, const Dcnv3Block&, int64_t*)) const {
    const int64_t pixels = g.out_pixels();
    parallel(g.batch * pixels, pixel_cost(), [&](int64_t begin, int64_t end, int64_t* scratch) {
      while (begin < end) {
        const int64_t image = begin / pixels, first = begin % pixels;
        const int64_t last = std::min(pixels, first + end - begin);
        kernel(args, {image, first, last}, scratch);
        begin += last - first;
      }
    });
  }

  int64_t pixel_cost() const { return 4 * g.taps() * g.channels(); }
};

// Adjacent channels of an image: whole groups or part of one.
struct Channels {
  int64_t begin, count;
};

// Divides the channels of an image into about `wanted` parts, inside groups by whole cache lines.
std::vector<Channels> divide_channels(const Dcnv3Geometry& g, int64_t wanted) {
  constexpr int64_t kBlock = 16;
  std::vector<Channels> parts;
  if (wanted <= g.groups) {
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t first = g.groups * i / wanted, last = g.groups * (i + 1) / wanted;
      parts.push_back({first * g.group_channels, (last - first) * g.group_channels});
    }
    return parts;
  }
  const int64_t blocks = divide_up(g.group_channels, kBlock);
  const int64_t width = divide_up(blocks, divide_up(wanted, g.groups)) * kBlock;
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t channel = 0; channel < g.group_channels; channel += width) {
      const int64_t count = std::min(width, g.group_channels - channel);
      parts.push_back({group * g.group_channels + channel, count});
    }
  }
  return parts;
}

// Writes grad_input; each task owns some channels of one image, so that tasks never write to the
// same place and sums are always taken in the same order.
void backward_input(const Call& call, const Dcnv3Kernels& kernels) {
  const Dcnv3Geometry& g = call.g;
  // Images are enough where there are many, or as many as the threads share out evenly.
  const int64_t threads = torch::stable::get_num_threads();
  const bool whole = g.batch % threads == 0 || g.batch >= 8 * threads;
  const std::vector<Channels> parts = divide_channels(g, whole ? 1 : threads);
  const auto count = static_cast<int64_t>(parts.size());
  const int64_t cost = g.out_pixels() * call.pixel_cost() + g.pixels() * g.channels();
  call.parallel(g.batch * count, cost / std::max<int64_t>(1, count),
                [&](int64_t begin, int64_t end, int64_t* scratch) {
                  for (int64_t task = begin; task < end; ++task) {
                    const Channels part = parts[task % count];
                    const bool narrow = call.input.scalar_type() != call.accumulation;
                    Tensor sums = mmdeform::scratch(call.input, call.accumulation,
                                                    (narrow ? g.pixels() + 1 : 1) * part.count);
                    kernels.backward_input(call.args, task / count, part.begin, part.count, scratch,
                                           sums.mutable_data_ptr());
                  }
                });
}

}  // namespace

Tensor dcnv3_forward(const Tensor& input, const Dcnv3Points& points,
                     const Dcnv3Geometry& geometry) {
  Call call(input, points, geometry);
  const Dcnv3Kernels& kernels =
      select_kernels(table(), "input", input.scalar_type(), points.offset.scalar_type());
  Tensor output = torch::stable::new_empty(
      input, {call.g.batch, call.g.out_height, call.g.out_width, call.g.channels()},
      input.scalar_type());
  call.args.output = output.mutable_data_ptr();
  call.run(kernels.forward);
  return output;
}

std::tuple<Tensor, Dcnv3Points> dcnv3_backward(const Tensor& grad_output, const Tensor& input,
                                               const Dcnv3Points& points,
                                               const Dcnv3Geometry& geometry) {
  Call call(input, points, geometry);
  const Dcnv3Kernels& kernels =
      select_kernels(table(), "input", input.scalar_type(), points.offset.scalar_type());
  const auto new_like = [](const Tensor& tensor) {
    return torch::stable::new_empty(tensor, tensor.sizes(), tensor.scalar_type());
  };
  Tensor grad_input = new_like(input);
  Dcnv3Points grads{new_like(points.offset), std::nullopt};
  if (points.mask.has_value()) {
    grads.mask = new_like(*points.mask);
    call.args.grad_weight = grads.mask->mutable_data_ptr();
  }
  const Tensor grad = torch::stable::contiguous(grad_output);
  call.args.grad_output = grad.const_data_ptr();
  call.args.grad_input = grad_input.mutable_data_ptr();
  call.args.grad_offset = grads.offset.mutable_data_ptr();
  call.run(kernels.backward_points);
  backward_input(call, kernels);
  return {grad_input, grads};
}

}  // namespace mmdeform
