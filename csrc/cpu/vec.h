// SIMD vectors for kernels compiled once per capability (see capability.h).
#pragma once

#if defined(__F16C__) || defined(__AVX512F__)
#pragma GCC diagnostic push
// GCC 12 warns of its own _mm512_undefined_ps() wherever an intrinsic built on it is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#include <cstdint>

#include "cpu/capability.h"
#include "cpu/storage.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

// A register of accumulation type A (float or double).
template <typename A>
using Vec = typename VecOf<A>::type;

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
inline Vec<A> load(const A* from) {
  Vec<A> result;
  __builtin_memcpy(&result, from, sizeof(result));
  return result;
}

template <typename A>
inline void store(A* to, Vec<A> from) {
  __builtin_memcpy(to, &from, sizeof(from));
}

inline Vec<float> load(const BFloat16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  Narrow bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Wide) << 16);
}

inline Vec<float> load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec<float> result;
  for (int i = 0; i < kLanes<float>; ++i) result[i] = widen(from[i]);
  return result;
#endif
}

inline void store(BFloat16* to, Vec<float> from) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  const Wide bits = reinterpret_cast<Wide>(from);
  const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Wide nan = (bits >> 16) | 0x40u;  // rounding could carry out of the mantissa
  const Narrow result = __builtin_convertvector(from == from ? rounded : nan, Narrow);
  __builtin_memcpy(to, &result, sizeof(result));
}

inline void store(Half* to, Vec<float> from) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(from, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(from, 0));
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i] = narrow<Half>(from[i]);
#endif
}

template <typename A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// Sum of the lanes, by halves.
template <typename A>
inline A sum(Vec<A> v) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Reads the first `count` < kLanes numbers; the others are zero.
template <typename T>
inline Vec<Accumulation<T>> load_first(const T* from, int64_t count) {
  T buffer[kLanes<Accumulation<T>>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}

template <typename T>
inline void store_first(T* to, Vec<Accumulation<T>> from, int64_t count) {
  T buffer[kLanes<Accumulation<T>>];
  store(buffer, from);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

#if defined(__AVX512F__)
template <>
inline Vec<float> load_first(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps((1u << count) - 1, from);
}
template <>
inline Vec<double> load_first(const double* from, int64_t count) {
  return _mm512_maskz_loadu_pd((1u << count) - 1, from);
}
template <>
inline Vec<float> load_first(const Half* from, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, from));
}
template <>
inline Vec<float> load_first(const BFloat16* from, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16((1u << count) - 1, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
template <>
inline void store_first(float* to, Vec<float> from, int64_t count) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, from);
}
template <>
inline void store_first(double* to, Vec<double> from, int64_t count) {
  _mm512_mask_storeu_pd(to, (1u << count) - 1, from);
}
#endif

// totals[j] += sum(v[j]).
inline void add_sums(const Vec<double> (&v)[4], double* totals) {
  for (int j = 0; j < 4; ++j) totals[j] += sum<double>(v[j]);
}

inline void add_sums(const Vec<float> (&v)[4], float* totals) {
#if defined(__AVX2__)
  __m256 half[4];
  for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
    half[j] = _mm256_add_ps(_mm512_castps512_ps256(v[j]), _mm512_extractf32x8_ps(v[j], 1));
#else
    half[j] = v[j];
#endif
  }
  const __m256 pairs =
      _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(totals, _mm_add_ps(_mm_loadu_ps(totals), sums));
#else
  for (int j = 0; j < 4; ++j) totals[j] += sum<float>(v[j]);
#endif
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
