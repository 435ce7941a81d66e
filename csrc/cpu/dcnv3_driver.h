// What dcnv3 and dcnv4 share on the CPU: memory and parallel loops around the kernels.
#pragma once

#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/dcnv3_geometry.h"

namespace mmdeform {

// Offsets and weights of dcnv3, or the one tensor of dcnv4, which has no `mask`.
struct Dcnv3Points {
  Tensor offset;
  std::optional<Tensor> mask;
};

Tensor dcnv3_forward(const Tensor& input, const Dcnv3Points& points, const Dcnv3Geometry& geometry);

std::tuple<Tensor, Dcnv3Points> dcnv3_backward(const Tensor& grad_output, const Tensor& input,
                                               const Dcnv3Points& points,
                                               const Dcnv3Geometry& geometry);

}  // namespace mmdeform
