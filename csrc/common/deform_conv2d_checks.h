// Checks of the arguments of deform_conv2d, shared by all backends.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/deform_conv2d_geometry.h"

namespace mmdeform {

inline DeformConv2dGeometry check_deform_conv2d(
    const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
    const Tensor& weight, const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    int64_t deform_groups) {
  check_dim("input", input, 4);
  check_dim("offset", offset, 4);
  check_dim("weight", weight, 4);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  STD_TORCH_CHECK(groups > 0 && input.size(1) % groups == 0 && weight.size(0) % groups == 0,
                  "groups: expected to divide ", input.size(1), " input and ", weight.size(0),
                  " output channels, got ", groups);
  STD_TORCH_CHECK(deform_groups > 0 && input.size(1) % deform_groups == 0,
                  "deform_groups: expected to divide ", input.size(1), " input channels, got ",
                  deform_groups);
  DeformConv2dGeometry g{};
  g.batch = input.size(0), g.channels = input.size(1);
  g.height = input.size(2), g.width = input.size(3);
  g.out_channels = weight.size(0), g.kernel_h = weight.size(2), g.kernel_w = weight.size(3);
  g.stride_h = stride[0], g.stride_w = stride[1];
  g.pad_h = padding[0], g.pad_w = padding[1];
  STD_TORCH_CHECK(g.kernel_h > 0 && g.kernel_w > 0,
                  "weight: expected a kernel of at least 1 x 1, got ",
                  shape_string(weight.sizes()));
  g.dilation_h = dilation[0], g.dilation_w = dilation[1];
  g.groups = groups, g.deform_groups = deform_groups;
  // Room for the kernel to move; negative where it is larger than the padded input.
  const int64_t room_h = g.height + 2 * g.pad_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t room_w = g.width + 2 * g.pad_w - g.dilation_w * (g.kernel_w - 1) - 1;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "input: ", shape_string(input.sizes()),
                  " is smaller than the kernel of weight ", shape_string(weight.sizes()));
  g.out_height = room_h / g.stride_h + 1;
  g.out_width = room_w / g.stride_w + 1;
  // A pixel index fits 32 bits in every kernel; the number of elements may be larger.
  STD_TORCH_CHECK(g.pixels() < (int64_t{1} << 31) - 1 && g.out_pixels() < (int64_t{1} << 31) - 1,
                  "input: expected fewer than 2**31 - 1 pixels, got ", shape_string(input.sizes()));
  check_shape("weight", weight, {g.out_channels, g.group_channels(), g.kernel_h, g.kernel_w});
  check_shape("offset", offset, {g.batch, deform_groups * g.taps() * 2, g.out_height, g.out_width});
  check_dtype("weight", weight, input.scalar_type(), "input");
  check_coordinate_dtype("offset", offset, input.scalar_type());
  check_same_device("offset", offset, input);
  check_same_device("weight", weight, input);
  if (mask.has_value()) {
    check_shape("mask", *mask, {g.batch, deform_groups * g.taps(), g.out_height, g.out_width});
    check_dtype("mask", *mask, offset.scalar_type(), "offset");
    check_same_device("mask", *mask, input);
  }
  if (bias.has_value()) {
    check_shape("bias", *bias, {g.out_channels});
    check_dtype("bias", *bias, input.scalar_type(), "input");
    check_same_device("bias", *bias, input);
  }
  return g;
}

inline void check_deform_conv2d_gradient(const Tensor& grad_output, const Tensor& input,
                                         const DeformConv2dGeometry& g) {
  check_shape("grad_output", grad_output, {g.batch, g.out_channels, g.out_height, g.out_width});
  check_dtype("grad_output", grad_output, input.scalar_type(), "input");
  check_same_device("grad_output", grad_output, input);
}

}  // namespace mmdeform
