// See dcnv3.h. Compiled once per instruction set.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/dcnv3.h"
#include "cpu/points.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {
namespace {

// Memory in which pixel p lies at base + p * step; what is outside the image is at `outside`.
struct Rows {
  int64_t base, step, item, outside;  // bytes; `item` of one channel
};

template <typename T>
Rows input_rows(const Dcnv3Args& args, int64_t image) {
  const char* base = static_cast<const char*>(args.input) + image * args.input_image_bytes;
  return {reinterpret_cast<int64_t>(base), args.input_pixel_bytes, sizeof(T),
          reinterpret_cast<int64_t>(args.zeros)};
}

// The kernels' scratch memory.
template <typename A>
struct Scratch {
  Points<A> points;
  A* rows;  // offset_row + weight_row numbers

  Scratch(const Dcnv3Args& args, int64_t* memory)
      : points(memory, (args.points + 2 * kPointBlock - 1) / kPointBlock * kPointBlock),
        rows(reinterpret_cast<A*>(memory + 18 * points.count)) {}
};

// Finds the corners of points [first, last) of output pixel `row`, whose kernel has its centre at
// (center_x, center_y). Some points behind `last` are located as well, wherever that is.
template <typename C, typename A>
void locate(const Dcnv3Args& args, int64_t row, A center_x, A center_y, int64_t first, int64_t last,
            const Rows& rows, const Scratch<A>& scratch) {
  const Dcnv3Geometry& g = args.geometry;
  const A* offset = widen_all(static_cast<const C*>(args.offset) + row * args.offset_row,
                              scratch.rows, args.offset_row);
  const A* weight = offset;
  if (args.weight != nullptr) {
    weight = widen_all(static_cast<const C*>(args.weight) + row * args.weight_row,
                       scratch.rows + args.offset_row, args.weight_row);
  }
  const Points<A>& points = scratch.points;
  const A* __restrict__ tap_x = static_cast<const A*>(args.taps.x);
  const A* __restrict__ tap_y = static_cast<const A*>(args.taps.y);
  const int32_t* __restrict__ offset_at = args.taps.offset;
  const int32_t* __restrict__ weight_at = args.taps.weight;
  const int64_t* __restrict__ channel = args.taps.channel;
  A* __restrict__ x_of = points.x;
  A* __restrict__ y_of = points.y;
  const A scale = static_cast<A>(g.offset_scale);
  const int64_t end = first + (last - first + kPointBlock - 1) / kPointBlock * kPointBlock;
#pragma GCC ivdep
  for (int64_t i = first; i < end; ++i) {
    x_of[i] = scale * (tap_x[i] + offset[offset_at[i]]);
    y_of[i] = scale * (tap_y[i] + offset[offset_at[i] + 1]);
  }
  // Products are rounded before the centre is added, as in the reference: a fused multiply-add
  // could end on the other side of a pixel's edge, where gradients differ.
  asm volatile("" : : "r"(x_of), "r"(y_of) : "memory");
  const PointImage<A> image = {rows.base, static_cast<A>(g.width), static_cast<A>(g.height),
                               static_cast<int32_t>(g.width), static_cast<int32_t>(g.height)};
  const PointWriter<A> writer(points);
#pragma GCC ivdep
  for (int64_t i = first; i < end; ++i) {
    PointImage<A> group = image;
    group.first += channel[i] * rows.item;
    writer.set(i, center_x + x_of[i], center_y + y_of[i], weight[weight_at[i]], group, rows.step,
               rows.outside);
  }
}

// Calls function(pixel) for the output pixels of a block of an image, with points [first, last) of
// each located.
template <typename C, typename A, typename F>
inline void for_each_pixel(const Dcnv3Args& args, const Dcnv3Block& block, int64_t first,
                           int64_t last, const Rows& rows, const Scratch<A>& scratch,
                           F&& function) {
  const Dcnv3Geometry& g = args.geometry;
  int64_t line = block.first / g.out_width, column = block.first % g.out_width;
  for (int64_t pixel = block.first; pixel < block.last; ++pixel) {
    const A center_x = static_cast<A>(column * g.stride_w - g.pad_w + g.center_w());
    const A center_y = static_cast<A>(line * g.stride_h - g.pad_h + g.center_h());
    const int64_t row = block.image * g.out_pixels() + pixel;
    locate<C>(args, row, center_x, center_y, first, last, rows, scratch);
    function(row);
    if (++column == g.out_width) column = 0, ++line;
  }
}

template <typename T, typename C, typename A = Accumulation<T>>
void forward(const Dcnv3Args& args, const Dcnv3Block& block, int64_t* memory) {
  const Dcnv3Geometry& g = args.geometry;
  const Scratch<A> scratch(args, memory);
  const int64_t taps = g.taps();
  const Rows rows = input_rows<T>(args, block.image);
  for_each_pixel<C>(args, block, 0, args.points, rows, scratch, [&](int64_t row) {
    T* output = static_cast<T*>(args.output) + row * g.channels();
    for_each_run<A>(g.group_channels, [&](auto run) {
      for (int64_t group = 0; group < g.groups; ++group) {
        gather(scratch.points.part(group * taps, taps), run, output + group * g.group_channels);
      }
    });
  });
}

// The gradients of the bilinear blends, from the corners' dot products with grad_output.
template <typename C, typename A>
inline void blend_gradients(const Dcnv3Args& args, const Scratch<A>& scratch, int64_t row) {
  const Points<A>& points = scratch.points;
  const A scale = static_cast<A>(args.geometry.offset_scale);
  C* grad_offset = static_cast<C*>(args.grad_offset) + row * args.offset_row;
  C* grad_weight = grad_offset;
  if (args.weight != nullptr) {
    grad_weight = static_cast<C*>(args.grad_weight) + row * args.weight_row;
  }
  const int32_t* offset_at = args.taps.offset;
  const int32_t* weight_at = args.taps.weight;
  for (int64_t i = 0; i < args.points; ++i) {
    const A* dot = points.dot + 4 * i;
    const A x = points.x[i], y = points.y[i], a = scale * points.attention[i];
    const A across_top = dot[1] - dot[0], across_bottom = dot[3] - dot[2];
    const A top = dot[0] + x * across_top, bottom = dot[2] + x * across_bottom;
    grad_weight[weight_at[i]] = narrow<C>(top + y * (bottom - top));
    grad_offset[offset_at[i]] = narrow<C>(a * (across_top + y * (across_bottom - across_top)));
    grad_offset[offset_at[i] + 1] = narrow<C>(a * (bottom - top));
  }
  // What fills up a row that holds both.
  const int64_t used = args.points * (args.weight == nullptr ? 3 : 2);
  for (int64_t i = used; i < args.offset_row; ++i) grad_offset[i] = narrow<C>(A(0));
}

template <typename T, typename C, typename A = Accumulation<T>>
void backward_points(const Dcnv3Args& args, const Dcnv3Block& block, int64_t* memory) {
  const Dcnv3Geometry& g = args.geometry;
  const Scratch<A> scratch(args, memory);
  const int64_t taps = g.taps();
  const Rows rows = input_rows<T>(args, block.image);
  for_each_pixel<C>(args, block, 0, args.points, rows, scratch, [&](int64_t row) {
    const T* grad_output = static_cast<const T*>(args.grad_output) + row * g.channels();
    std::memset(scratch.points.dot, 0, 4 * args.points * sizeof(A));
    for_each_run<A>(g.group_channels, [&](auto run) {
      for (int64_t group = 0; group < g.groups; ++group) {
        add_dots(scratch.points.part(group * taps, taps), run,
                 grad_output + group * g.group_channels);
      }
    });
    blend_gradients<C>(args, scratch, row);
  });
}

template <typename T, typename C, typename A = Accumulation<T>>
void backward_input(const Dcnv3Args& args, int64_t image, int64_t channel, int64_t channels,
                    int64_t* memory, void* memory_of_sums) {
  const Dcnv3Geometry& g = args.geometry;
  const Scratch<A> scratch(args, memory);
  const int64_t taps = g.taps(), all = g.channels(), size = g.group_channels;
  const int64_t first_group = channel / size, last_group = (channel + channels - 1) / size + 1;
  const int64_t width = std::min(size, channels);
  A* outside = static_cast<A*>(memory_of_sums);
  A* sums = outside + width;
  int64_t step = channels;
  if constexpr (std::is_same_v<T, A>) {
    sums = static_cast<A*>(args.grad_input) + image * g.pixels() * all + channel;
    step = all;
  }
  std::memset(outside, 0, width * sizeof(A));
  for (int64_t pixel = 0; pixel < g.pixels(); ++pixel) {
    std::memset(sums + pixel * step, 0, channels * sizeof(A));
  }
  const int64_t base = reinterpret_cast<int64_t>(sums) - first_group * size * sizeof(A);
  const Rows rows = {base, step * static_cast<int64_t>(sizeof(A)), sizeof(A),
                     reinterpret_cast<int64_t>(outside)};
  const Dcnv3Block block = {image, 0, g.out_pixels()};
  for_each_pixel<C>(
      args, block, first_group * taps, last_group * taps, rows, scratch, [&](int64_t row) {
        const T* grad_output = static_cast<const T*>(args.grad_output) + row * all + channel;
        for_each_run<A>(width, [&](auto run) {
          for (int64_t group = first_group; group < last_group; ++group) {
            scatter(scratch.points.part(group * taps, taps), run,
                    grad_output + (group - first_group) * size);
          }
        });
      });
  if constexpr (!std::is_same_v<T, A>) {
    T* grad_input = static_cast<T*>(args.grad_input) + image * g.pixels() * all + channel;
    for (int64_t pixel = 0; pixel < g.pixels(); ++pixel) {
      narrow_all(sums + pixel * channels, grad_input + pixel * all, channels);
    }
  }
}

template <typename T, typename C>
constexpr Dcnv3Kernels kernels() {
  return {forward<T, C>, backward_points<T, C>, backward_input<T, C>};
}

}  // namespace

const Dcnv3Table& dcnv3_table() {
  static constexpr Dcnv3Table table = {kernels<double, double>(),     kernels<float, float>(),
                                       kernels<Half, Half>(),         kernels<Half, float>(),
                                       kernels<BFloat16, BFloat16>(), kernels<BFloat16, float>()};
  return table;
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
