// Multi-scale deformable attention on CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensor.h"
#include "common/ms_deform_attn_checks.h"
#include "cuda/ms_deform_attn_backward.cuh"
#include "cuda/ms_deform_attn_forward.cuh"
#include "cuda/segment_sum.cuh"

namespace mmdeform {
namespace {

constexpr int kThreads = 256;

MsDeformAttnShape checked_shape(const Tensor& value, const Tensor& spatial_shapes,
                                const Tensor& level_start_index, const Tensor& sampling_locations,
                                const Tensor& attention_weights) {
  check_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations,
                       attention_weights);
  const int64_t N = value.size(0), S = value.size(1), M = value.size(2), Dh = value.size(3);
  const int64_t Lq = sampling_locations.size(1), L = sampling_locations.size(3);
  const int64_t P = sampling_locations.size(4);
  STD_TORCH_CHECK(S < 1 << 28, "value: expected fewer than 2**28 tokens per image, got ", S);
  STD_TORCH_CHECK(L <= 1024 && L * P <= 1 << 20,
                  "sampling_locations: expected at most 1024 levels and 2**20 points, got L = ", L,
                  " and P = ", P);
  STD_TORCH_CHECK(M * Dh < int64_t{1} << 31, "value: expected fewer than 2**31 channels, got ",
                  shape_string(value.sizes()));
  return {N,
          S,
          Lq,
          static_cast<int>(M),
          static_cast<int>(Dh),
          static_cast<int>(L),
          static_cast<int>(P)};
}

// Keeps contiguous copies alive for as long as kernels are launched with their pointers.
struct PointTensors {
  Tensor spatial_shapes, level_start_index, sampling_locations, attention_weights;

  PointTensors(const Tensor& spatial_shapes, const Tensor& level_start_index,
               const Tensor& sampling_locations, const Tensor& attention_weights)
      : spatial_shapes(aligned_contiguous(spatial_shapes)),
        level_start_index(aligned_contiguous(level_start_index)),
        sampling_locations(aligned_contiguous(sampling_locations)),
        attention_weights(aligned_contiguous(attention_weights)) {}

  template <typename C>
  MsDeformAttnPoints<C> pointers() const {
    return {data_of<int64_t>(spatial_shapes), data_of<int64_t>(level_start_index),
            data_of<C>(sampling_locations), data_of<C>(attention_weights)};
  }
};

// Calls function(Constant<vector length>, Constant<lanes per row>). 32 lanes serve rows of any
// length, fewer lanes rows of at most one vector each.
template <typename T, typename Function>
void dispatch_row(const Tensor& value, const Function& function) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  const int64_t Dh = value.size(3);
  if (vector_length(value, {Dh}) != kVector) return function(Constant<1>(), Constant<32>());
  if (Dh <= 4 * kVector) return function(Constant<kVector>(), Constant<4>());
  if (Dh <= 8 * kVector) return function(Constant<kVector>(), Constant<8>());
  if (Dh <= 16 * kVector) return function(Constant<kVector>(), Constant<16>());
  return function(Constant<kVector>(), Constant<32>());
}

size_t levels_bytes(const MsDeformAttnShape& shape) { return shape.L * sizeof(MsDeformAttnLevel); }

Tensor ms_deform_attn_cuda(const Tensor& value, const Tensor& spatial_shapes,
                           const Tensor& level_start_index, const Tensor& sampling_locations,
                           const Tensor& attention_weights) {
  const MsDeformAttnShape shape = checked_shape(value, spatial_shapes, level_start_index,
                                                sampling_locations, attention_weights);
  const CudaLauncher launch(value);
  const Tensor values = aligned_contiguous(value);
  const PointTensors points(spatial_shapes, level_start_index, sampling_locations,
                            attention_weights);
  const Tensor output = new_empty(
      value, {shape.N, shape.Lq, static_cast<int64_t>(shape.M) * shape.Dh}, value.scalar_type());
  dispatch_dtypes<torch::headeronly::Half, torch::headeronly::BFloat16>(
      "ms_deform_attn", value.scalar_type(), sampling_locations.scalar_type(),
      [&](auto type, auto coordinate) {
        using T = typename decltype(type)::type;
        using C = typename decltype(coordinate)::type;
        dispatch_row<T>(values, [&](auto vector, auto lanes) {
          launch(
              "ms_deform_attn_forward_kernel",
              ms_deform_attn_forward_kernel<T, C, decltype(vector)::value, decltype(lanes)::value>,
              ceil_div(shape.rows() * lanes, kThreads), kThreads, levels_bytes(shape),
              data_of<T>(values), points.pointers<C>(), shape, mutable_data_of<T>(output));
        });
      });
  return output;
}

// Adds the gradient of the value in a fixed order, a bounded number of rows at a time.
template <typename T, typename C, int kVector>
void add_grad_value_sorted(const CudaLauncher& launch, const Tensor& grad_output,
                           const MsDeformAttnPoints<C>& points, const MsDeformAttnShape& shape,
                           const Tensor& grad_value) {
  using A = accumulation_t<T>;
  const int64_t entries_per_row = 4 * static_cast<int64_t>(shape.points());
  if (entries_per_row == 0) return;
  const int64_t step = std::max<int64_t>(kMaxSortedEntries / entries_per_row, 1);
  for (int64_t row = 0; row < shape.rows(); row += step) {
    const int64_t rows = std::min(step, shape.rows() - row);
    const Tensor keys = new_empty(grad_value, {rows * entries_per_row}, ScalarType::Long);
    const Tensor weights =
        new_empty(grad_value, {rows * entries_per_row}, grad_value.scalar_type());
    launch("ms_deform_attn_entries_kernel", ms_deform_attn_entries_kernel<A, C>,
           ceil_div(rows * shape.points(), kThreads), kThreads, levels_bytes(shape), points, shape,
           row, rows, mutable_data_of<int64_t>(keys), mutable_data_of<A>(weights));
    const MsDeformAttnEntrySource<T> source{data_of<T>(grad_output) + row * shape.Dh,
                                            static_cast<int>(entries_per_row), shape.Dh};
    segment_sum<A, kVector>(launch, keys, weights, shape.Dh, source,
                            mutable_data_of<A>(grad_value));
  }
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward_cuda(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& level_start_index, const Tensor& sampling_locations,
    const Tensor& attention_weights, bool deterministic) {
  const MsDeformAttnShape shape = checked_shape(value, spatial_shapes, level_start_index,
                                                sampling_locations, attention_weights);
  check_ms_deform_attn_grad(grad_output, value, sampling_locations);
  const CudaLauncher launch(value);
  const Tensor grad_outputs = aligned_contiguous(grad_output), values = aligned_contiguous(value);
  const PointTensors points(spatial_shapes, level_start_index, sampling_locations,
                            attention_weights);
  const Tensor grad_value = new_zeros(value, {shape.N, shape.S, shape.M, shape.Dh},
                                      accumulation_type(value.scalar_type()));
  const Tensor grad_locations = new_empty(value, {shape.N, shape.Lq, shape.M, shape.L, shape.P, 2},
                                          sampling_locations.scalar_type());
  const Tensor grad_weights = new_empty(value, {shape.N, shape.Lq, shape.M, shape.L, shape.P},
                                        sampling_locations.scalar_type());
  dispatch_dtypes<torch::headeronly::Half, torch::headeronly::BFloat16>(
      "ms_deform_attn_backward", value.scalar_type(), sampling_locations.scalar_type(),
      [&](auto type, auto coordinate) {
        using T = typename decltype(type)::type;
        using C = typename decltype(coordinate)::type;
        using A = accumulation_t<T>;
        dispatch_row<T>(values, [&](auto vector, auto lanes) {
          constexpr int kVector = decltype(vector)::value;
          if (deterministic) {
            add_grad_value_sorted<T, C, kVector>(launch, grad_outputs, points.pointers<C>(), shape,
                                                 grad_value);
          }
          const MsDeformAttnGradients<A, C> gradients{
              deterministic ? nullptr : mutable_data_of<A>(grad_value),
              mutable_data_of<C>(grad_locations), mutable_data_of<C>(grad_weights)};
          launch("ms_deform_attn_backward_kernel",
                 ms_deform_attn_backward_kernel<T, C, kVector, decltype(lanes)::value>,
                 ceil_div(shape.rows() * lanes, kThreads), kThreads, levels_bytes(shape),
                 data_of<T>(grad_outputs), data_of<T>(values), points.pointers<C>(), shape,
                 gradients);
        });
      });
  return {torch::stable::to(grad_value, value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, MMDEFORM_CUDA_DISPATCH_KEY, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward_cuda));
}

}  // namespace mmdeform
