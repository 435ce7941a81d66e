// Deformable convolution on CUDA: columns of samples for a tile of output pixels, times the weight.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda_launch.h"
#include "common/cuda_tensor.h"
#include "common/deform_conv2d_checks.h"
#include "cuda/deform_conv2d_backward.cuh"
#include "cuda/deform_conv2d_columns.cuh"
#include "cuda/segment_sum.cuh"

namespace mmdeform {
namespace {

constexpr int kThreads = kDeformConv2dThreads;

// Bound on the workspace of one tile. The emulator's build sets less, so that small images are cut
// into several tiles.
#ifndef MMDEFORM_CUDA_TILE_BYTES
#define MMDEFORM_CUDA_TILE_BYTES (int64_t{32} << 20)
#endif
constexpr int64_t kTileBytes = MMDEFORM_CUDA_TILE_BYTES;

// Kernels count in 32 bits within an image and within the columns of an output pixel.
DeformConv2dShape kernel_shape(const DeformConv2dGeometry& g) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(g.channels * g.taps() < kLimit && g.out_channels < kLimit,
                  "weight: expected fewer than 2**31 values per output pixel and output channels, "
                  "got ",
                  g.channels * g.taps(), " and ", g.out_channels);
  STD_TORCH_CHECK(
      g.height + 2 * g.pad_h < kLimit && g.width + 2 * g.pad_w < kLimit && g.stride_h < kLimit &&
          g.stride_w < kLimit && g.dilation_h < kLimit && g.dilation_w < kLimit,
      "stride, padding, dilation: expected a padded input and steps below 2**31 pixels, got input ",
      g.height, " x ", g.width, ", padding ", g.pad_h, " x ", g.pad_w);
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {g.batch,
          narrow(g.channels),
          narrow(g.height),
          narrow(g.width),
          narrow(g.out_channels),
          narrow(g.kernel_h),
          narrow(g.kernel_w),
          narrow(g.out_height),
          narrow(g.out_width),
          narrow(g.stride_h),
          narrow(g.stride_w),
          narrow(g.pad_h),
          narrow(g.pad_w),
          narrow(g.dilation_h),
          narrow(g.dilation_w),
          narrow(g.groups),
          narrow(g.deform_groups)};
}

// Tensors in the layout of the kernels.
struct Arguments {
  DeformConv2dShape shape;
  Tensor input;   // (N, C, H, W), channels last
  Tensor weight;  // (G, O/G, T * C/G)
  Tensor offset;
  std::optional<Tensor> mask;

  Arguments(const DeformConv2dShape& shape, const Tensor& input, const Tensor& weight,
            const Tensor& offset, const std::optional<Tensor>& mask)
      : shape(shape),
        input(aligned_channels_last(input)),
        weight(torch::stable::view(permute(aligned_channels_last(weight), {0, 2, 3, 1}),
                                   {shape.G, shape.O / shape.G, columns_per_group()})),
        offset(aligned_contiguous(offset)) {
    if (mask.has_value()) this->mask = aligned_contiguous(*mask);
  }

  int64_t columns_per_group() const {
    return static_cast<int64_t>(shape.taps()) * shape.channels_per_group();
  }

  template <typename C>
  DeformConv2dOffsets<C> offsets() const {
    return {data_of<C>(offset), mask.has_value() ? data_of<C>(*mask) : nullptr};
  }

  Tensor empty(const std::vector<int64_t>& size) const {
    return torch::stable::new_empty(input, size);
  }
};

// The output pixels, cut into tiles of about equal size.
std::vector<DeformConv2dTile> cut_tiles(const DeformConv2dShape& shape, size_t element_size,
                                        int64_t max_points) {
  const int64_t values = static_cast<int64_t>(shape.C) * shape.taps() + shape.O;
  const int64_t bytes = std::max<int64_t>(values * static_cast<int64_t>(element_size), 1);
  const int64_t points = std::max<int64_t>(static_cast<int64_t>(shape.D) * shape.taps(), 1);
  const int64_t limit = std::max<int64_t>(std::min(kTileBytes / bytes, max_points / points), 8);
  const int64_t total = shape.output_pixels();
  std::vector<DeformConv2dTile> tiles;
  if (total == 0) return tiles;
  // Multiples of eight pixels keep the rows of every matrix aligned for tensor cores.
  const int64_t step = ceil_div(ceil_div(total, ceil_div(total, limit)), 8) * 8;
  for (int64_t first = 0; first < total; first += step) {
    tiles.push_back({first, static_cast<int>(std::min(step, total - first))});
  }
  return tiles;
}

// Calls function(Type<T>, Type<C>, Constant<vector length>).
template <typename Function>
void dispatch(const Arguments& arguments, const Function& function) {
  dispatch_dtypes<torch::headeronly::Half, torch::headeronly::BFloat16>(
      "deform_conv2d", arguments.input.scalar_type(), arguments.offset.scalar_type(),
      [&](auto type, auto coordinate) {
        using T = typename decltype(type)::type;
        constexpr int kVector = kVectorBytes / sizeof(T);
        const int length = vector_length(
            arguments.input,
            {arguments.shape.channels_per_group(), arguments.shape.channels_per_deform_group()});
        if (length == kVector) return function(type, coordinate, Constant<kVector>());
        function(type, coordinate, Constant<1>());
      });
}

int64_t point_blocks(const DeformConv2dShape& shape, const DeformConv2dTile& tile) {
  return ceil_div(tile.points(shape), kDeformConv2dPoints);
}

int64_t tile_blocks(const DeformConv2dShape& shape, const DeformConv2dTile& tile) {
  return shape.O * ceil_div(tile.count, kThreads);
}

Tensor deform_conv2d_cuda(const Tensor& input, const Tensor& offset,
                          const std::optional<Tensor>& mask, const Tensor& weight,
                          const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                          int64_t groups, int64_t deform_groups) {
  const DeformConv2dShape shape = kernel_shape(check_deform_conv2d(
      input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups));
  const CudaLauncher launch(input);
  const Arguments arguments(shape, input, weight, offset, mask);
  const std::optional<Tensor> biases =
      bias.has_value() ? std::optional(aligned_contiguous(*bias)) : std::nullopt;
  const Tensor output = arguments.empty({shape.N, shape.O, shape.Ho, shape.Wo});
  const auto tiles = cut_tiles(shape, input.element_size(), std::numeric_limits<int64_t>::max());
  if (tiles.empty() || shape.O == 0) return output;
  const int64_t G = shape.G, K = arguments.columns_per_group(), count = tiles.front().count;
  Tensor columns = arguments.empty({G * count * K});
  Tensor tile_output = arguments.empty({shape.O * count});
  dispatch(arguments, [&](auto type, auto coordinate, auto vector) {
    using T = typename decltype(type)::type;
    using C = typename decltype(coordinate)::type;
    constexpr int kVector = decltype(vector)::value;
    const int lanes = lanes_for(shape.channels_per_deform_group(), kVector);
    for (const DeformConv2dTile& tile : tiles) {
      launch("deform_conv2d_columns_kernel", deform_conv2d_columns_kernel<T, C, kVector>,
             point_blocks(shape, tile), kThreads, 0, data_of<T>(arguments.input),
             arguments.offsets<C>(), shape, tile, lanes, mutable_data_of<T>(columns));
      bmm_out(arguments.weight,
              torch::stable::transpose(view_front(columns, {G, tile.count, K}), 1, 2),
              view_front(tile_output, {G, shape.O / G, tile.count}));
      launch("deform_conv2d_store_tile_kernel", deform_conv2d_store_tile_kernel<T>,
             tile_blocks(shape, tile), kThreads, 0, data_of<T>(tile_output),
             biases.has_value() ? data_of<T>(*biases) : nullptr, shape, tile,
             mutable_data_of<T>(output));
    }
  });
  return output;
}

// The gradient of the input from one tile, added in a fixed order.
template <typename T, typename C, int kVector>
void add_grad_input_sorted(const CudaLauncher& launch, const Arguments& arguments,
                           const DeformConv2dTile& tile, const Tensor& grad_columns,
                           const Tensor& grad_input) {
  using A = accumulation_t<T>;
  const DeformConv2dShape& shape = arguments.shape;
  const int64_t points = tile.points(shape);
  const Tensor keys = torch::stable::new_empty(grad_input, {4 * points}, ScalarType::Long);
  const Tensor weights = torch::stable::new_empty(grad_input, {4 * points});
  launch("deform_conv2d_entries_kernel", deform_conv2d_entries_kernel<A, C>,
         ceil_div(points, kThreads), kThreads, 0, arguments.offsets<C>(), shape, tile,
         mutable_data_of<int64_t>(keys), mutable_data_of<A>(weights));
  const DeformConv2dEntrySource<T> source{data_of<T>(grad_columns), shape, tile};
  segment_sum<A, kVector>(launch, keys, weights, shape.channels_per_deform_group(), source,
                          mutable_data_of<A>(grad_input));
}

// Sums in the accumulation dtype; converted by results().
struct Gradients {
  Tensor input;   // (N, H, W, C)
  Tensor weight;  // (O, Kh, Kw, C/G)
  Tensor offset, mask;

  Gradients(const Arguments& arguments, bool with_mask) {
    const DeformConv2dShape& s = arguments.shape;
    const ScalarType sums = accumulation_type(arguments.input.scalar_type());
    input = torch::stable::new_zeros(arguments.input, {s.N, s.H, s.W, s.C}, sums);
    weight =
        torch::stable::new_zeros(arguments.input, {s.O, s.Kh, s.Kw, s.channels_per_group()}, sums);
    offset = torch::stable::new_empty(arguments.offset, arguments.offset.sizes());
    mask = with_mask ? torch::stable::new_empty(arguments.offset, arguments.mask->sizes())
                     : torch::stable::new_empty(arguments.offset, {0});
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> results(ScalarType dtype) const {
    return {channels_first(input, dtype), offset, mask, channels_first(weight, dtype)};
  }

 private:
  static Tensor channels_first(const Tensor& tensor, ScalarType dtype) {
    const Tensor permuted = permute(tensor, {0, 3, 1, 2});
    Tensor result = torch::stable::new_empty(tensor, permuted.sizes(), dtype);
    return torch::stable::copy_(result, permuted);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& mask, const Tensor& weight, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    int64_t deform_groups, bool deterministic) {
  const DeformConv2dGeometry geometry = check_deform_conv2d(
      input, offset, mask, weight, std::nullopt, stride, padding, dilation, groups, deform_groups);
  check_deform_conv2d_gradient(grad_output, input, geometry);
  const DeformConv2dShape shape = kernel_shape(geometry);
  const CudaLauncher launch(input);
  const Arguments arguments(shape, input, weight, offset, mask);
  const Tensor grad_outputs = aligned_contiguous(grad_output);
  const Gradients gradients(arguments, mask.has_value());
  const auto tiles =
      cut_tiles(shape, input.element_size(),
                deterministic ? kMaxSortedEntries / 4 : std::numeric_limits<int64_t>::max());
  if (tiles.empty()) return gradients.results(input.scalar_type());
  const int64_t G = shape.G, K = arguments.columns_per_group(), count = tiles.front().count;
  Tensor columns = arguments.empty({G * count * K});
  Tensor tile_grad = arguments.empty({shape.O * count});
  const Tensor tile_grad_weight = arguments.empty({G, shape.O / G, K});
  dispatch(arguments, [&](auto type, auto coordinate, auto vector) {
    using T = typename decltype(type)::type;
    using C = typename decltype(coordinate)::type;
    using A = accumulation_t<T>;
    constexpr int kVector = decltype(vector)::value;
    const DeformConv2dGradients<A, C> pointers{
        deterministic ? nullptr : mutable_data_of<A>(gradients.input),
        mutable_data_of<C>(gradients.offset),
        mask.has_value() ? mutable_data_of<C>(gradients.mask) : nullptr};
    const int lanes = lanes_for(shape.channels_per_deform_group(), kVector);
    for (const DeformConv2dTile& tile : tiles) {
      launch("deform_conv2d_load_tile_kernel", deform_conv2d_load_tile_kernel<T>,
             tile_blocks(shape, tile), kThreads, 0, data_of<T>(grad_outputs), shape, tile,
             mutable_data_of<T>(tile_grad));
      const Tensor tile_grads = view_front(tile_grad, {G, shape.O / G, tile.count});
      const Tensor tile_columns = view_front(columns, {G, tile.count, K});
      bmm_out(torch::stable::transpose(tile_grads, 1, 2), arguments.weight, tile_columns);
      if (deterministic) {
        add_grad_input_sorted<T, C, kVector>(launch, arguments, tile, columns, gradients.input);
      }
      launch("deform_conv2d_backward_kernel", deform_conv2d_backward_kernel<T, C, kVector>,
             point_blocks(shape, tile), kThreads, 0, data_of<T>(arguments.input),
             arguments.offsets<C>(), shape, tile, lanes, mutable_data_of<T>(columns), pointers);
      bmm_out(tile_grads, tile_columns, tile_grad_weight);
      launch("accumulate_kernel", accumulate_kernel<T, A>,
             ceil_div(tile_grad_weight.numel(), kThreads), kThreads, 0,
             data_of<T>(tile_grad_weight), tile_grad_weight.numel(),
             mutable_data_of<A>(gradients.weight));
    }
  });
  return gradients.results(input.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, MMDEFORM_CUDA_DISPATCH_KEY, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d_cuda));
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward_cuda));
}

}  // namespace mmdeform
