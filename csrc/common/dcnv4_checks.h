// Checks of the arguments of dcnv4, shared by all backends.
#pragma once

#include <vector>

#include "common/dcnv3_checks.h"

namespace mmdeform {

// Channels of offset_mask: per group two offsets and a weight for every tap, then padding.
inline int64_t dcnv4_padded_channels(const Dcnv3Geometry& g) {
  return (g.groups * g.taps() * 3 + 7) / 8 * 8;
}

inline Dcnv3Geometry check_dcnv4(const Tensor& input, const Tensor& offset_mask,
                                 const std::vector<int64_t>& kernel_size,
                                 const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation, int64_t groups,
                                 double offset_scale, bool remove_center) {
  const Dcnv3Geometry g = check_dcnv3_input(input, kernel_size, stride, padding, dilation, groups,
                                            offset_scale, remove_center);
  check_shape("offset_mask", offset_mask,
              {g.batch, g.out_height, g.out_width, dcnv4_padded_channels(g)});
  check_coordinate_dtype("offset_mask", offset_mask, input.scalar_type());
  check_same_device("offset_mask", offset_mask, input);
  return g;
}

}  // namespace mmdeform
