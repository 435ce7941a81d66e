// Element types of tensors as CPU kernels see them, and their accumulation types.
//
// The 16-bit types are plain bit patterns: kernels are compiled per instruction set and must not
// share inline functions of larger headers. Scalar conversions are internal to each file.
#pragma once

#include <cstdint>

namespace mmdeform {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of coordinates and sums.
template <typename T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <typename T>
using Accumulation = typename AccumulationOf<T>::type;

namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}
inline float widen(Half value) {
  // Shift the exponent and mantissa into place and rescale by 2^112, which also makes subnormal
  // numbers right; infinities and NaN need the full exponent.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return float_from_bits(sign | 0x70000000u | magnitude);
  return float_from_bits(sign | bits_of_float(float_from_bits(magnitude) * 0x1p112f));
}

template <typename T, typename A>
inline T narrow(A value) {
  return static_cast<T>(value);
}
template <>
inline BFloat16 narrow<BFloat16, float>(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Half narrow<Half, float>(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa so that the addition itself rounds to nearest even.
    const uint32_t aligned = bits_of_float(float_from_bits(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (aligned - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace
}  // namespace mmdeform
