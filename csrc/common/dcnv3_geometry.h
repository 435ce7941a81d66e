// Sizes of DCNv3 and DCNv4, for all backends.
#pragma once

#include <cstdint>

namespace mmdeform {

struct Dcnv3Geometry {
  int64_t batch, height, width, groups, group_channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  double offset_scale;
  bool remove_center;

  int64_t channels() const { return groups * group_channels; }
  int64_t taps() const { return kernel_h * kernel_w - (remove_center ? 1 : 0); }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height * out_width; }
  // From the first tap to the point around which offset_scale stretches the kernel.
  int64_t center_h() const { return dilation_h * (kernel_h - 1) / 2; }
  int64_t center_w() const { return dilation_w * (kernel_w - 1) / 2; }
};

}  // namespace mmdeform
