// DCNv3 on CUDA: every output pixel and group sums its points.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/cuda_launch.h"
#include "common/dcnv3_checks.h"
#include "cuda/dcnv3.cuh"
#include "cuda/dcnv3_points.cuh"
#include "cuda/points_launch.cuh"

namespace mmdeform {
namespace {

// Kernels count in 32 bits within an image, and pack the width into 28.
void check_kernel_limits(const Dcnv3Geometry& g) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(g.width < 1 << 28, "input: expected fewer than 2**28 columns, got ", g.width);
  STD_TORCH_CHECK(g.channels() < kLimit, "input: expected fewer than 2**31 channels, got ",
                  g.channels());
  STD_TORCH_CHECK(g.height + 2 * g.pad_h < kLimit && g.width + 2 * g.pad_w < kLimit,
                  "padding: expected a padded input below 2**31 pixels, got input ", g.height,
                  " x ", g.width, ", padding ", g.pad_h, " x ", g.pad_w);
  STD_TORCH_CHECK(g.taps() <= 1 << 20, "kernel_size: expected at most 2**20 taps, got ", g.taps());
}

template <typename C>
Dcnv3Points<C> source(const Dcnv3Channels& offset, const Dcnv3Channels& mask,
                      const Dcnv3Geometry& g) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  Dcnv3Points<C> points{};
  points.shape = {
      g.batch,         g.pixels(), g.out_pixels(), narrow(g.groups), narrow(g.group_channels),
      narrow(g.taps())};
  points.offset = data_of<C>(offset.tensor) + offset.first;
  points.mask = data_of<C>(mask.tensor) + mask.first;
  points.offset_strides = {offset.tensor.size(3), offset.group_stride};
  points.mask_strides = {mask.tensor.size(3), mask.group_stride};
  points.H = narrow(g.height), points.W = narrow(g.width), points.Wo = narrow(g.out_width);
  points.kernel_h = narrow(g.kernel_h);
  points.stride_h = narrow(g.stride_h), points.stride_w = narrow(g.stride_w);
  points.start_h = narrow(g.center_h() - g.pad_h), points.start_w = narrow(g.center_w() - g.pad_w);
  points.dilation_h = narrow(g.dilation_h), points.dilation_w = narrow(g.dilation_w);
  points.center_h = narrow(g.center_h()), points.center_w = narrow(g.center_w());
  points.removed_tap = narrow(g.remove_center ? g.taps() / 2 : g.taps());
  points.offset_scale = static_cast<accumulation_t<C>>(g.offset_scale);
  return points;
}

// Calls function(Type<T>, Type<C>).
template <typename Function>
void dispatch(const Tensor& input, const Dcnv3Channels& offset, const Function& function) {
  dispatch_dtypes<torch::headeronly::Half, torch::headeronly::BFloat16>(
      "dcnv3", input.scalar_type(), offset.tensor.scalar_type(), function);
}

}  // namespace

Tensor dcnv3_forward(const Tensor& input, const Dcnv3Channels& offset, const Dcnv3Channels& mask,
                     const Dcnv3Geometry& g) {
  check_kernel_limits(g);
  const CudaLauncher launch(input);
  const Tensor inputs = aligned_contiguous(input);
  const Tensor output =
      torch::stable::new_empty(input, {g.batch, g.out_height, g.out_width, g.channels()});
  dispatch(input, offset, [&](auto type, auto coordinate) {
    points_forward<typename decltype(type)::type>(
        launch, inputs, source<typename decltype(coordinate)::type>(offset, mask, g), output);
  });
  return output;
}

Tensor dcnv3_backward(const Tensor& grad_output, const Tensor& input, const Dcnv3Channels& offset,
                      const Dcnv3Channels& mask, const Dcnv3Geometry& g, bool deterministic,
                      const Tensor& grad_offset, const Tensor& grad_mask) {
  check_kernel_limits(g);
  const CudaLauncher launch(input);
  const Tensor grad_outputs = aligned_contiguous(grad_output), inputs = aligned_contiguous(input);
  const Tensor grad_input = new_zeros(input, input.sizes(), accumulation_type(input.scalar_type()));
  dispatch(input, offset, [&](auto type, auto coordinate) {
    using C = typename decltype(coordinate)::type;
    points_backward<typename decltype(type)::type>(
        launch, grad_outputs, inputs, source<C>(offset, mask, g), deterministic, grad_input,
        {mutable_data_of<C>(grad_offset) + offset.first,
         mutable_data_of<C>(grad_mask) + mask.first});
  });
  return torch::stable::to(grad_input, input.scalar_type());
}

namespace {

Dcnv3Channels offset_channels(const Tensor& offset, const Dcnv3Geometry& g) {
  return {torch::stable::contiguous(offset), 0, 2 * g.taps()};
}

Dcnv3Channels mask_channels(const Tensor& mask, const Dcnv3Geometry& g) {
  return {torch::stable::contiguous(mask), 0, g.taps()};
}

Tensor dcnv3_cuda(const Tensor& input, const Tensor& offset, const Tensor& mask,
                  const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                  int64_t groups, double offset_scale, bool remove_center) {
  const Dcnv3Geometry g = check_dcnv3(input, offset, mask, kernel_size, stride, padding, dilation,
                                      groups, offset_scale, remove_center);
  return dcnv3_forward(input, offset_channels(offset, g), mask_channels(mask, g), g);
}

std::tuple<Tensor, Tensor, Tensor> dcnv3_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& mask,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    double offset_scale, bool remove_center, bool deterministic) {
  const Dcnv3Geometry g = check_dcnv3(input, offset, mask, kernel_size, stride, padding, dilation,
                                      groups, offset_scale, remove_center);
  check_dcnv3_gradient(grad_output, input, g);
  const Tensor grad_offset = torch::stable::new_empty(offset, offset.sizes());
  const Tensor grad_mask = torch::stable::new_empty(mask, mask.sizes());
  const Tensor grad_input =
      dcnv3_backward(grad_output, input, offset_channels(offset, g), mask_channels(mask, g), g,
                     deterministic, grad_offset, grad_mask);
  return {grad_input, grad_offset, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, MMDEFORM_CUDA_DISPATCH_KEY, m) {
  m.impl("dcnv3", TORCH_BOX(&dcnv3_cuda));
  m.impl("dcnv3_backward", TORCH_BOX(&dcnv3_backward_cuda));
}

}  // namespace mmdeform
