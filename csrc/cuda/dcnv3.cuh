// Host side of DCNv3's kernels, for DCNv4 as well.

#pragma once

#include "common/cuda_tensor.h"
#include "common/dcnv3_geometry.h"

namespace mmdeform {

// Channels of a tensor (N, Ho, Wo, channels), the same for its gradient: two per tap for offsets,
// one for weights. The tensor is contiguous.
struct Dcnv3Channels {
  Tensor tensor;
  int64_t first;         // of group 0
  int64_t group_stride;  // from one group to the next
};

Tensor dcnv3_forward(const Tensor& input, const Dcnv3Channels& offset, const Dcnv3Channels& mask,
                     const Dcnv3Geometry& geometry);

// Returns the gradient of the input; writes the channels of grad_offset and grad_mask that offset
// and mask have.
Tensor dcnv3_backward(const Tensor& grad_output, const Tensor& input, const Dcnv3Channels& offset,
                      const Dcnv3Channels& mask, const Dcnv3Geometry& geometry, bool deterministic,
                      const Tensor& grad_offset, const Tensor& grad_mask);

}  // namespace mmdeform
