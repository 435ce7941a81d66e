// Checks of operator arguments, shared by all backends. They protect memory when an operator is
// called directly; the Python functions have friendlier ones.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

namespace mmdeform {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Sizes>
std::string shape_string(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << (separator[0] == '(' ? "()" : ")");
  return text.str();
}

inline void check_shape(const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  size_t i = 0;
  for (int64_t size : expected) {
    same = same && sizes[i++] == size;
    if (!same) break;
  }
  STD_TORCH_CHECK(same, name, ": expected shape ", shape_string(expected), ", got ",
                  shape_string(sizes));
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got shape ",
                  shape_string(tensor.sizes()));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected,
                        const char* like) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, ": expected the dtype of ", like, ", ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Coordinates have the data's dtype or the accumulation dtype.
inline void check_coordinate_dtype(const char* name, const Tensor& tensor, ScalarType data) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == data || type == accumulation_type(data), name,
                  ": expected the dtype of the data, ", torch::headeronly::toString(data), ", or ",
                  torch::headeronly::toString(accumulation_type(data)), ", got ",
                  torch::headeronly::toString(type));
}

// A number per axis: height, width. The upper limit keeps positions exact in fp32.
inline void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t smallest) {
  STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= smallest && pair[1] >= smallest &&
                      pair[0] < 1 << 24 && pair[1] < 1 << 24,
                  name, ": expected two integers of at least ", smallest, ", got ",
                  shape_string(pair));
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(),
      name, ": expected on the same device as the other arguments");
}

}  // namespace mmdeform
