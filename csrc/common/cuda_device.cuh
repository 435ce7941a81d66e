// What every CUDA kernel uses: shared memory, vectors, reductions over lanes. Kernels written with
// these also compile as C++ for the emulator (tests/cuda_emulation), so PTX stands only under
// __CUDA_ARCH__ beside a portable twin.

#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "common/bilinear.h"

#ifdef __CUDACC__
#define MMDEFORM_SHARED(type, name, count) __shared__ type name[count]
#define MMDEFORM_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace mmdeform {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kVectorBytes = 16;

// Coordinates and sums of data of type T.
template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename T>
using accumulation_t = typename Accumulation<T>::type;

// kCount neighbours, read and written by one access of up to 16 bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T data[kCount];
};

template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, kCount>*>(address);
}

template <int kCount, typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(address) = vector;
}

// Address of corner k; meaningful only where its bit is set. Sums of products that the corners
// share: the product with each corner's pixel would cost four.
template <typename T, typename A>
__device__ __forceinline__ T* corner_address(T* image, int pixel_stride,
                                             const BilinearPoint<A>& point, int W, int k) {
  T* row = image + static_cast<int64_t>(point.pixel) * pixel_stride;
  if (k & 2) row += static_cast<int64_t>(W) * pixel_stride;
  return k & 1 ? row + pixel_stride : row;
}

// Channels of the four corners of a point, zero where a corner lies outside. Not left to a zero
// weight: an infinity read there would become NaN. All loads are issued before any is used.
template <int kCount, typename T, typename A>
__device__ __forceinline__ void load_corners(const T* image, int pixel_stride,
                                             const BilinearPoint<A>& point, int W,
                                             Vector<T, kCount> (&corners)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    corners[k] = {};
    const T* address = corner_address(image, pixel_stride, point, W, k);
    if (has_corner(point, k)) corners[k] = load_vector<kCount>(address);
  }
}

// Writes sums in their final type.
template <int kCount, typename T, typename A>
__device__ __forceinline__ void store_converted(T* address, const A (&values)[kCount]) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.data[i] = static_cast<T>(values[i]);
  store_vector(address, vector);
}

// a / b for a >= 0, b > 0; 64-bit division is several times slower than 32-bit.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Products that must round as the references do: contracted into a fused multiply-add, a position
// on an integer line could fall on its other side.
__device__ __forceinline__ float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply_rounded(double a, double b) { return __dmul_rn(a, b); }

// Sum over each aligned group of `lanes` (a power of two) neighbours; every lane gets it. All lanes
// of the warp must take part.
template <typename A>
__device__ __forceinline__ A sum_over_lanes(A value, int lanes) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    if (step < lanes) value += __shfl_xor_sync(kFullMask, value, step);
  }
  return value;
}

// Adds values to global memory that other threads add to as well; address has the alignment of
// four floats where kCount is a multiple of four.
template <int kCount, typename A>
__device__ __forceinline__ void reduce_add(A* address, const A (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) atomicAdd(address + i, values[i]);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <int kCount>
__device__ __forceinline__ void reduce_add(float* address, const float (&values)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                       __cvta_generic_to_global(address + i)),
                   "f"(values[i]), "f"(values[i + 1]), "f"(values[i + 2]), "f"(values[i + 3])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) atomicAdd(address + i, values[i]);
  }
}
#endif

}  // namespace mmdeform
