// What the compiled CPU library says about itself.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <exception>
#include <string>

#include "cpu/capability.h"

namespace mmdeform {
namespace {

struct Entry {
  CpuCapability capability;
  const char* name;
  bool supported;
};

CpuCapability choose() {
  const Entry entries[] = {
#ifdef MMDEFORM_HAS_AVX512
      {CpuCapability::kAvx512, "avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
#endif
#ifdef MMDEFORM_HAS_AVX2
      // Every processor with AVX2 also has F16C.
      {CpuCapability::kAvx2, "avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {CpuCapability::kDefault, "default", true},
  };
  const char* forced = std::getenv("MMDEFORM_CPU_CAPABILITY");
  for (const Entry& entry : entries) {
    if (forced == nullptr ? entry.supported : std::string(forced) == entry.name) {
      STD_TORCH_CHECK(entry.supported, "MMDEFORM_CPU_CAPABILITY=", forced,
                      " is not supported by this processor");
      return entry.capability;
    }
  }
  STD_TORCH_CHECK(false, "MMDEFORM_CPU_CAPABILITY: expected default, avx2 or avx512, got ", forced);
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

}  // namespace mmdeform

// The instruction set in use, or "error: " and what is wrong: no exception may cross this border.
extern "C" __attribute__((visibility("default"))) const char* mmdeform_cpu_capability() {
  static std::string error;
  try {
    switch (mmdeform::cpu_capability()) {
      case mmdeform::CpuCapability::kAvx512:
        return "avx512";
      case mmdeform::CpuCapability::kAvx2:
        return "avx2";
      default:
        return "default";
    }
  } catch (const std::exception& exception) {
    error = std::string("error: ") + exception.what();
    return error.c_str();
  }
}
