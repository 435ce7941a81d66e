// Sizes of deform_roi_pool and deform_ps_roi_pool, for all backends.
#pragma once

#include <cstdint>

namespace mmdeform {

// deform_roi_pool is the case of one class and one position-sensitive cell, in which every bin is
// a part of its own.
struct RoiPoolGeometry {
  int64_t images, channels, height, width;  // of the input
  int64_t rois, bins_h, bins_w;
  int64_t output_dim;      // output channels
  int64_t classes;         // runs of output channels, each with its own offsets
  int64_t group_size;      // input channel (c * group_size + gh) * group_size + gw
  int64_t part_h, part_w;  // offsets are (R, 2 * classes, part_h, part_w), first x, then y
  int64_t samples;         // per bin and axis; 0: as many as the RoI needs
  double spatial_scale;
  double offset_scale;  // gamma or trans_std

  int64_t pixels() const { return height * width; }
  int64_t bins() const { return bins_h * bins_w; }
  int64_t cells() const { return group_size * group_size; }
  int64_t class_channels() const { return output_dim / classes; }
  int64_t parts() const { return part_h * part_w; }
};

}  // namespace mmdeform
