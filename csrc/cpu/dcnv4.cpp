// DCNv4 on the CPU: checks and registration; the kernels are those of dcnv3.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/dcnv4_checks.h"
#include "cpu/dcnv3_driver.h"

namespace mmdeform {
namespace {

Tensor dcnv4_cpu(const Tensor& input, const Tensor& offset_mask,
                 const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                 int64_t groups, double offset_scale, bool remove_center) {
  const Dcnv3Geometry g = check_dcnv4(input, offset_mask, kernel_size, stride, padding, dilation,
                                      groups, offset_scale, remove_center);
  return dcnv3_forward(input, {offset_mask, std::nullopt}, g);
}

std::tuple<Tensor, Tensor> dcnv4_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset_mask,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    double offset_scale, bool remove_center, bool /*deterministic: always*/) {
  const Dcnv3Geometry g = check_dcnv4(input, offset_mask, kernel_size, stride, padding, dilation,
                                      groups, offset_scale, remove_center);
  check_dcnv3_gradient(grad_output, input, g);
  auto [grad_input, grad] = dcnv3_backward(grad_output, input, {offset_mask, std::nullopt}, g);
  return {grad_input, grad.offset};
}

STABLE_TORCH_LIBRARY_IMPL(mmdeform, CPU, m) {
  m.impl("dcnv4", TORCH_BOX(&dcnv4_cpu));
  m.impl("dcnv4_backward", TORCH_BOX(&dcnv4_backward_cpu));
}

}  // namespace
}  // namespace mmdeform
