// Checks of the arguments of dcnv3, shared by all backends.
#pragma once

#include <cmath>
#include <vector>

#include "common/checks.h"
#include "common/dcnv3_geometry.h"

namespace mmdeform {

// What does not depend on how offsets and weights are laid out.
inline Dcnv3Geometry check_dcnv3_input(const Tensor& input, const std::vector<int64_t>& kernel_size,
                                       const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding,
                                       const std::vector<int64_t>& dilation, int64_t groups,
                                       double offset_scale, bool remove_center) {
  check_dim("input", input, 4);
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  STD_TORCH_CHECK(groups > 0 && input.size(3) % groups == 0, "groups: expected to divide ",
                  input.size(3), " channels, got ", groups);
  STD_TORCH_CHECK(std::isfinite(offset_scale), "offset_scale: expected a finite number, got ",
                  offset_scale);
  STD_TORCH_CHECK(!remove_center || (kernel_size[0] == kernel_size[1] && kernel_size[0] % 2 == 1),
                  "kernel_size: expected odd and square with remove_center, got ",
                  shape_string(kernel_size));
  Dcnv3Geometry g{};
  g.batch = input.size(0), g.height = input.size(1), g.width = input.size(2);
  g.groups = groups, g.group_channels = input.size(3) / groups;
  g.kernel_h = kernel_size[0], g.kernel_w = kernel_size[1];
  g.stride_h = stride[0], g.stride_w = stride[1];
  g.pad_h = padding[0], g.pad_w = padding[1];
  g.dilation_h = dilation[0], g.dilation_w = dilation[1];
  g.offset_scale = offset_scale, g.remove_center = remove_center;
  // Room for the kernel to move; negative where it is larger than the padded input.
  const int64_t room_h = g.height + 2 * g.pad_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t room_w = g.width + 2 * g.pad_w - g.dilation_w * (g.kernel_w - 1) - 1;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "input: ", shape_string(input.sizes()),
                  " is smaller than a kernel of ", shape_string(kernel_size));
  g.out_height = room_h / g.stride_h + 1;
  g.out_width = room_w / g.stride_w + 1;
  // A pixel index fits 32 bits in every kernel; the number of elements may be larger.
  STD_TORCH_CHECK(g.pixels() < (int64_t{1} << 31) - 1 && g.out_pixels() < (int64_t{1} << 31) - 1,
                  "input: expected fewer than 2**31 - 1 pixels, got ", shape_string(input.sizes()));
  return g;
}

inline Dcnv3Geometry check_dcnv3(const Tensor& input, const Tensor& offset, const Tensor& mask,
                                 const std::vector<int64_t>& kernel_size,
                                 const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation, int64_t groups,
                                 double offset_scale, bool remove_center) {
  const Dcnv3Geometry g = check_dcnv3_input(input, kernel_size, stride, padding, dilation, groups,
                                            offset_scale, remove_center);
  check_shape("offset", offset, {g.batch, g.out_height, g.out_width, groups * g.taps() * 2});
  check_shape("mask", mask, {g.batch, g.out_height, g.out_width, groups * g.taps()});
  check_coordinate_dtype("offset", offset, input.scalar_type());
  check_dtype("mask", mask, offset.scalar_type(), "offset");
  check_same_device("offset", offset, input);
  check_same_device("mask", mask, input);
  return g;
}

inline void check_dcnv3_gradient(const Tensor& grad_output, const Tensor& input,
                                 const Dcnv3Geometry& g) {
  check_shape("grad_output", grad_output, {g.batch, g.out_height, g.out_width, g.channels()});
  check_dtype("grad_output", grad_output, input.scalar_type(), "input");
  check_same_device("grad_output", grad_output, input);
}

}  // namespace mmdeform
