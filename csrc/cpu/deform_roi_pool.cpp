// CPU registration of deform_roi_pool.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/roi_pool_checks.h"
#include "cpu/roi_pool_driver.h"

namespace mmdeform {
namespace {

const RoiPoolKernels& kernels(){MMDEFORM_SELECT_KERNELS(deform_roi_pool_kernels)}

Tensor deform_roi_pool_cpu(const Tensor& input, const Tensor& rois,
                           const std::optional<Tensor>& offset, const std::optional<Tensor>& mask,
                           const std::vector<int64_t>& output_size, double spatial_scale,
                           int64_t sampling_ratio, double gamma) {
  const RoiPoolGeometry g = check_deform_roi_pool(input, rois, offset, mask, output_size,
                                                  spatial_scale, sampling_ratio, gamma);
  return roi_pool_forward(kernels(), g, {input, rois, offset, mask});
}

std::tuple<Tensor, Tensor, Tensor> deform_roi_pool_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& rois,
    const std::optional<Tensor>& offset, const std::optional<Tensor>& mask,
    const std::vector<int64_t>& output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, bool /*deterministic: always*/) {
  const RoiPoolGeometry g = check_deform_roi_pool(input, rois, offset, mask, output_size,
                                                  spatial_scale, sampling_ratio, gamma);
  check_roi_pool_gradient(grad_output, input, g);
  const RoiPoolGradients gradients =
      roi_pool_backward(kernels(), g, grad_output, {input, rois, offset, mask});
  return {gradients.input, gradients.offset, gradients.mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, CPU, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool_cpu));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward_cpu));
}

}  // namespace mmdeform
