// Memory and threads of RoI pooling, for deform_roi_pool.cpp and deform_ps_roi_pool.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/roi_pool.h"

namespace mmdeform {

struct RoiPoolInputs {
  torch::stable::Tensor input, rois;
  std::optional<torch::stable::Tensor> offset, mask;
};

struct RoiPoolGradients {
  torch::stable::Tensor input, offset, mask;  // of shape (0,) where the input is absent
};

torch::stable::Tensor roi_pool_forward(const RoiPoolKernels& kernels, const RoiPoolGeometry& g,
                                       const RoiPoolInputs& inputs);

RoiPoolGradients roi_pool_backward(const RoiPoolKernels& kernels, const RoiPoolGeometry& g,
                                   const torch::stable::Tensor& grad_output,
                                   const RoiPoolInputs& inputs);

}  // namespace mmdeform
