// Gathers and scatters over sampling points: the inner loops of every operator whose groups of
// adjacent channels share their points. Memory is channels last, so that a corner of a point is a
// row of adjacent numbers.
#pragma once

#include <type_traits>

#include "cpu/vec.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {

// What is known about the points of one row; arrays over points, corners ordered
// top left, top right, bottom left, bottom right.
template <typename A>
struct Points {
  int64_t count, stride;  // arrays over corners hold one corner's points `stride` apart
  int64_t* address;       // [4][stride], where the corner's channels begin
  A* weight;              // [4][stride], bilinear times attention weight
  A* x;                   // [count], position in pixels, then its fraction
  A* y;
  A* attention;  // [count], zero outside the image
  A* dot;        // [count][4], <grad_output, corner>
  A* grad;       // [3 * count], where C is narrower than A
  A* input;      // [3 * count], where C is narrower than A

  Points(int64_t* scratch, int64_t count)
      : count(count),
        stride(count),
        address(scratch),
        weight(reinterpret_cast<A*>(scratch + 4 * count)),
        x(weight + 4 * count),
        y(x + count),
        attention(y + count),
        dot(attention + count),
        grad(dot + 4 * count),
        input(grad) {}

  // `size` points from `first` on.
  Points part(int64_t first, int64_t size) const {
    Points points = *this;
    points.count = size;
    points.address += first;
    points.weight += first;
    points.x += first;
    points.y += first;
    points.attention += first;
    points.dot += 4 * first;
    return points;
  }
};

// Where pixel 0 of an image lies, and how large the image is.
template <typename A>
struct PointImage {
  int64_t first;
  A width_a, height_a;
  int32_t width, height;
};

// Locates points. A copy of the arrays' addresses for loops that the compiler vectorises: it does
// not see through the strides of Points.
template <typename A>
struct PointWriter {
  A *x, *y, *attention;
  A* weight[4];
  int64_t* address[4];

  explicit PointWriter(const Points<A>& points)
      : x(points.x), y(points.y), attention(points.attention) {
    for (int corner = 0; corner < 4; ++corner) {
      weight[corner] = points.weight + corner * points.stride;
      address[corner] = points.address + corner * points.stride;
    }
  }

  // Fills the arrays for point i at position (x, y) with attention weight a; pixels are `step`
  // bytes apart, corners outside the image are at `outside`.
  __attribute__((always_inline)) inline void set(int64_t i, A x_i, A y_i, A a,
                                                 const PointImage<A>& image, int64_t step,
                                                 int64_t outside) const {
    const bool inside =
        (x_i > A(-1)) & (x_i < image.width_a) & (y_i > A(-1)) & (y_i < image.height_a);
    x_i = inside ? x_i : A(0);
    y_i = inside ? y_i : A(0);
    a = inside ? a : A(0);
    int32_t column = static_cast<int32_t>(x_i), line = static_cast<int32_t>(y_i);
    column -= static_cast<A>(column) > x_i;
    line -= static_cast<A>(line) > y_i;
    x_i -= static_cast<A>(column);
    y_i -= static_cast<A>(line);
    x[i] = x_i;
    y[i] = y_i;
    attention[i] = a;
    const A upper = a * (1 - y_i), lower = a * y_i;
    weight[0][i] = upper * (1 - x_i);
    weight[1][i] = upper * x_i;
    weight[2][i] = lower * (1 - x_i);
    weight[3][i] = lower * x_i;

    const uint32_t width = image.width, height = image.height;
    const bool left = inside & (static_cast<uint32_t>(column) < width);
    const bool right = inside & (static_cast<uint32_t>(column + 1) < width);
    const bool top = static_cast<uint32_t>(line) < height;
    const bool bottom = static_cast<uint32_t>(line + 1) < height;
    const int32_t pixel = line * image.width + column;
    const int64_t upper_left = image.first + pixel * step - outside;
    const int64_t lower_left = upper_left + image.width * step;
    address[0][i] = outside + (upper_left & -int64_t(top & left));
    address[1][i] = outside + ((upper_left + step) & -int64_t(top & right));
    address[2][i] = outside + (lower_left & -int64_t(bottom & left));
    address[3][i] = outside + ((lower_left + step) & -int64_t(bottom & right));
  }
};

// Brings `count` numbers to the accumulation type, in `buffer` unless they have it already.
template <typename C, typename A>
inline const A* widen_all(const C* from, A* buffer, int64_t count) {
  if constexpr (std::is_same_v<C, A>) {
    return from;
  } else {
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store(buffer + i, load(from + i));
    for (; i < count; ++i) buffer[i] = widen(from[i]);
    return buffer;
  }
}

template <typename A, typename C>
inline void narrow_all(const A* from, C* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = narrow<C>(from[i]);
}

// A run of adjacent channels: kVectors registers, or, where that is 0, part of one.
template <int kVectors>
struct Run {
  static constexpr int kRegisters = kVectors == 0 ? 1 : kVectors;
  int64_t channel, count;

  template <typename T>
  auto read(const T* from, int k) const {
    if constexpr (kVectors == 0) return load_first(from, count);
    if constexpr (kVectors != 0) return load(from + k * kLanes<Accumulation<T>>);
  }
  template <typename T>
  void write(T* to, int k, Vec<Accumulation<T>> values) const {
    if constexpr (kVectors == 0) store_first(to, values, count);
    if constexpr (kVectors != 0) store(to + k * kLanes<Accumulation<T>>, values);
  }
};

// Calls function(Run) for runs that cover `channels` channels.
template <typename A, typename F>
inline void for_each_run(int64_t channels, F&& function) {
  constexpr int64_t kWidth = kLanes<A>;
  int64_t channel = 0;
  for (; channel + 4 * kWidth <= channels; channel += 4 * kWidth) function(Run<4>{channel, 0});
  if (channel + 2 * kWidth <= channels) {
    function(Run<2>{channel, 0});
    channel += 2 * kWidth;
  }
  if (channel + kWidth <= channels) {
    function(Run<1>{channel, 0});
    channel += kWidth;
  }
  if (channel < channels) function(Run<0>{channel, channels - channel});
}

template <typename T>
inline T* at(int64_t address, int64_t channel) {
  return reinterpret_cast<T*>(address) + channel;
}

// output = sum of weight * corner over points and corners.
template <typename T, int kVectors, typename A = Accumulation<T>>
inline void gather(const Points<A>& points, Run<kVectors> run, T* output) {
  constexpr int kRegisters = Run<kVectors>::kRegisters;
  // Two sums: consecutive additions wait less for each other.
  Vec<A> total[2][kRegisters] = {};
  for (int64_t i = 0; i < points.count; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      const T* pixel = at<const T>(points.address[corner * points.stride + i], run.channel);
      const Vec<A> weight = broadcast(points.weight[corner * points.stride + i]);
      for (int k = 0; k < kRegisters; ++k) total[corner / 2][k] += weight * run.read(pixel, k);
    }
  }
  for (int k = 0; k < kRegisters; ++k) {
    run.write(output + run.channel, k, total[0][k] + total[1][k]);
  }
}

// dot += <grad_output, corner> for all points and corners.
template <typename T, int kVectors, typename A = Accumulation<T>>
inline void add_dots(const Points<A>& points, Run<kVectors> run, const T* grad_output) {
  constexpr int kRegisters = Run<kVectors>::kRegisters;
  Vec<A> grad[kRegisters];
  for (int k = 0; k < kRegisters; ++k) grad[k] = run.read(grad_output + run.channel, k);
  for (int64_t i = 0; i < points.count; ++i) {
    Vec<A> product[4];
    for (int corner = 0; corner < 4; ++corner) {
      const T* pixel = at<const T>(points.address[corner * points.stride + i], run.channel);
      product[corner] = grad[0] * run.read(pixel, 0);
      for (int k = 1; k < kRegisters; ++k) product[corner] += grad[k] * run.read(pixel, k);
    }
    add_sums(product, points.dot + 4 * i);
  }
}

// corner += weight * grad_output for all points and corners.
template <typename T, int kVectors, typename A = Accumulation<T>>
inline void scatter(const Points<A>& points, Run<kVectors> run, const T* grad_output) {
  constexpr int kRegisters = Run<kVectors>::kRegisters;
  Vec<A> grad[kRegisters];
  for (int k = 0; k < kRegisters; ++k) grad[k] = run.read(grad_output + run.channel, k);
  for (int64_t i = 0; i < points.count; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      A* pixel = at<A>(points.address[corner * points.stride + i], run.channel);
      const Vec<A> weight = broadcast(points.weight[corner * points.stride + i]);
      for (int k = 0; k < kRegisters; ++k) {
        run.write(pixel, k, run.read(static_cast<const A*>(pixel), k) + weight * grad[k]);
      }
    }
  }
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
