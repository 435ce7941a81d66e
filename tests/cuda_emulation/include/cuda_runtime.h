// Stands in for the CUDA runtime's header when kernels are compiled as C++ for the emulator.
// Holds what the kernels use; add to it as they need more.

#pragma once

#include <cmath>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define MMDEFORM_SHARED(type, name, count)                  \
  static emulator::SharedArray<type, (count)> name##_array; \
  type* const name = name##_array.data()
#define MMDEFORM_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(emulator::Machine::get().dynamic_shared())

using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };

// Launch errors are thrown at once.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline void __syncthreads() { emulator::Machine::get().wait_at_block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  auto& machine = emulator::Machine::get();
  machine.exchange("__syncwarp", mask, machine.lane(), 0, nullptr);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  auto& machine = emulator::Machine::get();
  unsigned ballot = 0;
  machine.exchange("__ballot_sync", mask, machine.lane(), predicate, &ballot);
  return ballot;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  auto& machine = emulator::Machine::get();
  const unsigned first = machine.lane() & ~(width - 1u);
  return machine.exchange("__shfl_sync", mask, first + (source & (width - 1u)), value, nullptr);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  auto& machine = emulator::Machine::get();
  const unsigned lane = machine.lane(), source = lane ^ lane_mask;
  const unsigned last = lane | (width - 1u);
  return machine.exchange("__shfl_xor_sync", mask, source > last ? lane : source, value, nullptr);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  auto& machine = emulator::Machine::get();
  const unsigned lane = machine.lane(), last = lane | (width - 1u);
  const unsigned source = lane + delta > last ? lane : lane + delta;
  return machine.exchange("__shfl_down_sync", mask, source, value, nullptr);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  auto& machine = emulator::Machine::get();
  const unsigned lane = machine.lane(), first = lane & ~(width - 1u);
  const unsigned source = lane < first + delta ? lane : lane - delta;
  return machine.exchange("__shfl_up_sync", mask, source, value, nullptr);
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

[[noreturn]] inline void __trap() {
  throw std::runtime_error("CUDA emulator: __trap() was called");
}
