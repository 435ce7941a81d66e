// CPU registration of deform_ps_roi_pool.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/roi_pool_checks.h"
#include "cpu/roi_pool_driver.h"

namespace mmdeform {
namespace {

const RoiPoolKernels& kernels(){MMDEFORM_SELECT_KERNELS(deform_ps_roi_pool_kernels)}

Tensor deform_ps_roi_pool_cpu(const Tensor& input, const Tensor& rois,
                              const std::optional<Tensor>& offset,
                              const std::vector<int64_t>& output_size, double spatial_scale,
                              int64_t output_dim, int64_t group_size, int64_t part_size,
                              int64_t sample_per_part, double trans_std) {
  const RoiPoolGeometry g =
      check_deform_ps_roi_pool(input, rois, offset, output_size, spatial_scale, output_dim,
                               group_size, part_size, sample_per_part, trans_std);
  return roi_pool_forward(kernels(), g, {input, rois, offset, std::nullopt});
}

std::tuple<Tensor, Tensor> deform_ps_roi_pool_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& rois,
    const std::optional<Tensor>& offset, const std::vector<int64_t>& output_size,
    double spatial_scale, int64_t output_dim, int64_t group_size, int64_t part_size,
    int64_t sample_per_part, double trans_std, bool /*deterministic: always*/) {
  const RoiPoolGeometry g =
      check_deform_ps_roi_pool(input, rois, offset, output_size, spatial_scale, output_dim,
                               group_size, part_size, sample_per_part, trans_std);
  check_roi_pool_gradient(grad_output, input, g);
  const RoiPoolGradients gradients =
      roi_pool_backward(kernels(), g, grad_output, {input, rois, offset, std::nullopt});
  return {gradients.input, gradients.offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, CPU, m) {
  m.impl("deform_ps_roi_pool", TORCH_BOX(&deform_ps_roi_pool_cpu));
  m.impl("deform_ps_roi_pool_backward", TORCH_BOX(&deform_ps_roi_pool_backward_cpu));
}

}  // namespace mmdeform
