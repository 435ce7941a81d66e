// See ms_deform_attn.h. Compiled once per instruction set.
#include <cstring>
#include <type_traits>

#include "cpu/ms_deform_attn.h"
#include "cpu/points.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {
namespace {

// Asks for the memory of a row that the loops over queries come to soon. Rows of one head lie far
// apart, which a processor does not foresee. `bytes` is the size of a row.
inline void prefetch_row(const void* rows, int64_t row, int64_t bytes, int64_t heads) {
  constexpr int64_t kAhead = 4;
  const char* next = static_cast<const char*>(rows) + (row + kAhead * heads) * bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
}

// Finds the corners of a row's points in memory where token t lies at base + t * stride; corners
// outside the image are at `outside`.
template <typename T, typename C, typename A = Accumulation<T>>
void locate(const MsDeformAttnArgs& args, int64_t row, int64_t base, int64_t stride,
            int64_t outside, const Points<A>& points) {
  const int64_t count = points.count;
  const C* row_locations = static_cast<const C*>(args.locations) + row * 2 * count;
  const C* row_weights = static_cast<const C*>(args.weights) + row * count;
  prefetch_row(args.locations, row, 2 * count * sizeof(C), args.heads);
  prefetch_row(args.weights, row, count * sizeof(C), args.heads);
  const A* __restrict__ locations = widen_all(row_locations, points.input, 2 * count);
  const A* __restrict__ attention = widen_all(row_weights, points.input + 2 * count, count);
  const A* __restrict__ width_a = static_cast<const A*>(args.width_a);
  const A* __restrict__ height_a = static_cast<const A*>(args.height_a);
  A* __restrict__ x_of = points.x;
  A* __restrict__ y_of = points.y;
  for (int64_t i = 0; i < count; ++i) {
    x_of[i] = locations[2 * i] * width_a[i];
    y_of[i] = locations[2 * i + 1] * height_a[i];
  }
  // Products are rounded before 0.5 is subtracted, as in the reference: a fused multiply-add could
  // end on the other side of a pixel's edge, where gradients differ.
  asm volatile("" : : "r"(x_of), "r"(y_of) : "memory");
  const int32_t* __restrict__ widths = args.width;
  const int32_t* __restrict__ heights = args.height;
  const int64_t* __restrict__ starts = args.start;
  const PointWriter<A> writer(points);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const PointImage<A> level = {starts[i] * stride + base, width_a[i], height_a[i], widths[i],
                                 heights[i]};
    writer.set(i, x_of[i] - A(0.5), y_of[i] - A(0.5), attention[i], level, stride, outside);
  }
}

// Calls function(row) for the rows of a block with the corners of their points in value, or in
// `copy`, to which this copies the head's channels of all tokens.
template <typename T, typename C, typename A, typename F>
inline void for_each_row(const MsDeformAttnArgs& args, const MsDeformAttnBlock& block, void* copy,
                         const Points<A>& points, F&& function) {
  const char* value = static_cast<const char*>(args.value) + block.image * args.value_image_bytes +
                      block.head * args.value_head_bytes;
  int64_t base = reinterpret_cast<int64_t>(value), stride = args.value_token_bytes;
  if (copy != nullptr) {
    base = reinterpret_cast<int64_t>(copy);
    stride = args.channels * sizeof(T);
    for (int64_t token = 0; token < args.tokens; ++token) {
      std::memcpy(at<char>(base, token * stride), value + token * args.value_token_bytes, stride);
    }
  }
  const int64_t outside = reinterpret_cast<int64_t>(args.zeros);
  for (int64_t query = block.first; query < block.last; ++query) {
    const int64_t row = (block.image * args.queries + query) * args.heads + block.head;
    locate<T, C>(args, row, base, stride, outside, points);
    function(row);
  }
}

template <typename T, typename C, typename A = Accumulation<T>>
void forward(const MsDeformAttnArgs& args, const MsDeformAttnBlock& block, int64_t* scratch,
             void* copy) {
  const Points<A> points(scratch, args.points);
  for_each_row<T, C>(args, block, copy, points, [&](int64_t row) {
    T* output = static_cast<T*>(args.output) + row * args.channels;
    for_each_run<A>(args.channels, [&](auto run) { gather(points, run, output); });
  });
}

// The gradients of the bilinear blend, from the corners' dot products with grad_output.
template <typename A>
inline void blend_gradients(const MsDeformAttnArgs& args, const Points<A>& points,
                            A* __restrict__ grad_locations, A* __restrict__ grad_weights) {
  const A* __restrict__ dot = points.dot;
  const A* __restrict__ width = static_cast<const A*>(args.width_a);
  const A* __restrict__ height = static_cast<const A*>(args.height_a);
  for (int64_t i = 0; i < points.count; ++i) {
    const A x = points.x[i], y = points.y[i], a = points.attention[i];
    const A across_top = dot[4 * i + 1] - dot[4 * i];
    const A across_bottom = dot[4 * i + 3] - dot[4 * i + 2];
    const A top = dot[4 * i] + x * across_top;
    const A bottom = dot[4 * i + 2] + x * across_bottom;
    grad_weights[i] = top + y * (bottom - top);
    grad_locations[2 * i] = a * width[i] * (across_top + y * (across_bottom - across_top));
    grad_locations[2 * i + 1] = a * height[i] * (bottom - top);
  }
}

template <typename T, typename C, typename A = Accumulation<T>>
void backward_points(const MsDeformAttnArgs& args, const MsDeformAttnBlock& block, int64_t* scratch,
                     void* copy) {
  const int64_t count = args.points;
  const Points<A> points(scratch, count);
  for_each_row<T, C>(args, block, copy, points, [&](int64_t row) {
    const T* grad_output = static_cast<const T*>(args.grad_output) + row * args.channels;
    prefetch_row(args.grad_output, row, args.channels * sizeof(T), args.heads);
    for (int64_t i = 0; i < 4 * count; ++i) points.dot[i] = 0;
    for_each_run<A>(args.channels, [&](auto run) { add_dots(points, run, grad_output); });
    C* grad_locations = static_cast<C*>(args.grad_locations) + row * 2 * count;
    C* grad_weights = static_cast<C*>(args.grad_weights) + row * count;
    if constexpr (std::is_same_v<C, A>) {
      blend_gradients(args, points, grad_locations, grad_weights);
    } else {
      blend_gradients(args, points, points.grad, points.grad + 2 * count);
      narrow_all(points.grad, grad_locations, 2 * count);
      narrow_all(points.grad + 2 * count, grad_weights, count);
    }
  });
}

template <typename T, typename C, typename A = Accumulation<T>>
void backward_value(const MsDeformAttnArgs& args, int64_t image, int64_t head, int64_t channel,
                    int64_t channels, int64_t* scratch, void* sums_memory) {
  const Points<A> points(scratch, args.points);
  A* sums = static_cast<A*>(sums_memory);
  const int64_t base = reinterpret_cast<int64_t>(sums), stride = channels * sizeof(A);
  const int64_t outside = base + args.tokens * stride;
  std::memset(sums, 0, (args.tokens + 1) * stride);
  for (int64_t query = 0; query < args.queries; ++query) {
    const int64_t row = (image * args.queries + query) * args.heads + head;
    locate<T, C>(args, row, base, stride, outside, points);
    prefetch_row(args.grad_output, row, args.channels * sizeof(T), args.heads);
    const T* grad_output = static_cast<const T*>(args.grad_output) + row * args.channels + channel;
    for_each_run<A>(channels, [&](auto run) { scatter(points, run, grad_output); });
  }
  T* grad_value = static_cast<T*>(args.grad_value) +
                  (image * args.tokens * args.heads + head) * args.channels + channel;
  for (int64_t token = 0; token < args.tokens; ++token) {
    narrow_all(sums + token * channels, grad_value + token * args.heads * args.channels, channels);
  }
}

template <typename T, typename C>
constexpr MsDeformAttnKernels kernels() {
  return {forward<T, C>, backward_points<T, C>, backward_value<T, C>};
}

}  // namespace

const MsDeformAttnTable& ms_deform_attn_table() {
  static constexpr MsDeformAttnTable table = {
      kernels<double, double>(), kernels<float, float>(),       kernels<Half, Half>(),
      kernels<Half, float>(),    kernels<BFloat16, BFloat16>(), kernels<BFloat16, float>()};
  return table;
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
