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
  A* offset;  // [points, 2], of the points of an output pixel, or their gradients
  A* weight;  // [points]

  Scratch(const Dcnv3Args& args, int64_t* memory)
      : points(memory, (args.points + 2 * kPointBlock - 1) / kPointBlock * kPointBlock),
        offset(reinterpret_cast<A*>(memory + 18 * points.count)),
        weight(offset + 2 * points.count + kPointBlock) {}
};

// Brings `count` numbers to the accumulation type; writes up to a register's lanes more.
template <typename C, typename A>
inline void read_numbers(const C* from, A* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(from + i));
  if (i < count) store(to + i, load_first(from + i, count - i));
}

template <typename C, typename A>
inline void write_numbers(const A* from, C* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load(from + i), count - i);
}

// Reads offsets and weights of groups [first, last) of output pixel `row`.
template <typename C, typename A>
inline void read_points(const Dcnv3Args& args, int64_t row, int64_t first, int64_t last,
                        const Scratch<A>& scratch) {
  const int64_t taps = args.geometry.taps();
  const C* offset = static_cast<const C*>(args.offset) + row * args.offset_row;
  if (args.weight != nullptr) {
    const C* weight = static_cast<const C*>(args.weight) + row * args.points;
    const int64_t begin = first * taps, count = (last - first) * taps;
    read_numbers(offset + 2 * begin, scratch.offset + 2 * begin, 2 * count);
    read_numbers(weight + begin, scratch.weight + begin, count);
    return;
  }
  for (int64_t group = first; group < last; ++group) {
    const C* both = offset + 3 * group * taps;
    read_numbers(both, scratch.offset + 2 * group * taps, 2 * taps);
    read_numbers(both + 2 * taps, scratch.weight + group * taps, taps);
  }
}

// Writes the gradients of the offsets and weights of output pixel `row`.
template <typename C, typename A>
inline void write_gradients(const Dcnv3Args& args, int64_t row, const Scratch<A>& scratch) {
  const int64_t taps = args.geometry.taps();
  C* offset = static_cast<C*>(args.grad_offset) + row * args.offset_row;
  if (args.weight != nullptr) {
    C* weight = static_cast<C*>(args.grad_weight) + row * args.points;
    write_numbers(scratch.offset, offset, 2 * args.points);
    write_numbers(scratch.weight, weight, args.points);
    return;
  }
  for (int64_t group = 0; group < args.geometry.groups; ++group) {
    C* both = offset + 3 * group * taps;
    write_numbers(scratch.offset + 2 * group * taps, both, 2 * taps);
    write_numbers(scratch.weight + group * taps, both + 2 * taps, taps);
  }
  for (int64_t i = 3 * args.points; i < args.offset_row; ++i) offset[i] = narrow<C>(A(0));
}

// Finds the corners of the points of groups [first_group, last_group) of output pixel `row`, whose
// kernel has its centre at (center_x, center_y), and of some points behind them, wherever those
// are: loops over whole blocks of points have no remainder.
template <typename C, typename A>
void locate(const Dcnv3Args& args, int64_t row, A center_x, A center_y, int64_t first_group,
            int64_t last_group, const Rows& rows, const Scratch<A>& scratch) {
  const Dcnv3Geometry& g = args.geometry;
  read_points<C>(args, row, first_group, last_group, scratch);
  const A* __restrict__ offset = scratch.offset;
  const A* __restrict__ weight = scratch.weight;
  const Points<A>& points = scratch.points;
  const A* __restrict__ tap_x = static_cast<const A*>(args.taps.x);
  const A* __restrict__ tap_y = static_cast<const A*>(args.taps.y);
  const int64_t* __restrict__ channel = args.taps.channel;
  A* __restrict__ x_of = points.x;
  A* __restrict__ y_of = points.y;
  const A scale = static_cast<A>(g.offset_scale);
  const int64_t first = first_group * g.taps() / kPointBlock * kPointBlock;
  const int64_t last = (last_group * g.taps() + kPointBlock - 1) / kPointBlock * kPointBlock;
#pragma GCC ivdep
  for (int64_t i = first; i < last; ++i) {
    x_of[i] = scale * (tap_x[i] + offset[2 * i]);
    y_of[i] = scale * (tap_y[i] + offset[2 * i + 1]);
  }
  // Products are rounded before the centre is added, as in the reference: a fused multiply-add
  // could end on the other side of a pixel's edge, where gradients differ.
  asm volatile("" : : "r"(x_of), "r"(y_of) : "memory");
  const PointImage<A> image = {rows.base, static_cast<A>(g.width), static_cast<A>(g.height),
                               static_cast<int32_t>(g.width), static_cast<int32_t>(g.height)};
  const PointWriter<A> writer(points);
#pragma GCC ivdep
  for (int64_t i = first; i < last; ++i) {
    PointImage<A> group = image;
    group.first += channel[i] * rows.item;
    writer.set(i, center_x + x_of[i], center_y + y_of[i], weight[i], group, rows.step,
               rows.outside);
  }
}

// Calls function(row) for the output pixels of a block of an image, with the points of groups
// [first, last) of each located.
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
  for_each_pixel<C>(args, block, 0, g.groups, rows, scratch, [&](int64_t row) {
    T* output = static_cast<T*>(args.output) + row * g.channels();
    for_each_run<A>(g.group_channels, [&](auto run) {
      for (int64_t group = 0; group < g.groups; ++group) {
        gather(scratch.points.part(group * taps, taps), run, output + group * g.group_channels);
      }
    });
  });
}

// The gradients of the bilinear blends, from the corners' dot products with grad_output.
template <typename A>
void blend_gradients(const Points<A>& points, A scale, int64_t count, A* __restrict__ grad_offset,
                     A* __restrict__ grad_weight) {
  const A* __restrict__ dot = points.dot;
  for (int64_t i = 0; i < count; ++i) {
    const A x = points.x[i], y = points.y[i], a = scale * points.attention[i];
    const A across_top = dot[4 * i + 1] - dot[4 * i];
    const A across_bottom = dot[4 * i + 3] - dot[4 * i + 2];
    const A top = dot[4 * i] + x * across_top;
    const A bottom = dot[4 * i + 2] + x * across_bottom;
    grad_weight[i] = top + y * (bottom - top);
    grad_offset[2 * i] = a * (across_top + y * (across_bottom - across_top));
    grad_offset[2 * i + 1] = a * (bottom - top);
  }
}

template <typename T, typename C, typename A = Accumulation<T>>
void backward_points(const Dcnv3Args& args, const Dcnv3Block& block, int64_t* memory) {
  const Dcnv3Geometry& g = args.geometry;
  const Scratch<A> scratch(args, memory);
  const int64_t taps = g.taps();
  const int64_t padded = (args.points + kPointBlock - 1) / kPointBlock * kPointBlock;
  const A scale = static_cast<A>(g.offset_scale);
  const Rows rows = input_rows<T>(args, block.image);
  for_each_pixel<C>(args, block, 0, g.groups, rows, scratch, [&](int64_t row) {
    const T* grad_output = static_cast<const T*>(args.grad_output) + row * g.channels();
    std::memset(scratch.points.dot, 0, 4 * padded * sizeof(A));
    for_each_run<A>(g.group_channels, [&](auto run) {
      for (int64_t group = 0; group < g.groups; ++group) {
        add_dots(scratch.points.part(group * taps, taps), run,
                 grad_output + group * g.group_channels);
      }
    });
    blend_gradients(scratch.points, scale, padded, scratch.offset, scratch.weight);
    write_gradients<C>(args, row, scratch);
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
  for_each_pixel<C>(args, block, first_group, last_group, rows, scratch, [&](int64_t row) {
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
