// CPU kernels of deform_conv2d, compiled once per instruction set.
#include "cpu/deform_conv2d.h"
#include "cpu/gemm.h"
#include "cpu/transpose.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {
namespace {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <typename T, typename A = Accumulation<T>>
void image_to_rows(const DeformConv2dPlan& plan, const T* image, bool channels_last, int64_t begin,
                   int64_t count, A* rows) {
  const DeformConv2dGeometry& g = plan.geometry;
  if (!channels_last) {
    planes_to_rows(image + begin, g.pixels(), g.channels, count, rows + begin * g.channels,
                   g.channels);
    return;
  }
  for (int64_t i = begin * g.channels; i < (begin + count) * g.channels; ++i)
    rows[i] = widen(image[i]);
}

template <typename T, typename A = Accumulation<T>>
void rows_to_image(const DeformConv2dPlan& plan, const A* rows, int64_t begin, int64_t count,
                   T* image) {
  const DeformConv2dGeometry& g = plan.geometry;
  rows_to_planes<T>(rows + begin * g.channels, g.channels, g.channels, count, nullptr,
                    image + begin, g.pixels());
}

// For positions whose floor fits 32 bits.
template <typename A>
inline int32_t floor_to_int(A value) {
  const int32_t truncated = static_cast<int32_t>(value);
  return truncated - (value < static_cast<A>(truncated));
}

template <typename A, typename C>
void corners(const DeformConv2dPlan& plan, Tile tile, const C* offset, const C* mask, int64_t d,
             int64_t tap, Corners<A>* result) {
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t plane = g.out_pixels();
  const C* offset_y = offset + (d * g.taps() + tap) * 2 * plane + tile.begin;
  const C* offset_x = offset_y + plane;
  const C* masks = mask == nullptr ? nullptr : mask + (d * g.taps() + tap) * plane + tile.begin;
  const int64_t tap_y = tap / g.kernel_w * g.dilation_h - g.pad_h;
  const int64_t tap_x = tap % g.kernel_w * g.dilation_w - g.pad_w;
  const int32_t outside = static_cast<int32_t>(g.pixels());
  const int32_t height = static_cast<int32_t>(g.height), width = static_cast<int32_t>(g.width);
  int64_t out_y = tile.begin / g.out_width, out_x = tile.begin % g.out_width;
  for (int64_t p = 0; p < tile.count; ++p) {
    const A y = static_cast<A>(out_y * g.stride_h + tap_y) + widen(offset_y[p]);
    const A x = static_cast<A>(out_x * g.stride_w + tap_x) + widen(offset_x[p]);
    Corners<A>& corner = result[p];
    corner = {{outside, outside, outside, outside}, 0, 0, masks ? A(widen(masks[p])) : A(1)};
    // Also false for NaN, so that what is converted to an integer is always in range.
    if (y > -1 && y < height && x > -1 && x < width) {
      const int32_t top = floor_to_int(y), left = floor_to_int(x);
      corner.fraction_y = y - top;
      corner.fraction_x = x - left;
      const int32_t base = top * width + left;
      if (top >= 0 && left >= 0) corner.index[0] = base;
      if (top >= 0 && left + 1 < width) corner.index[1] = base + 1;
      if (top + 1 < height && left >= 0) corner.index[2] = base + width;
      if (top + 1 < height && left + 1 < width) corner.index[3] = base + width + 1;
    }
    if (++out_x == g.out_width) out_x = 0, ++out_y;
  }
}

template <typename T, typename A = Accumulation<T>>
void pack_weight(const DeformConv2dPlan& plan, const T* weight, const Segment& segment, A* packed) {
  constexpr int64_t kColumns = kGemmColumns<A>;
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t outs = g.group_out_channels(), first = segment.begin % g.group_channels();
  for (int64_t tap = 0; tap < g.taps(); ++tap) {
    A* block = packed + (tap * g.channels + segment.begin) * plan.padded_out_channels;
    for (int64_t o = 0; o < plan.padded_out_channels; ++o) {
      A* column = block + o / kColumns * segment.length * kColumns + o % kColumns;
      const T* row =
          weight + ((segment.group * outs + o) * g.group_channels() + first) * g.taps() + tap;
      for (int64_t c = 0; c < segment.length; ++c)
        column[c * kColumns] = o < outs ? A(widen(row[c * g.taps()])) : A(0);
    }
  }
}

template <typename T, typename A = Accumulation<T>>
void pack_weight_transposed(const DeformConv2dPlan& plan, const T* weight, const Segment& segment,
                            A* packed) {
  constexpr int64_t kColumns = kGemmColumns<A>;
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t outs = g.group_out_channels(), first = segment.begin % g.group_channels();
  const int64_t padded = round_up(segment.length, kColumns);
  for (int64_t tap = 0; tap < g.taps(); ++tap) {
    A* block = packed + (tap * plan.padded_channels + segment.padded_begin) * outs;
    for (int64_t o = 0; o < outs; ++o) {
      const T* row =
          weight + ((segment.group * outs + o) * g.group_channels() + first) * g.taps() + tap;
      for (int64_t c = 0; c < padded; ++c)
        block[(c / kColumns * outs + o) * kColumns + c % kColumns] =
            c < segment.length ? A(widen(row[c * g.taps()])) : A(0);
    }
  }
}

template <typename A>
void unpack_channel(const A* from, int64_t image_stride, int64_t images, int64_t outs, A* sums) {
  for (int64_t o = 0; o < outs; ++o) sums[o] = from[o];
  for (int64_t image = 1; image < images; ++image)
    for (int64_t o = 0; o < outs; ++o) sums[o] += from[image * image_stride + o];
}

template <typename T, typename A = Accumulation<T>>
void unpack_weight(const DeformConv2dPlan& plan, const A* grad_weight, int64_t images,
                   const Segment& segment, T* weight) {
  constexpr int64_t kBlock = 64;
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t outs = g.group_out_channels(), first = segment.begin % g.group_channels();
  const int64_t image_stride = g.taps() * plan.padded_channels * plan.padded_out_channels;
  A sums[kBlock];
  for (int64_t begin = 0; begin < outs; begin += kBlock) {
    const int64_t count = outs - begin < kBlock ? outs - begin : kBlock;
    for (int64_t c = 0; c < segment.length; ++c) {
      for (int64_t tap = 0; tap < g.taps(); ++tap) {
        const int64_t row = tap * plan.padded_channels + segment.padded_begin + c;
        unpack_channel(grad_weight + row * plan.padded_out_channels + begin, image_stride, images,
                       count, sums);
        for (int64_t o = 0; o < count; ++o) {
          const int64_t out = segment.group * outs + begin + o;
          weight[(out * g.group_channels() + first + c) * g.taps() + tap] = narrow<T>(sums[o]);
        }
      }
    }
  }
}

template <typename A>
struct Weights {
  A top_left, top_right, bottom_left, bottom_right;

  explicit Weights(const Corners<A>& corner)
      : top_left((1 - corner.fraction_y) * (1 - corner.fraction_x)),
        top_right((1 - corner.fraction_y) * corner.fraction_x),
        bottom_left(corner.fraction_y * (1 - corner.fraction_x)),
        bottom_right(corner.fraction_y * corner.fraction_x) {}
};

// columns[p][c] = modulated bilinear sample of channel segment.begin + c. Whole vectors are
// written; what lies past the segment's length is never used.
template <typename A>
void sample(const DeformConv2dGeometry& g, const Segment& segment, int64_t count, const A* rows,
            const Corners<A>* corners, A* columns) {
  for (int64_t p = 0; p < count; ++p) {
    const Corners<A>& corner = corners[p];
    const Weights<A> weight(corner);
    const A w0 = weight.top_left * corner.mask, w1 = weight.top_right * corner.mask;
    const A w2 = weight.bottom_left * corner.mask, w3 = weight.bottom_right * corner.mask;
    const A* v0 = rows + corner.index[0] * g.channels + segment.begin;
    const A* v1 = rows + corner.index[1] * g.channels + segment.begin;
    const A* v2 = rows + corner.index[2] * g.channels + segment.begin;
    const A* v3 = rows + corner.index[3] * g.channels + segment.begin;
    A* column = columns + p * kColumnStride;
    for (int64_t c = 0; c < segment.length; c += kLanes<A>)
      store(column + c,
            w0 * load(v0 + c) + w1 * load(v1 + c) + (w2 * load(v2 + c) + w3 * load(v3 + c)));
  }
}

template <typename T, typename A = Accumulation<T>>
void forward_tile(const DeformConv2dPlan& plan, Tile tile, const A* rows, const Corners<A>* corners,
                  const A* packed_weight, const T* bias, A* columns, A* sums, T* output) {
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t outs = plan.padded_out_channels, tile_rows = round_up(tile.count, kGemmRows);
  const Segment* segment = plan.segments;
  for (int64_t group = 0; group < g.groups; ++group) {
    const Segment* first = segment;
    for (int64_t i = 0; i < tile_rows * outs; ++i) sums[i] = 0;
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      for (segment = first; segment < plan.segments + plan.segment_count; ++segment) {
        if (segment->group != group) break;
        const int64_t table = segment->deform_group * g.taps() + tap;
        sample(g, *segment, tile.count, rows, corners + table * kTilePixels, columns);
        gemm(columns, kColumnStride, 1, tile_rows,
             packed_weight + (tap * g.channels + segment->begin) * outs, segment->length,
             outs / kGemmColumns<A>, sums, outs);
      }
    }
    const int64_t channel = group * g.group_out_channels();
    rows_to_planes<T>(sums, outs, g.group_out_channels(), tile.count,
                      bias == nullptr ? nullptr : bias + channel,
                      output + channel * g.out_pixels() + tile.begin, g.out_pixels());
  }
}

template <typename T, typename A = Accumulation<T>>
void pack_gradient(const DeformConv2dPlan& plan, Tile tile, const T* grad_output, int64_t group,
                   int64_t panel, A* rows, A* packed) {
  constexpr int64_t kColumns = kGemmColumns<A>;
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t first = panel * kColumns, outs = g.group_out_channels();
  const int64_t count = outs - first < kColumns ? outs - first : kColumns;
  const int64_t channel = group * outs + first;
  A* block = packed + panel * tile.count * kColumns;
  if (count < kColumns)
    for (int64_t i = 0; i < tile.count * kColumns; ++i) block[i] = 0;
  planes_to_rows(grad_output + channel * g.out_pixels() + tile.begin, g.out_pixels(), count,
                 tile.count, block, kColumns);
  for (int64_t p = 0; p < tile.count; ++p)
    for (int64_t o = 0; o < count; ++o)
      rows[p * plan.padded_out_channels + first + o] = block[p * kColumns + o];
}

// Sums over channels of gradient times each corner's value.
template <typename A>
struct Dots {
  Vec<A> sums[4] = {};
  A tails[4] = {};
};

// One sampling position: resamples into `column`, scatters into the corners of
// grad_rows, and writes the gradients of mask, y and x.
template <typename A>
inline void backward_position(const Corners<A>& corner, int64_t channels, const Segment& segment,
                              const A* rows, const A* grad_column, A* column, A* grad_rows,
                              A* partial) {
  const Weights<A> weight(corner);
  const A w[4] = {weight.top_left * corner.mask, weight.top_right * corner.mask,
                  weight.bottom_left * corner.mask, weight.bottom_right * corner.mask};
  const A* v[4];
  A* grad[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    v[k] = rows + corner.index[k] * channels + segment.begin;
    grad[k] = grad_rows + corner.index[k] * channels + segment.begin;
  }
  Dots<A> dots;
  int64_t c = 0;
  for (; c + kLanes<A> <= segment.length; c += kLanes<A>) {
    const Vec<A> gradient = load(grad_column + c);
    Vec<A> blend{};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Vec<A> value = load(v[k] + c);
      blend += w[k] * value;
      dots.sums[k] += gradient * value;
      store(grad[k] + c, load(grad[k] + c) + w[k] * gradient);
    }
    store(column + c, blend);
  }
  for (; c < segment.length; ++c) {
    A blend = 0;
    for (int k = 0; k < 4; ++k) {
      blend += w[k] * v[k][c];
      dots.tails[k] += grad_column[c] * v[k][c];
      grad[k][c] += w[k] * grad_column[c];
    }
    column[c] = blend;
  }
  const A fy = corner.fraction_y, fx = corner.fraction_x;
  const auto combine = [&](const auto& d, auto& mask, auto& y, auto& x) {
    mask = weight.top_left * d[0] + weight.top_right * d[1] + weight.bottom_left * d[2] +
           weight.bottom_right * d[3];
    y = (1 - fx) * (d[2] - d[0]) + fx * (d[3] - d[1]);
    x = (1 - fy) * (d[1] - d[0]) + fy * (d[3] - d[2]);
  };
  Vec<A> vector[3];
  A tail[3];
  combine(dots.sums, vector[0], vector[1], vector[2]);
  combine(dots.tails, tail[0], tail[1], tail[2]);
  for (int i = 0; i < 3; ++i) partial[i] = sum<A>(vector[i]) + tail[i];
}

template <typename A>
void backward_tile(const DeformConv2dPlan& plan, Tile tile, const Segment& segment, const A* rows,
                   const Corners<A>* corners, const A* packed_weight, const A* gradient_rows,
                   const A* gradient_packed, A* columns, A* grad_columns, A* grad_rows,
                   A* grad_weight, A* partial) {
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t outs = g.group_out_channels();
  const int64_t padded = round_up(segment.length, kGemmColumns<A>);
  const int64_t tile_rows = round_up(tile.count, kGemmRows);
  for (int64_t tap = 0; tap < g.taps(); ++tap) {
    const int64_t block = tap * plan.padded_channels + segment.padded_begin;
    for (int64_t p = 0; p < tile_rows; ++p)
      for (int64_t c = 0; c < padded; ++c) grad_columns[p * kColumnStride + c] = 0;
    gemm(gradient_rows, plan.padded_out_channels, 1, tile_rows, packed_weight + block * outs, outs,
         padded / kGemmColumns<A>, grad_columns, kColumnStride);
    const int64_t table = segment.deform_group * g.taps() + tap;
    for (int64_t p = 0; p < tile.count; ++p)
      backward_position(corners[table * kTilePixels + p], g.channels, segment, rows,
                        grad_columns + p * kColumnStride, columns + p * kColumnStride, grad_rows,
                        partial + (tap * kTilePixels + p) * 3);
    gemm(columns, 1, kColumnStride, round_up(segment.length, kGemmRows), gradient_packed,
         tile.count, plan.padded_out_channels / kGemmColumns<A>,
         grad_weight + block * plan.padded_out_channels, plan.padded_out_channels);
  }
}

template <typename A, typename C>
void reduce_offset(const DeformConv2dPlan& plan, Tile tile, const A* partial, int64_t d,
                   int64_t tap, const Corners<A>* corners, C* grad_offset, C* grad_mask) {
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t table = d * g.taps() + tap, plane = g.out_pixels();
  const int64_t segment_stride = g.taps() * kTilePixels * 3;
  for (int64_t p = 0; p < tile.count; ++p) {
    A sums[3] = {};
    for (int64_t s = 0; s < plan.segment_count; ++s) {
      if (plan.segments[s].deform_group != d) continue;
      const A* from = partial + s * segment_stride + (tap * kTilePixels + p) * 3;
      for (int i = 0; i < 3; ++i) sums[i] += from[i];
    }
    const A mask = corners[table * kTilePixels + p].mask;
    grad_offset[table * 2 * plane + tile.begin + p] = narrow<C>(mask * sums[1]);
    grad_offset[(table * 2 + 1) * plane + tile.begin + p] = narrow<C>(mask * sums[2]);
    if (grad_mask != nullptr) grad_mask[table * plane + tile.begin + p] = narrow<C>(sums[0]);
  }
}

template <typename T, typename C>
DeformConv2dKernelsOf<T, C> kernels_of() {
  using A = Accumulation<T>;
  return {image_to_rows<T>,          rows_to_image<T>, corners<A, C>,    pack_weight<T>,
          pack_weight_transposed<T>, forward_tile<T>,  pack_gradient<T>, backward_tile<A>,
          reduce_offset<A, C>,       unpack_weight<T>};
}

}  // namespace

const DeformConv2dKernels& deform_conv2d_kernels() {
  static const DeformConv2dKernels kernels{kernels_of<double, double>(),
                                           kernels_of<float, float>(),
                                           kernels_of<Half, Half>(),
                                           kernels_of<Half, float>(),
                                           kernels_of<BFloat16, BFloat16>(),
                                           kernels_of<BFloat16, float>(),
                                           kGemmColumns<float>,
                                           kGemmColumns<double>};
  return kernels;
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
