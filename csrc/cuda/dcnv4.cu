// DCNv4 on CUDA: DCNv3 with offsets and weights side by side in one tensor.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/dcnv4_checks.h"
#include "cuda/dcnv3.cuh"

namespace mmdeform {
namespace {

Dcnv3Channels offset_channels(const Tensor& offset_mask, const Dcnv3Geometry& g) {
  return {offset_mask, 0, 3 * g.taps()};
}

Dcnv3Channels mask_channels(const Tensor& offset_mask, const Dcnv3Geometry& g) {
  return {offset_mask, 2 * g.taps(), 3 * g.taps()};
}

Tensor dcnv4_cuda(const Tensor& input, const Tensor& offset_mask,
                  const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                  int64_t groups, double offset_scale, bool remove_center) {
  const Dcnv3Geometry g = check_dcnv4(input, offset_mask, kernel_size, stride, padding, dilation,
                                      groups, offset_scale, remove_center);
  const Tensor points = torch::stable::contiguous(offset_mask);
  return dcnv3_forward(input, offset_channels(points, g), mask_channels(points, g), g);
}

std::tuple<Tensor, Tensor> dcnv4_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset_mask,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    double offset_scale, bool remove_center, bool deterministic) {
  const Dcnv3Geometry g = check_dcnv4(input, offset_mask, kernel_size, stride, padding, dilation,
                                      groups, offset_scale, remove_center);
  check_dcnv3_gradient(grad_output, input, g);
  const Tensor points = torch::stable::contiguous(offset_mask);
  Tensor grad_points = torch::stable::new_empty(points, points.sizes());
  const int64_t used = groups * g.taps() * 3;
  Tensor padding_channels = torch::stable::narrow(grad_points, 3, used, points.size(3) - used);
  torch::stable::zero_(padding_channels);
  const Tensor grad_input =
      dcnv3_backward(grad_output, input, offset_channels(points, g), mask_channels(points, g), g,
                     deterministic, grad_points, grad_points);
  return {grad_input, grad_points};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, MMDEFORM_CUDA_DISPATCH_KEY, m) {
  m.impl("dcnv4", TORCH_BOX(&dcnv4_cuda));
  m.impl("dcnv4_backward", TORCH_BOX(&dcnv4_backward_cuda));
}

}  // namespace mmdeform
