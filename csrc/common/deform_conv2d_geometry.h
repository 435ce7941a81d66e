// Sizes of a deformable convolution, for all backends.
#pragma once

#include <cstdint>

namespace mmdeform {

struct DeformConv2dGeometry {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, deform_groups;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height * out_width; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_out_channels() const { return out_channels / groups; }
  int64_t deform_channels() const { return channels / deform_groups; }
};

}  // namespace mmdeform
