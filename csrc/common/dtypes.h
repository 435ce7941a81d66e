// From tensors to typed pointers and template arguments, shared by all backends.
#pragma once

#include "common/checks.h"

namespace mmdeform {

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<T>, Type<C>) for the dtype T of the data and the dtype C of the coordinates,
// for which check_coordinate_dtype holds. Half and BFloat16 are the backend's 16-bit types.
template <typename Half, typename BFloat16, typename Function>
void dispatch_dtypes(const char* name, ScalarType data, ScalarType coordinates,
                     const Function& function) {
  const auto half = [&](auto type) {
    if (coordinates == data) return function(type, type);
    return function(type, Type<float>());
  };
  switch (data) {
    case ScalarType::Double:
      return function(Type<double>(), Type<double>());
    case ScalarType::Float:
      return function(Type<float>(), Type<float>());
    case ScalarType::Half:
      return half(Type<Half>());
    case ScalarType::BFloat16:
      return half(Type<BFloat16>());
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype Double, Float, Half or BFloat16, got ",
                      torch::headeronly::toString(data));
  }
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace mmdeform
