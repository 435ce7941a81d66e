// Checks of ms_deform_attn's arguments, shared by all backends.
#pragma once

#include "common/checks.h"

namespace mmdeform {

// Checks shapes, dtypes and devices, without reading memory.
inline void check_ms_deform_attn(const Tensor& value, const Tensor& spatial_shapes,
                                 const Tensor& level_start_index, const Tensor& locations,
                                 const Tensor& weights) {
  check_dim("value", value, 4);
  check_dim("sampling_locations", locations, 6);
  const int64_t levels = locations.size(3), queries = locations.size(1);
  check_shape("sampling_locations", locations,
              {value.size(0), queries, value.size(2), levels, locations.size(4), 2});
  check_shape("attention_weights", weights,
              {value.size(0), queries, value.size(2), levels, locations.size(4)});
  check_shape("spatial_shapes", spatial_shapes, {levels, 2});
  check_shape("level_start_index", level_start_index, {levels});
  check_dtype("spatial_shapes", spatial_shapes, ScalarType::Long, "an index");
  check_dtype("level_start_index", level_start_index, ScalarType::Long, "an index");
  check_coordinate_dtype("sampling_locations", locations, value.scalar_type());
  check_dtype("attention_weights", weights, locations.scalar_type(), "sampling_locations");
  check_same_device("spatial_shapes", spatial_shapes, value);
  check_same_device("level_start_index", level_start_index, value);
  check_same_device("sampling_locations", locations, value);
  check_same_device("attention_weights", weights, value);
}

inline void check_ms_deform_attn_grad(const Tensor& grad_output, const Tensor& value,
                                      const Tensor& locations) {
  check_shape("grad_output", grad_output,
              {value.size(0), locations.size(1), value.size(2) * value.size(3)});
  check_dtype("grad_output", grad_output, value.scalar_type(), "value");
  check_same_device("grad_output", grad_output, value);
}

// Checks that a level of height x width pixels from token `start` on lies inside `tokens` tokens.
inline void check_level(int64_t level, int64_t height, int64_t width, int64_t start,
                        int64_t tokens) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height < kLimit && width < kLimit &&
                      (width == 0 || height <= (kLimit - 1) / width),
                  "spatial_shapes: expected sizes >= 0 and fewer than 2**31 pixels, got (", height,
                  ", ", width, ") at level ", level);
  STD_TORCH_CHECK(start >= 0 && start <= tokens && height * width <= tokens - start,
                  "level_start_index: expected level ", level, " of ", height, " x ", width,
                  " pixels inside value's ", tokens, " tokens, got start ", start);
}

}  // namespace mmdeform
