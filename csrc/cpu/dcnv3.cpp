// DCNv3 on the CPU: checks and registration; see dcnv3_driver.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/dcnv3_checks.h"
#include "cpu/dcnv3_driver.h"

namespace mmdeform {
namespace {

Tensor dcnv3_cpu(const Tensor& input, const Tensor& offset, const Tensor& mask,
                 const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                 int64_t groups, double offset_scale, bool remove_center) {
  const Dcnv3Geometry g = check_dcnv3(input, offset, mask, kernel_size, stride, padding, dilation,
                                      groups, offset_scale, remove_center);
  return dcnv3_forward(input, {offset, mask}, g);
}

std::tuple<Tensor, Tensor, Tensor> dcnv3_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& mask,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    double offset_scale, bool remove_center, bool /*deterministic: always*/) {
  const Dcnv3Geometry g = check_dcnv3(input, offset, mask, kernel_size, stride, padding, dilation,
                                      groups, offset_scale, remove_center);
  check_dcnv3_gradient(grad_output, input, g);
  auto [grad_input, grad] = dcnv3_backward(grad_output, input, {offset, mask}, g);
  return {grad_input, grad.offset, *grad.mask};
}

STABLE_TORCH_LIBRARY_IMPL(mmdeform, CPU, m) {
  m.impl("dcnv3", TORCH_BOX(&dcnv3_cpu));
  m.impl("dcnv3_backward", TORCH_BOX(&dcnv3_backward_cpu));
}

}  // namespace
}  // namespace mmdeform
