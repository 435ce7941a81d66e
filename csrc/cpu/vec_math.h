// Functions of vectors (see vec.h), for kernels compiled once per capability.
#pragma once

#include "cpu/vec.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {

template <typename A>
struct IntVecOf;
template <>
struct IntVecOf<float> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct IntVecOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};

// A register of integers as wide as A.
template <typename A>
using IntVec = typename IntVecOf<A>::type;

// The larger number of each lane; b where one is NaN.
template <typename A>
inline Vec<A> larger(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// Largest integers that are not above v, for |v| < 2^31.
template <typename A>
inline IntVec<A> floor_to_int(Vec<A> v) {
  const IntVec<A> truncated = __builtin_convertvector(v, IntVec<A>);
  return truncated + (__builtin_convertvector(truncated, Vec<A>) > v);  // true is -1
}

// 0, 1, 2 ...
template <typename A>
inline IntVec<A> lane_indices() {
  IntVec<A> result;
  for (int i = 0; i < kLanes<A>; ++i) result[i] = i;
  return result;
}

// result[i] = v[index[i]] for index[i] in [0, kLanes).
template <typename A>
inline Vec<A> shuffle(Vec<A> v, IntVec<A> index) {
#if defined(__clang__)
  Vec<A> result;
  for (int i = 0; i < kLanes<A>; ++i) result[i] = v[index[i]];
  return result;
#else
  return __builtin_shuffle(v, index);
#endif
}

// The same for index[i] in [0, 2 * kLanes), where b follows a.
template <typename A>
inline Vec<A> shuffle(Vec<A> a, Vec<A> b, IntVec<A> index) {
#if defined(__clang__)
  Vec<A> result;
  for (int i = 0; i < kLanes<A>; ++i)
    result[i] = index[i] < kLanes<A> ? a[index[i]] : b[index[i] - kLanes<A>];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Constants of exp: x = n * ln 2 + r with |r| <= ln 2 / 2, e^r by its power series, 2^n by bits.
// ln 2 is split in two; the first part has so few digits that its products with n are exact.
template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 0x1.8p23f;  // v + kRound holds round(v) in its lowest bits
  static constexpr float kLn2High = 0x1.63p-1f;
  static constexpr float kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kSmallest = -87.3f;  // e^x is not subnormal from here on
  static constexpr int kBias = 127, kMantissa = 23, kTerms = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1;
  static constexpr double kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kSmallest = -708.3;
  static constexpr int kBias = 1023, kMantissa = 52, kTerms = 13;
};

constexpr double kInverseFactorials[] = {1.0,
                                         1.0,
                                         1.0 / 2,
                                         1.0 / 6,
                                         1.0 / 24,
                                         1.0 / 120,
                                         1.0 / 720,
                                         1.0 / 5040,
                                         1.0 / 40320,
                                         1.0 / 362880,
                                         1.0 / 3628800,
                                         1.0 / 39916800,
                                         1.0 / 479001600,
                                         1.0 / 6227020800.};

// e^x to within about one unit in the last place, for x below 80; 0 where it would be subnormal.
template <typename A>
inline Vec<A> exp(Vec<A> x) {
  using K = ExpConstants<A>;
  const Vec<A> rounded = x * A(1.4426950408889634) + K::kRound;
  const Vec<A> n = rounded - K::kRound;
  const Vec<A> r = (x - n * K::kLn2High) - n * K::kLn2Low;
  Vec<A> series = broadcast<A>(kInverseFactorials[K::kTerms]);
#pragma GCC unroll 13
  for (int i = K::kTerms - 1; i >= 0; --i) series = series * r + A(kInverseFactorials[i]);
  const IntVec<A> power = (reinterpret_cast<IntVec<A>>(rounded) + K::kBias) << K::kMantissa;
  const Vec<A> result = series * reinterpret_cast<Vec<A>>(power);
  return x < K::kSmallest ? Vec<A>{} : result;
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
