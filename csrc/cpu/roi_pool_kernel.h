// The arithmetic of RoI pooling, for deform_roi_pool_kernel.cpp and deform_ps_roi_pool_kernel.cpp.
//
// The samples of a bin form a grid, and whether they contribute, the pixels around them and their
// bilinear weights are found for each axis alone. So a bin's sum of samples is a sum over rows of
// pixels of sums over columns, in which pixels between neighbouring samples are read once. Its
// derivatives by the bin's position have the same form, with slopes in place of weights.
//
// A rule says where the samples of a bin lie:
//   margin: how far outside the image, in pixels, samples contribute
//   axis(g, first, second, bins, size): the RoI along one axis
//   begin(g, axis, bin, offset): where a bin begins
//   first(axis, begin), shift(axis, index): its sample `index` from `first` on lies at
//     begin + shift
//   divisor(y, x, rows, columns): what the sum of samples is divided by
#pragma once

#include "cpu/points.h"
#include "cpu/roi_pool.h"
#include "cpu/transpose.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {
namespace {

// Makes a product round before it is added to something, as in the references: a fused
// multiply-add could end on the other side of a pixel's centre, where gradients differ.
template <typename A>
inline A rounded(A value) {
  asm("" : "+m"(value));
  return value;
}

template <typename A>
inline bool is_finite(A value) {
  return value - value == 0;
}

// One RoI along one axis, in pixels.
template <typename A>
struct RoiAxis {
  A start, extent, bin_size;
  A samples;        // of a bin; not an integer's range: grids of absurd RoIs are huge
  A step;           // from sample to sample, where the rule uses it
  A scale;          // derivative of positions by offsets
  int64_t visited;  // samples that are looked at
  int64_t size;     // of the image
};

// The pixels along one axis that contribute to a bin.
template <typename A>
struct AxisTable {
  int64_t count = 0;
  A kept = 0;   // samples that contribute
  int64_t* at;  // pixels
  A* weight;    // sums of the samples' bilinear weights
  A* slope;     // and of their derivatives by the position

  AxisTable(void* memory, int64_t size)
      : at(static_cast<int64_t*>(memory)),
        weight(reinterpret_cast<A*>(at + size)),
        slope(weight + size) {}

  void add(int64_t pixel, A weight_, A slope_) {
    // Samples follow one another: a pixel that is there already is one of the last two.
    int64_t i = count - 1;
    if (i > 0 && at[i] != pixel) --i;
    if (i < 0 || at[i] != pixel) {
      i = count++;
      at[i] = pixel;
      weight[i] = slope[i] = 0;
    }
    weight[i] += weight_;
    slope[i] += slope_;
  }
};

template <typename Rule, typename A>
void fill(const RoiAxis<A>& axis, A begin, AxisTable<A>& table) {
  table.count = 0;
  table.kept = 0;
  const int64_t last = axis.size - 1;
  const A before = -Rule::template margin<A>, behind = A(last) + Rule::template margin<A>;
  const A first = Rule::first(axis, begin);
  for (int64_t i = 0; i < axis.visited; ++i) {
    const A position = begin + Rule::shift(axis, first + A(i));
    if (!(position >= before && position <= behind)) continue;  // NaN is left out as well
    table.kept += 1;
    // Where a position is clamped, its gradient is zero.
    const A slope = position < 0 || position >= A(last) ? 0 : 1;
    const A inside = position < 0 ? A(0) : position > A(last) ? A(last) : position;
    int64_t low = static_cast<int64_t>(inside);
    low = low < last ? low : last;
    const A fraction = inside - A(low);
    table.add(low, 1 - fraction, -slope);
    table.add(low < last ? low + 1 : last, fraction, slope);
  }
}

// A RoI and the tables of the bin in hand.
template <typename Rule, typename T, typename C>
struct RoiBins {
  using A = Accumulation<T>;

  const RoiPoolArgs<T, C>& args;
  const RoiPoolGeometry& g;
  int64_t roi;
  RoiAxis<A> y, x;
  AxisTable<A> rows, columns;
  int64_t cell, part;  // of the bin in hand
  A factor;            // of its sum of samples

  RoiBins(const RoiPoolArgs<T, C>& args, int64_t roi, void* tables)
      : args(args),
        g(args.geometry),
        roi(roi),
        rows(tables, args.table_size),
        columns(rows.slope + args.table_size, args.table_size) {
    const A* box = args.rois + 5 * roi;
    x = Rule::axis(g, box[1], box[3], g.bins_w, g.width);
    y = Rule::axis(g, box[2], box[4], g.bins_h, g.height);
  }

  int64_t cell_of(int64_t bin) const {
    return bin / g.bins_w * g.group_size / g.bins_h * g.group_size +
           bin % g.bins_w * g.group_size / g.bins_w;
  }

  // Finds the pixels of a bin.
  void locate(int64_t group, int64_t bin) {
    const int64_t row = bin / g.bins_w, column = bin % g.bins_w;
    cell = cell_of(bin);
    part = row * g.part_h / g.bins_h * g.part_w + column * g.part_w / g.bins_w;
    A offset_x = 0, offset_y = 0;
    if (args.offset != nullptr) {
      const C* offset = args.offset + (roi * g.classes + group) * 2 * g.parts() + part;
      offset_x = widen(offset[0]);
      offset_y = widen(offset[g.parts()]);
    }
    fill<Rule>(y, Rule::begin(g, y, row, offset_y), rows);
    fill<Rule>(x, Rule::begin(g, x, column, offset_x), columns);
    for (int64_t i = 0; i < rows.count; ++i) rows.at[i] *= g.width;
    factor = (args.mask == nullptr ? A(1) : A(widen(args.mask[roi * g.bins() + bin]))) / divisor();
  }

  A divisor() const {
    const A count = Rule::divisor(y, x, rows, columns);
    return count > 1 ? count : 1;
  }
  bool is_empty() const { return rows.count == 0 || columns.count == 0; }
};

// output = factor * sum of samples. base: the first channel of the image's first pixel, stride:
// from pixel to pixel.
template <typename A, int kVectors>
void gather(const AxisTable<A>& rows, const AxisTable<A>& columns, A factor, const A* base,
            int64_t stride, Run<kVectors> run, A* output) {
  constexpr int kRegisters = Run<kVectors>::kRegisters;
  Vec<A> total[kRegisters] = {};
  for (int64_t i = 0; i < rows.count; ++i) {
    Vec<A> line[kRegisters] = {};
    for (int64_t j = 0; j < columns.count; ++j) {
      const A* pixel = base + (rows.at[i] + columns.at[j]) * stride + run.channel;
      const Vec<A> weight = broadcast(columns.weight[j]);
      for (int k = 0; k < kRegisters; ++k) line[k] += weight * run.read(pixel, k);
    }
    const Vec<A> weight = broadcast(rows.weight[i]);
    for (int k = 0; k < kRegisters; ++k) total[k] += weight * line[k];
  }
  for (int k = 0; k < kRegisters; ++k) {
    run.write(output + run.channel, k, broadcast(factor) * total[k]);
  }
}

// totals += dot products of the gradient with the sum of samples and with its derivatives by y and
// by x.
template <typename A, int kVectors>
void add_dots(const AxisTable<A>& rows, const AxisTable<A>& columns, const A* base, int64_t stride,
              Run<kVectors> run, const A* gradient, A* totals) {
  constexpr int kRegisters = Run<kVectors>::kRegisters;
  Vec<A> products[4] = {};
  for (int64_t i = 0; i < rows.count; ++i) {
    Vec<A> line[kRegisters] = {}, slopes[kRegisters] = {};
    for (int64_t j = 0; j < columns.count; ++j) {
      const A* pixel = base + (rows.at[i] + columns.at[j]) * stride + run.channel;
      const Vec<A> weight = broadcast(columns.weight[j]), slope = broadcast(columns.slope[j]);
      for (int k = 0; k < kRegisters; ++k) {
        const Vec<A> values = run.read(pixel, k);
        line[k] += weight * values;
        slopes[k] += slope * values;
      }
    }
    Vec<A> along_line = {}, along_slopes = {};
    for (int k = 0; k < kRegisters; ++k) {
      const Vec<A> grad = run.read(gradient + run.channel, k);
      along_line += grad * line[k];
      along_slopes += grad * slopes[k];
    }
    products[0] += broadcast(rows.weight[i]) * along_line;
    products[1] += broadcast(rows.slope[i]) * along_line;
    products[2] += broadcast(rows.weight[i]) * along_slopes;
  }
  add_sums(products, totals);
}

// pixel += factor * weights * gradient for all pixels of a bin.
template <typename A, int kVectors>
void scatter(const AxisTable<A>& rows, const AxisTable<A>& columns, A factor, A* base,
             int64_t stride, Run<kVectors> run, const A* gradient) {
  constexpr int kRegisters = Run<kVectors>::kRegisters;
  for (int64_t i = 0; i < rows.count; ++i) {
    Vec<A> line[kRegisters];
    for (int k = 0; k < kRegisters; ++k) {
      line[k] = broadcast(factor * rows.weight[i]) * run.read(gradient + run.channel, k);
    }
    for (int64_t j = 0; j < columns.count; ++j) {
      A* pixel = base + (rows.at[i] + columns.at[j]) * stride + run.channel;
      const Vec<A> weight = broadcast(columns.weight[j]);
      for (int k = 0; k < kRegisters; ++k) {
        run.write(pixel, k, run.read(static_cast<const A*>(pixel), k) + weight * line[k]);
      }
    }
  }
}

template <typename T, typename A = Accumulation<T>>
void image_to_rows(const RoiPoolGeometry& g, const T* image, int64_t begin, int64_t count,
                   A* rows) {
  for (int64_t cell = 0; cell < g.cells(); ++cell) {
    planes_to_rows(image + cell * g.pixels() + begin, g.cells() * g.pixels(), g.output_dim, count,
                   rows + begin * g.channels + cell * g.output_dim, g.channels);
  }
}

template <typename T, typename A = Accumulation<T>>
void gradient_to_rows(const RoiPoolGeometry& g, const T* gradient, A* rows) {
  planes_to_rows(gradient, g.bins(), g.output_dim, g.bins(), rows, g.output_dim);
}

template <typename Rule, typename T, typename C, typename A = Accumulation<T>>
void forward(const RoiPoolArgs<T, C>& args, int64_t roi, const A* image, void* tables, A* sums,
             T* output) {
  const RoiPoolGeometry& g = args.geometry;
  RoiBins<Rule, T, C> bins(args, roi, tables);
  for (int64_t group = 0; group < g.classes; ++group) {
    for (int64_t bin = 0; bin < g.bins(); ++bin) {
      bins.locate(group, bin);
      const int64_t channel = group * g.class_channels();
      const A* base = image + bins.cell * g.output_dim + channel;
      A* sum = sums + bin * g.output_dim + channel;
      for_each_run<A>(g.class_channels(), [&](auto run) {
        gather(bins.rows, bins.columns, bins.factor, base, g.channels, run, sum);
      });
    }
  }
  rows_to_planes<T>(sums, g.output_dim, g.output_dim, g.bins(), nullptr, output, g.bins());
}

template <typename Rule, typename T, typename C, typename A = Accumulation<T>>
void backward_points(const RoiPoolArgs<T, C>& args, int64_t roi, const A* image, const A* gradient,
                     void* tables, A* sums, C* grad_offset, C* grad_mask) {
  const RoiPoolGeometry& g = args.geometry;
  RoiBins<Rule, T, C> bins(args, roi, tables);
  const int64_t offsets = 2 * g.classes * g.parts();
  for (int64_t i = 0; i < offsets; ++i) sums[i] = 0;
  for (int64_t group = 0; group < g.classes; ++group) {
    for (int64_t bin = 0; bin < g.bins(); ++bin) {
      bins.locate(group, bin);
      const int64_t channel = group * g.class_channels();
      const A* base = image + bins.cell * g.output_dim + channel;
      const A* grad = gradient + bin * g.output_dim + channel;
      A totals[4] = {};  // by the sum of samples, by y, by x
      if (!bins.is_empty()) {
        for_each_run<A>(g.class_channels(), [&](auto run) {
          add_dots(bins.rows, bins.columns, base, g.channels, run, grad, totals);
        });
        A* sum = sums + group * 2 * g.parts() + bins.part;
        sum[0] += bins.factor * totals[2] * bins.x.scale;
        sum[g.parts()] += bins.factor * totals[1] * bins.y.scale;
      }
      if (grad_mask != nullptr) grad_mask[bin] = narrow<C>(totals[0] / bins.divisor());
    }
  }
  if (grad_offset != nullptr) narrow_all(sums, grad_offset, offsets);
}

template <typename Rule, typename T, typename C, typename A = Accumulation<T>>
void backward_input(const RoiPoolArgs<T, C>& args, const RoiPoolTask& task, const A* gradients,
                    void* tables, A* sums, T* grad_image) {
  const RoiPoolGeometry& g = args.geometry;
  T* planes = grad_image + (task.channel * g.cells() + task.cell) * g.pixels();
  if (task.roi_count == 0) {
    for (int64_t c = 0; c < task.channels; ++c)
      __builtin_memset(planes + c * g.cells() * g.pixels(), 0, g.pixels() * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < g.pixels() * task.channels; ++i) sums[i] = 0;
  for (int64_t i = 0; i < task.roi_count; ++i) {
    RoiBins<Rule, T, C> bins(args, task.rois[i], tables);
    const A* gradient = gradients + task.rois[i] * g.bins() * g.output_dim;
    for (int64_t group = 0; group < g.classes; ++group) {
      // The task's channels in this class.
      const int64_t begin = group * g.class_channels(), end = begin + g.class_channels();
      const int64_t first = task.channel > begin ? task.channel : begin;
      const int64_t last = task.channel + task.channels < end ? task.channel + task.channels : end;
      if (first >= last) continue;
      for (int64_t bin = 0; bin < g.bins(); ++bin) {
        if (bins.cell_of(bin) != task.cell) continue;
        bins.locate(group, bin);
        for_each_run<A>(last - first, [&](auto run) {
          scatter(bins.rows, bins.columns, bins.factor, sums + first - task.channel, task.channels,
                  run, gradient + bin * g.output_dim + first);
        });
      }
    }
  }
  rows_to_planes<T>(sums, task.channels, task.channels, g.pixels(), nullptr, planes,
                    g.cells() * g.pixels());
}

template <typename Rule, typename T, typename C>
constexpr RoiPoolKernelsOf<T, C> kernels_of() {
  return {image_to_rows<T>, gradient_to_rows<T>, forward<Rule, T, C>, backward_points<Rule, T, C>,
          backward_input<Rule, T, C>};
}

template <typename Rule>
constexpr RoiPoolKernels kernels() {
  return {kernels_of<Rule, double, double>(),     kernels_of<Rule, float, float>(),
          kernels_of<Rule, Half, Half>(),         kernels_of<Rule, Half, float>(),
          kernels_of<Rule, BFloat16, BFloat16>(), kernels_of<Rule, BFloat16, float>()};
}

}  // namespace
}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
