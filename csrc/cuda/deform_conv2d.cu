// Deformable convolution on CUDA: columns of samples for a tile of output pixels, times the weight.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/cuda_launch.h"
#include "common/cuda_tensor.h"
#include "cuda/deform_conv2d_backward.cuh"
#include "cuda/deform_conv2d_columns.cuh"
#include "cuda/segment_sum.cuh"

namespace mmdeform {
namespace {

constexpr int kThreads = kDeformConv2dThreads;

// Bound on the workspace of one tile.
constexpr int64_t kTileBytes = int64_t{32} << 20;

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t smallest) {
  STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= smallest && pair[1] >= smallest &&
                      pair[0] < 1 << 24 && pair[1] < 1 << 24,
                  name, ": expected two integers of at least ", smallest, ", got ",
                  shape_string(pair));
}

DeformConv2dShape checked_shape(const Tensor& input, const Tensor& offset,
                                const std::optional<Tensor>& mask, const Tensor& weight,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t G, int64_t D) {
  check_dim("input", input, 4);
  check_dim("weight", weight, 4);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  const int64_t O = weight.size(0), Kh = weight.size(2), Kw = weight.size(3);
  STD_TORCH_CHECK(G > 0 && C % G == 0 && O % G == 0, "groups: expected a divisor of C = ", C,
                  " and O = ", O, ", got ", G);
  STD_TORCH_CHECK(D > 0 && C % D == 0, "deform_groups: expected a divisor of C = ", C, ", got ", D);
  check_shape("weight", weight, {O, C / G, Kh, Kw});
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(H * W < kLimit && C * Kh * Kw < kLimit && O < kLimit && Kh > 0 && Kw > 0,
                  "input: expected fewer than 2**31 pixels and 2**31 values per output pixel, got ",
                  shape_string(input.sizes()));
  const int64_t Ho = output_size(H, Kh, stride[0], padding[0], dilation[0]);
  const int64_t Wo = output_size(W, Kw, stride[1], padding[1], dilation[1]);
  STD_TORCH_CHECK(Ho > 0 && Wo > 0 && Ho * Wo < kLimit,
                  "input: expected an output of 1 to 2**31 pixels, got ", Ho, " x ", Wo);
  check_shape("offset", offset, {N, D * Kh * Kw * 2, Ho, Wo});
  check_coordinate_dtype("offset", offset, input.scalar_type());
  check_dtype("weight", weight, input.scalar_type(), "input");
  check_same_device("offset", offset, input);
  check_same_device("weight", weight, input);
  if (mask.has_value()) {
    check_shape("mask", *mask, {N, D * Kh * Kw, Ho, Wo});
    check_dtype("mask", *mask, offset.scalar_type(), "offset");
    check_same_device("mask", *mask, input);
  }
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {N,
          narrow(C),
          narrow(H),
          narrow(W),
          narrow(O),
          narrow(Kh),
          narrow(Kw),
          narrow(Ho),
          narrow(Wo),
          narrow(stride[0]),
          narrow(stride[1]),
          narrow(padding[0]),
          narrow(padding[1]),
          narrow(dilation[0]),
          narrow(dilation[1]),
          narrow(G),
          narrow(D)};
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
  const int64_t per_pixel = static_cast<int64_t>(shape.C) * shape.taps() + shape.O;
  const int64_t points_per_pixel = static_cast<int64_t>(shape.D) * shape.taps();
  const int64_t limit =
      std::max<int64_t>(std::min(kTileBytes / (per_pixel * static_cast<int64_t>(element_size)),
                                 max_points / points_per_pixel),
                        8);
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
  dispatch_dtypes("deform_conv2d", arguments.input.scalar_type(), arguments.offset.scalar_type(),
                  [&](auto type, auto coordinate) {
                    using T = typename decltype(type)::type;
                    constexpr int kVector = kVectorBytes / sizeof(T);
                    const int length = vector_length(arguments.input,
                                                     {arguments.shape.channels_per_group(),
                                                      arguments.shape.channels_per_deform_group()});
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
  const DeformConv2dShape shape =
      checked_shape(input, offset, mask, weight, stride, padding, dilation, groups, deform_groups);
  if (bias.has_value()) {
    check_shape("bias", *bias, {shape.O});
    check_dtype("bias", *bias, input.scalar_type(), "input");
    check_same_device("bias", *bias, input);
  }
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
  const DeformConv2dShape shape =
      checked_shape(input, offset, mask, weight, stride, padding, dilation, groups, deform_groups);
  check_shape("grad_output", grad_output, {shape.N, shape.O, shape.Ho, shape.Wo});
  check_dtype("grad_output", grad_output, input.scalar_type(), "input");
  check_same_device("grad_output", grad_output, input);
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
