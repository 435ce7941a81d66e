// What the CPU operators ask of tensors.
#pragma once

#include "common/checks.h"
#include "cpu/capability.h"

namespace mmdeform {

// The dtype of float or double.
template <typename A>
ScalarType scalar_type_of() {
  return sizeof(A) == 4 ? ScalarType::Float : ScalarType::Double;
}

// Whether (N, C, H, W) lies in memory as (N, H, W, C), without gaps.
inline bool is_channels_last(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  return t.stride(1) == 1 && t.stride(3) == c && t.stride(2) == w * c && t.stride(0) == h * w * c;
}

// The kernels for these dtypes of the data, argument `name`, and of the coordinates, for which
// check_coordinate_dtype holds.
template <typename Kernels>
const Kernels& select_kernels(const KernelsByDtype<Kernels>& table, const char* name,
                              ScalarType data, ScalarType coordinates) {
  const bool same = data == coordinates;
  switch (data) {
    case ScalarType::Double:
      return table.fp64;
    case ScalarType::Float:
      return table.fp32;
    case ScalarType::Half:
      return same ? table.fp16 : table.fp16_fp32;
    case ScalarType::BFloat16:
      return same ? table.bf16 : table.bf16_fp32;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype Double, Float, Half or BFloat16, got ",
                      torch::headeronly::toString(data));
  }
}

}  // namespace mmdeform
