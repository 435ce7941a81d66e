// From tensor dtypes to template arguments.
#pragma once

#include "common/checks.h"
#include "cpu/storage.h"

namespace mmdeform {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls function(TypeTag<T>{}, TypeTag<C>{}) with the data type T of `data` and the coordinate
// type C of `coordinates`, one of the six pairs (T, T) and (T, Accumulation<T>).
template <typename F>
void dispatch_types(const char* name, ScalarType data, ScalarType coordinates, F&& function) {
  const bool same = data == coordinates;
  switch (data) {
    case ScalarType::Double:
      return function(TypeTag<double>{}, TypeTag<double>{});
    case ScalarType::Float:
      return function(TypeTag<float>{}, TypeTag<float>{});
    case ScalarType::Half:
      return same ? function(TypeTag<Half>{}, TypeTag<Half>{})
                  : function(TypeTag<Half>{}, TypeTag<float>{});
    case ScalarType::BFloat16:
      return same ? function(TypeTag<BFloat16>{}, TypeTag<BFloat16>{})
                  : function(TypeTag<BFloat16>{}, TypeTag<float>{});
    default:
      STD_TORCH_CHECK(false, name, ": expected fp64, fp32, fp16 or bf16, got ScalarType ",
                      static_cast<int>(data));
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
