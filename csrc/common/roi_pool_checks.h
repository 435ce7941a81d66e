// Checks of the arguments of deform_roi_pool and deform_ps_roi_pool, shared by all backends.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/roi_pool_geometry.h"

namespace mmdeform {

// Keeps the indices of samples, bins and parts exact in fp32.
constexpr int64_t kRoiPoolLimit = int64_t{1} << 24;

inline void check_roi_pool_number(const char* name, int64_t number, int64_t smallest) {
  STD_TORCH_CHECK(number >= smallest && number < kRoiPoolLimit, name, ": expected an integer in [",
                  smallest, ", 2**24), got ", number);
}

// What both operators have in common.
inline RoiPoolGeometry check_roi_pool(const Tensor& input, const Tensor& rois,
                                      const std::optional<Tensor>& offset,
                                      const std::vector<int64_t>& output_size) {
  check_dim("input", input, 4);
  check_dim("rois", rois, 2);
  STD_TORCH_CHECK(output_size.size() == 2, "output_size: expected two integers, got ",
                  shape_string(output_size));
  check_roi_pool_number("output_size", output_size[0], 1);
  check_roi_pool_number("output_size", output_size[1], 1);
  RoiPoolGeometry g{};
  g.images = input.size(0), g.channels = input.size(1);
  g.height = input.size(2), g.width = input.size(3);
  g.rois = rois.size(0), g.bins_h = output_size[0], g.bins_w = output_size[1];
  g.classes = 1, g.group_size = 1;
  // A pixel index fits 32 bits in every kernel; the number of elements may be larger.
  STD_TORCH_CHECK(g.pixels() > 0 && g.pixels() < (int64_t{1} << 31) - 1,
                  "input: expected at least one pixel and fewer than 2**31 - 1, got ",
                  shape_string(input.sizes()));
  check_shape("rois", rois, {g.rois, 5});
  check_dtype("rois", rois, accumulation_type(input.scalar_type()), "sums");
  check_same_device("rois", rois, input);
  if (offset.has_value()) {
    check_dim("offset", *offset, 4);
    check_coordinate_dtype("offset", *offset, input.scalar_type());
    check_same_device("offset", *offset, input);
  }
  return g;
}

inline RoiPoolGeometry check_deform_roi_pool(const Tensor& input, const Tensor& rois,
                                             const std::optional<Tensor>& offset,
                                             const std::optional<Tensor>& mask,
                                             const std::vector<int64_t>& output_size,
                                             double spatial_scale, int64_t sampling_ratio,
                                             double gamma) {
  RoiPoolGeometry g = check_roi_pool(input, rois, offset, output_size);
  check_roi_pool_number("sampling_ratio", sampling_ratio, 0);
  g.output_dim = g.channels;
  g.part_h = g.bins_h, g.part_w = g.bins_w;
  g.samples = sampling_ratio;
  g.spatial_scale = spatial_scale, g.offset_scale = gamma;
  if (offset.has_value()) check_shape("offset", *offset, {g.rois, 2, g.bins_h, g.bins_w});
  if (mask.has_value()) {
    check_shape("mask", *mask, {g.rois, g.bins_h, g.bins_w});
    check_coordinate_dtype("mask", *mask, input.scalar_type());
    if (offset.has_value()) check_dtype("mask", *mask, offset->scalar_type(), "offset");
    check_same_device("mask", *mask, input);
  }
  return g;
}

inline RoiPoolGeometry check_deform_ps_roi_pool(const Tensor& input, const Tensor& rois,
                                                const std::optional<Tensor>& offset,
                                                const std::vector<int64_t>& output_size,
                                                double spatial_scale, int64_t output_dim,
                                                int64_t group_size, int64_t part_size,
                                                int64_t sample_per_part, double trans_std) {
  RoiPoolGeometry g = check_roi_pool(input, rois, offset, output_size);
  check_roi_pool_number("output_dim", output_dim, 1);
  check_roi_pool_number("group_size", group_size, 1);
  check_roi_pool_number("part_size", part_size, 1);
  check_roi_pool_number("sample_per_part", sample_per_part, 1);
  g.output_dim = output_dim, g.group_size = group_size;
  g.part_h = g.part_w = part_size;
  g.samples = sample_per_part;
  g.spatial_scale = spatial_scale, g.offset_scale = trans_std;
  STD_TORCH_CHECK(g.channels / g.cells() == output_dim && g.channels % g.cells() == 0,
                  "input: expected output_dim * group_size**2 channels with output_dim ",
                  output_dim, " and group_size ", group_size, ", got ",
                  shape_string(input.sizes()));
  if (offset.has_value()) {
    g.classes = offset->size(1) / 2;
    STD_TORCH_CHECK(g.classes > 0 && output_dim % g.classes == 0,
                    "offset: expected 2*K channels with K dividing output_dim ", output_dim,
                    ", got ", shape_string(offset->sizes()));
    check_shape("offset", *offset, {g.rois, 2 * g.classes, part_size, part_size});
  }
  return g;
}

inline void check_roi_pool_gradient(const Tensor& grad_output, const Tensor& input,
                                    const RoiPoolGeometry& g) {
  check_shape("grad_output", grad_output, {g.rois, g.output_dim, g.bins_h, g.bins_w});
  check_dtype("grad_output", grad_output, input.scalar_type(), "input");
  check_same_device("grad_output", grad_output, input);
}

// The dtype of the coordinates: that of the offsets or masks, if there are any.
inline ScalarType roi_pool_coordinate_type(const Tensor& input, const std::optional<Tensor>& offset,
                                           const std::optional<Tensor>& mask) {
  if (offset.has_value()) return offset->scalar_type();
  if (mask.has_value()) return mask->scalar_type();
  return accumulation_type(input.scalar_type());
}

}  // namespace mmdeform
