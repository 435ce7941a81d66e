// Kernels that test the emulator itself. Every function returns an error message or null.

#include <cuda_runtime.h>

#include <cstdlib>
#include <string>

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void block_sum_kernel(const float* input, int count, float* sum) {
  MMDEFORM_SHARED(float, partial, 8);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float value = i < count ? input[i] : 0;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
  atomicAdd(sum, total);
}

// Each thread takes its left neighbour's number; without the barrier the neighbour may not have
// written yet.
template <bool kBarrier>
__global__ void left_neighbour_kernel(int* output) {
  MMDEFORM_DYNAMIC_SHARED(int, numbers);
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  if (threadIdx.x > 0) output[threadIdx.x] = numbers[threadIdx.x - 1];
}

__global__ void warp_operations_kernel(int* output) {
  const int lane = threadIdx.x % 32, value = 100 + lane;
  output += threadIdx.x * 7;
  output[0] = __shfl_sync(kAll, value, 5);
  output[1] = __shfl_sync(kAll, value, 1, 8);
  output[2] = __shfl_up_sync(kAll, value, 3, 8);
  output[3] = __shfl_down_sync(kAll, value, 3, 8);
  output[4] = __shfl_xor_sync(kAll, value, 6);
  output[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  if (lane < 16) {
    output[6] = __shfl_xor_sync(0xffffu, value, 1);
  } else {
    output[6] = __any_sync(0xffff0000u, lane == 20) + 2 * __all_sync(0xffff0000u, lane == 20);
  }
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void divergent_shuffle_kernel(int* output) {
  if (threadIdx.x != 3) output[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void absent_lane_kernel(int* output) {
  if (threadIdx.x < 16) output[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}

__global__ void unwritten_shared_kernel(float* output) {
  MMDEFORM_SHARED(float, values, 32);
  output[blockIdx.x * 32 + threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 1;
}

__global__ void write_global_kernel(int* output, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) output[i] = i;
}

__global__ void write_shared_kernel(int* output, int index) {
  MMDEFORM_DYNAMIC_SHARED(int, numbers);
  numbers[threadIdx.x == 0 ? index : 0] = 1;
  output[threadIdx.x] = numbers[0];
}

__global__ void trap_kernel() {
  if (blockIdx.x == 1) __trap();
}

std::string message;

template <typename Function>
const char* guarded(const Function& function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*
#define LAUNCH(kernel, blocks, threads, shared, ...) \
  guarded([&] { emulator::launch(#kernel, blocks, threads, shared, kernel, ##__VA_ARGS__); })

EXPORT block_sum(const float* input, int count, float* sum) {
  return LAUNCH(block_sum_kernel, (count + 255) / 256, 256, 0, input, count, sum);
}
EXPORT left_neighbour(int* output, int threads, bool barrier) {
  const size_t bytes = threads * sizeof(int);
  return barrier ? LAUNCH(left_neighbour_kernel<true>, 1, threads, bytes, output)
                 : LAUNCH(left_neighbour_kernel<false>, 1, threads, bytes, output);
}
EXPORT warp_operations(int* output) { return LAUNCH(warp_operations_kernel, 1, 64, 0, output); }
EXPORT divergent_barrier() { return LAUNCH(divergent_barrier_kernel, 2, 64, 0); }
EXPORT divergent_shuffle(int* output) { return LAUNCH(divergent_shuffle_kernel, 1, 32, 0, output); }
EXPORT absent_lane(int* output) { return LAUNCH(absent_lane_kernel, 1, 32, 0, output); }
EXPORT unwritten_shared(float* output) { return LAUNCH(unwritten_shared_kernel, 2, 32, 0, output); }
EXPORT too_much_shared(int* output) {
  return LAUNCH(write_shared_kernel, 1, 32, 49 * 1024, output, 0);
}
EXPORT trap() { return LAUNCH(trap_kernel, 2, 32, 0); }
EXPORT write_global(int allocated, int written) {
  int* output = static_cast<int*>(std::malloc(allocated * sizeof(int)));
  const char* error = LAUNCH(write_global_kernel, (written + 31) / 32, 32, 0, output, written);
  std::free(output);
  return error;
}
EXPORT write_shared(int allocated, int index) {
  int values[32];
  int* output = values;
  return LAUNCH(write_shared_kernel, 1, 32, allocated * sizeof(int), output, index);
}
