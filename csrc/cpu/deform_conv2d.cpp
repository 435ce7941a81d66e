// CPU driver of deform_conv2d: memory, threads, registration.
#include "cpu/deform_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/deform_conv2d_checks.h"
#include "common/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace mmdeform {
namespace {

const DeformConv2dKernels& kernels(){MMDEFORM_SELECT_KERNELS(deform_conv2d_kernels)}

int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

template <typename A>
int64_t panel_columns() {
  return sizeof(A) == 4 ? kernels().panel_columns_float : kernels().panel_columns_double;
}

template <typename A>
void clear(A* data, int64_t count) {
  std::fill(data, data + count, A(0));
}

std::vector<Segment> make_segments(const DeformConv2dGeometry& g, int64_t limit, int64_t columns) {
  std::vector<Segment> segments;
  int64_t padded = 0;
  for (int64_t begin = 0; begin < g.channels;) {
    const int64_t group = begin / g.group_channels(), deform = begin / g.deform_channels();
    const int64_t end = std::min(
        {(group + 1) * g.group_channels(), (deform + 1) * g.deform_channels(), begin + limit});
    segments.push_back({begin, end - begin, group, deform, padded});
    padded += round_up(end - begin, columns);
    begin = end;
  }
  return segments;
}

// The tensors of a call as pointers, and the plan of its loops.
template <typename T, typename C>
struct Call {
  using A = Accumulation<T>;

  const DeformConv2dKernelsOf<T, C>& kernel = kernels();
  DeformConv2dGeometry g;
  Tensor input, offset;
  std::optional<Tensor> mask;
  bool channels_last;
  std::vector<Segment> segments;
  DeformConv2dPlan plan;
  int64_t tiles;

  Call(const DeformConv2dGeometry& geometry, const Tensor& input_, const Tensor& offset_,
       const std::optional<Tensor>& mask_, int64_t segment_limit)
      : g(geometry), input(input_), offset(torch::stable::contiguous(offset_)) {
    channels_last = is_channels_last(input);
    if (!channels_last) input = torch::stable::contiguous(input);
    if (mask_.has_value()) mask = torch::stable::contiguous(*mask_);
    const int64_t columns = panel_columns<A>();
    segments = make_segments(g, segment_limit, columns);
    const Segment& last = segments.back();
    plan = {g, segments.data(), static_cast<int64_t>(segments.size()),
            last.padded_begin + round_up(last.length, columns),
            round_up(g.group_out_channels(), columns)};
    tiles = divide_up(g.out_pixels(), kTilePixels);
  }

  Tile tile(int64_t index) const {
    const int64_t begin = index * kTilePixels;
    return {begin, std::min(kTilePixels, g.out_pixels() - begin)};
  }

  const C* offset_of(int64_t image) const {
    return data_of<C>(offset) + image * g.deform_groups * g.taps() * 2 * g.out_pixels();
  }
  const C* mask_of(int64_t image) const {
    if (!mask.has_value()) return nullptr;
    return data_of<C>(*mask) + image * g.deform_groups * g.taps() * g.out_pixels();
  }

  // Elements of an image as rows: its pixels, the pixel of zeros, and slack.
  int64_t rows_size() const { return (g.pixels() + 1) * g.channels + kReadSlack; }

  // Images [first, first + count) to rows.
  void load_images(int64_t first, int64_t count, A* rows) const {
    const int64_t chunks = divide_up(g.pixels(), kTilePixels);
    parallel_items(count * chunks, [&](int64_t, int64_t item) {
      const int64_t image = item / chunks, begin = item % chunks * kTilePixels;
      A* to = rows + image * rows_size();
      kernel.image_to_rows(plan, data_of<T>(input) + (first + image) * g.channels * g.pixels(),
                           channels_last, begin, std::min(kTilePixels, g.pixels() - begin), to);
      if (begin == 0) clear(to + g.pixels() * g.channels, g.channels + kReadSlack);
    });
  }
};

template <typename T, typename C>
void forward(const DeformConv2dGeometry& g, const Tensor& input, const Tensor& offset,
             const std::optional<Tensor>& mask, const Tensor& weight,
             const std::optional<Tensor>& bias, const Tensor& output) {
  using A = Accumulation<T>;
  const Call<T, C> call(g, input, offset, mask, kMaxSegment);
  const DeformConv2dPlan& plan = call.plan;
  const ScalarType type = scalar_type_of<A>();
  // Several images at once where one has too few tiles for all threads.
  const int64_t in_flight =
      std::min(g.batch, divide_up(2 * torch::stable::get_num_threads(), call.tiles));
  const int64_t workers = worker_count(in_flight * call.tiles);
  const int64_t tables = g.deform_groups * g.taps();

  const Tensor packed = scratch(input, type, g.taps() * g.channels * plan.padded_out_channels);
  const Tensor rows = scratch(input, type, in_flight * call.rows_size());
  const Tensor columns = scratch(input, type, workers * kTilePixels * kColumnStride);
  const Tensor sums = scratch(input, type, workers * kTilePixels * plan.padded_out_channels);
  const Tensor corners =
      scratch(input, ScalarType::Byte, workers * tables * kTilePixels * sizeof(Corners<A>));

  parallel_items(plan.segment_count, [&](int64_t, int64_t s) {
    call.kernel.pack_weight(plan, data_of<T>(weight), plan.segments[s], mutable_data_of<A>(packed));
  });
  for (int64_t first = 0; first < g.batch; first += in_flight) {
    const int64_t images = std::min(in_flight, g.batch - first);
    call.load_images(first, images, mutable_data_of<A>(rows));
    parallel_items(images * call.tiles, [&](int64_t worker, int64_t item) {
      const int64_t slot = item / call.tiles, image = first + slot;
      const Tile tile = call.tile(item % call.tiles);
      auto* table = mutable_data_of<Corners<A>>(corners) + worker * tables * kTilePixels;
      for (int64_t i = 0; i < tables; ++i)
        call.kernel.corners(plan, tile, call.offset_of(image), call.mask_of(image), i / g.taps(),
                            i % g.taps(), table + i * kTilePixels);
      call.kernel.forward_tile(
          plan, tile, data_of<A>(rows) + slot * call.rows_size(), table, data_of<A>(packed),
          bias.has_value() ? data_of<T>(*bias) : nullptr,
          mutable_data_of<A>(columns) + worker * kTilePixels * kColumnStride,
          mutable_data_of<A>(sums) + worker * kTilePixels * plan.padded_out_channels,
          mutable_data_of<T>(output) + image * g.out_channels * g.out_pixels());
    });
  }
}

Tensor deform_conv2d_cpu(const Tensor& input, const Tensor& offset,
                         const std::optional<Tensor>& mask, const Tensor& weight,
                         const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         int64_t groups, int64_t deform_groups) {
  const DeformConv2dGeometry g = check_deform_conv2d(input, offset, mask, weight, bias, stride,
                                                     padding, dilation, groups, deform_groups);
  const Tensor output =
      torch::stable::new_empty(input, {g.batch, g.out_channels, g.out_height, g.out_width});
  if (output.numel() == 0) return output;
  std::optional<Tensor> flat_bias;
  if (bias.has_value()) flat_bias = torch::stable::contiguous(*bias);
  dispatch_dtypes<Half, BFloat16>(
      "input", input.scalar_type(), offset.scalar_type(), [&](auto data, auto coords) {
        forward<typename decltype(data)::type, typename decltype(coords)::type>(
            g, input, offset, mask, torch::stable::contiguous(weight), flat_bias, output);
      });
  return output;
}

struct Gradients {
  Tensor input, offset, mask, weight;
};

// Channels per segment of the backward pass: as many as leave every thread a segment.
int64_t backward_segment_limit(const DeformConv2dGeometry& g, int64_t columns) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = divide_up(g.channels, divide_up(threads, g.batch));
  return std::min(kMaxSegment, round_up(share, columns));
}

// Bytes per image that the backward pass may take between two synchronisations. Waiting is dear
// where other processes compete for the cores, so this is not a single tile.
constexpr int64_t kBlockBytes = int64_t{4} << 20;

// Buffers of the backward pass. Everything but the rows and the weight gradients is of the size
// of a block of tiles; sizes below are those of one tile.
template <typename A>
struct BackwardBuffers {
  Tensor rows, grad_rows, grad_weight, packed, gradient_rows, gradient_packed, corners, partial,
      columns, grad_columns;
  int64_t gradient_size, table_size, partial_size, weight_size;
  int64_t block_tiles;  // tiles of an image between two synchronisations

  BackwardBuffers(const Tensor& like, const DeformConv2dPlan& plan, int64_t images,
                  int64_t rows_size, int64_t tiles) {
    const DeformConv2dGeometry& g = plan.geometry;
    const auto floats = [&](int64_t n) { return scratch(like, scalar_type_of<A>(), n); };
    gradient_size = g.groups * kTilePixels * plan.padded_out_channels;
    table_size = g.deform_groups * g.taps() * kTilePixels;
    partial_size = plan.segment_count * g.taps() * kTilePixels * 3;
    weight_size = g.taps() * plan.padded_channels * plan.padded_out_channels;
    const int64_t tile_bytes =
        (2 * gradient_size + partial_size) * sizeof(A) + table_size * sizeof(Corners<A>);
    block_tiles = std::clamp<int64_t>(kBlockBytes / tile_bytes, 1, tiles);
    const int64_t image_tiles = images * block_tiles;
    const int64_t workers = worker_count(images * plan.segment_count);
    rows = floats(images * rows_size);
    grad_rows = floats(images * rows_size);
    grad_weight = floats(images * weight_size);
    packed = floats(g.taps() * plan.padded_channels * g.group_out_channels());
    gradient_rows = floats(image_tiles * gradient_size);
    gradient_packed = floats(image_tiles * gradient_size);
    corners = scratch(like, ScalarType::Byte, image_tiles * table_size * sizeof(Corners<A>));
    partial = floats(image_tiles * partial_size);
    columns = floats(workers * kTilePixels * kColumnStride);
    grad_columns = floats(workers * kTilePixels * kColumnStride);
  }
};

// Tiles [first_tile, first_tile + tiles) of images [first, first + images), in three steps: what
// all segments share, the segments, the sum of offset gradients over segments. Buffers of a tile
// are found by `place`, which counts tiles over the images.
template <typename T, typename C>
void backward_block(const Call<T, C>& call, const BackwardBuffers<Accumulation<T>>& buffers,
                    const T* grad_output, int64_t first, int64_t images, int64_t first_tile,
                    int64_t tiles, const Gradients& gradients) {
  using A = Accumulation<T>;
  const DeformConv2dPlan& plan = call.plan;
  const DeformConv2dGeometry& g = plan.geometry;
  const int64_t tables = g.deform_groups * g.taps();
  const int64_t panels = plan.padded_out_channels / panel_columns<A>();
  const int64_t group_size = kTilePixels * plan.padded_out_channels;
  const auto table = [&](int64_t place) {
    return mutable_data_of<Corners<A>>(buffers.corners) + place * buffers.table_size;
  };

  const int64_t shared = tables + g.groups * panels;
  parallel_items(images * tiles * shared, [&](int64_t, int64_t item) {
    const int64_t place = item / shared, i = item % shared, image = first + place / tiles;
    const Tile tile = call.tile(first_tile + place % tiles);
    if (i < tables) {
      call.kernel.corners(plan, tile, call.offset_of(image), call.mask_of(image), i / g.taps(),
                          i % g.taps(), table(place) + i * kTilePixels);
      return;
    }
    const int64_t group = (i - tables) / panels;
    const int64_t at = place * buffers.gradient_size + group * group_size;
    call.kernel.pack_gradient(plan, tile, grad_output + image * g.out_channels * g.out_pixels(),
                              group, (i - tables) % panels,
                              mutable_data_of<A>(buffers.gradient_rows) + at,
                              mutable_data_of<A>(buffers.gradient_packed) + at);
  });
  parallel_items(images * plan.segment_count, [&](int64_t worker, int64_t item) {
    const int64_t slot = item / plan.segment_count, s = item % plan.segment_count;
    const Segment& segment = plan.segments[s];
    const int64_t column = worker * kTilePixels * kColumnStride;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t place = slot * tiles + i;
      const int64_t at = place * buffers.gradient_size + segment.group * group_size;
      call.kernel.backward_tile(
          plan, call.tile(first_tile + i), segment,
          data_of<A>(buffers.rows) + slot * call.rows_size(), table(place),
          data_of<A>(buffers.packed), data_of<A>(buffers.gradient_rows) + at,
          data_of<A>(buffers.gradient_packed) + at, mutable_data_of<A>(buffers.columns) + column,
          mutable_data_of<A>(buffers.grad_columns) + column,
          mutable_data_of<A>(buffers.grad_rows) + slot * call.rows_size(),
          mutable_data_of<A>(buffers.grad_weight) + slot * buffers.weight_size,
          mutable_data_of<A>(buffers.partial) + place * buffers.partial_size +
              s * g.taps() * kTilePixels * 3);
    }
  });
  parallel_items(images * tiles * tables, [&](int64_t, int64_t item) {
    const int64_t place = item / tables, i = item % tables, image = first + place / tiles;
    C* grad_mask = call.mask.has_value()
                       ? mutable_data_of<C>(gradients.mask) + image * tables * g.out_pixels()
                       : nullptr;
    call.kernel.reduce_offset(
        plan, call.tile(first_tile + place % tiles),
        data_of<A>(buffers.partial) + place * buffers.partial_size, i / g.taps(), i % g.taps(),
        table(place), mutable_data_of<C>(gradients.offset) + image * tables * 2 * g.out_pixels(),
        grad_mask);
  });
}

template <typename T, typename C>
void backward(const DeformConv2dGeometry& g, const Tensor& grad_output, const Tensor& input,
              const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
              const Gradients& gradients) {
  using A = Accumulation<T>;
  const Call<T, C> call(g, input, offset, mask, backward_segment_limit(g, panel_columns<A>()));
  const DeformConv2dPlan& plan = call.plan;
  const int64_t in_flight =
      std::min(g.batch, divide_up(torch::stable::get_num_threads(), plan.segment_count));
  const BackwardBuffers<A> buffers(input, plan, in_flight, call.rows_size(), call.tiles);

  clear(mutable_data_of<A>(buffers.grad_weight), in_flight * buffers.weight_size);
  parallel_items(plan.segment_count, [&](int64_t, int64_t s) {
    call.kernel.pack_weight_transposed(plan, data_of<T>(weight), plan.segments[s],
                                       mutable_data_of<A>(buffers.packed));
  });
  const int64_t chunks = divide_up(g.pixels(), kTilePixels);
  for (int64_t first = 0; first < g.batch; first += in_flight) {
    const int64_t images = std::min(in_flight, g.batch - first);
    call.load_images(first, images, mutable_data_of<A>(buffers.rows));
    clear(mutable_data_of<A>(buffers.grad_rows), images * call.rows_size());
    for (int64_t tile = 0; tile < call.tiles; tile += buffers.block_tiles)
      backward_block(call, buffers, data_of<T>(grad_output), first, images, tile,
                     std::min(buffers.block_tiles, call.tiles - tile), gradients);
    parallel_items(images * chunks, [&](int64_t, int64_t item) {
      const int64_t slot = item / chunks, begin = item % chunks * kTilePixels;
      call.kernel.rows_to_image(
          plan, data_of<A>(buffers.grad_rows) + slot * call.rows_size(), begin,
          std::min(kTilePixels, g.pixels() - begin),
          mutable_data_of<T>(gradients.input) + (first + slot) * g.channels * g.pixels());
    });
  }
  parallel_items(plan.segment_count, [&](int64_t, int64_t s) {
    call.kernel.unpack_weight(plan, data_of<A>(buffers.grad_weight), in_flight, plan.segments[s],
                              mutable_data_of<T>(gradients.weight));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& mask, const Tensor& weight, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    int64_t deform_groups, bool /*deterministic: always*/) {
  const DeformConv2dGeometry g = check_deform_conv2d(
      input, offset, mask, weight, std::nullopt, stride, padding, dilation, groups, deform_groups);
  check_deform_conv2d_gradient(grad_output, input, g);
  const Gradients gradients{
      torch::stable::new_empty(input, {g.batch, g.channels, g.height, g.width}),
      torch::stable::new_empty(offset, offset.sizes()),
      mask.has_value() ? torch::stable::new_empty(*mask, mask->sizes())
                       : torch::stable::new_empty(offset, {0}),
      torch::stable::new_zeros(weight, weight.sizes())};
  if (grad_output.numel() > 0) {
    dispatch_dtypes<Half, BFloat16>(
        "input", input.scalar_type(), offset.scalar_type(), [&](auto data, auto coords) {
          backward<typename decltype(data)::type, typename decltype(coords)::type>(
              g, torch::stable::contiguous(grad_output), input, offset, mask,
              torch::stable::contiguous(weight), gradients);
        });
  }
  return {gradients.input, gradients.offset, gradients.mask, gradients.weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d_cpu));
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward_cpu));
}

}  // namespace mmdeform
