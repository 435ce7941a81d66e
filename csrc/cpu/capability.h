// Run-time choice of the instruction set.
//
// A file named <op>_kernel.cpp is compiled once per capability, each time with
// MMDEFORM_CPU_CAPABILITY set to the capability's name; everything in it lives in the namespace
// MMDEFORM_CPU_NAMESPACE and is reached through a table of function pointers. Such files see raw
// pointers and small structs only: an inline function of a large header, compiled for AVX-512 here,
// could otherwise be the copy that the linker keeps for everyone.
#pragma once

#define MMDEFORM_CONCATENATE_(a, b) a##b
#define MMDEFORM_CONCATENATE(a, b) MMDEFORM_CONCATENATE_(a, b)
#ifdef MMDEFORM_CPU_CAPABILITY
#define MMDEFORM_CPU_NAMESPACE MMDEFORM_CONCATENATE(cpu_, MMDEFORM_CPU_CAPABILITY)
#endif

namespace mmdeform {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

// One set of kernels for each pair of the data's type and the coordinates' type.
template <typename Kernels>
struct KernelsByDtype {
  Kernels fp64, fp32, fp16, fp16_fp32, bf16, bf16_fp32;
};

// The best instruction set of this machine, or the one that the environment variable
// MMDEFORM_CPU_CAPABILITY names.
CpuCapability cpu_capability();

}  // namespace mmdeform

// Declares `const Table& function()` in each capability's namespace.
#define MMDEFORM_DECLARE_KERNELS(Table, function) \
  namespace cpu_default {                         \
  const Table& function();                        \
  }                                               \
  namespace cpu_avx2 {                            \
  const Table& function();                        \
  }                                               \
  namespace cpu_avx512 {                          \
  const Table& function();                        \
  }

#ifdef MMDEFORM_HAS_AVX2
#define MMDEFORM_SELECT_AVX2(function) \
  case CpuCapability::kAvx2:           \
    return cpu_avx2::function();
#else
#define MMDEFORM_SELECT_AVX2(function)
#endif
#ifdef MMDEFORM_HAS_AVX512
#define MMDEFORM_SELECT_AVX512(function) \
  case CpuCapability::kAvx512:           \
    return cpu_avx512::function();
#else
#define MMDEFORM_SELECT_AVX512(function)
#endif

// Returns the table of the capability in use; for a function body.
#define MMDEFORM_SELECT_KERNELS(function) \
  switch (cpu_capability()) {             \
    MMDEFORM_SELECT_AVX2(function)        \
    MMDEFORM_SELECT_AVX512(function)      \
    default:                              \
      return cpu_default::function();     \
  }
