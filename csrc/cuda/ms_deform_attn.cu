// Multi-scale deformable attention on CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensor.h"
#include "common/ms_deform_attn_checks.h"
#include "cuda/ms_deform_attn_points.cuh"
#include "cuda/points_launch.cuh"

namespace mmdeform {
namespace {

// The source's tensors, kept alive for as long as kernels are launched with their pointers.
struct Points {
  PointsShape shape;
  int L, P;
  Tensor spatial_shapes, level_start_index, sampling_locations, attention_weights;

  Points(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
         const Tensor& sampling_locations, const Tensor& attention_weights)
      : spatial_shapes(aligned_contiguous(spatial_shapes)),
        level_start_index(aligned_contiguous(level_start_index)),
        sampling_locations(aligned_contiguous(sampling_locations)),
        attention_weights(aligned_contiguous(attention_weights)) {
    const int64_t S = value.size(1), M = value.size(2), Dh = value.size(3);
    const int64_t levels = sampling_locations.size(3), points = sampling_locations.size(4);
    STD_TORCH_CHECK(S < 1 << 28, "value: expected fewer than 2**28 tokens per image, got ", S);
    STD_TORCH_CHECK(levels <= 1024 && levels * points <= 1 << 20,
                    "sampling_locations: expected at most 1024 levels and 2**20 points, got L = ",
                    levels, " and P = ", points);
    STD_TORCH_CHECK(M * Dh < int64_t{1} << 31, "value: expected fewer than 2**31 channels, got ",
                    shape_string(value.sizes()));
    L = static_cast<int>(levels);
    P = static_cast<int>(points);
    shape = {value.size(0),        S,    sampling_locations.size(1), static_cast<int>(M),
             static_cast<int>(Dh), L * P};
  }

  template <typename C>
  MsDeformAttnPoints<C> source() const {
    return {shape,
            L,
            P,
            data_of<int64_t>(spatial_shapes),
            data_of<int64_t>(level_start_index),
            data_of<C>(sampling_locations),
            data_of<C>(attention_weights)};
  }
};

// Calls function(Type<T>, Type<C>).
template <typename Function>
void dispatch(const Tensor& value, const Points& points, const Function& function) {
  dispatch_dtypes<torch::headeronly::Half, torch::headeronly::BFloat16>(
      "ms_deform_attn", value.scalar_type(), points.sampling_locations.scalar_type(), function);
}

Tensor ms_deform_attn_cuda(const Tensor& value, const Tensor& spatial_shapes,
                           const Tensor& level_start_index, const Tensor& sampling_locations,
                           const Tensor& attention_weights) {
  check_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations,
                       attention_weights);
  const CudaLauncher launch(value);
  const Tensor values = aligned_contiguous(value);
  const Points points(value, spatial_shapes, level_start_index, sampling_locations,
                      attention_weights);
  const Tensor output = torch::stable::new_empty(
      value, {value.size(0), sampling_locations.size(1), value.size(2) * value.size(3)});
  dispatch(value, points, [&](auto type, auto coordinate) {
    points_forward<typename decltype(type)::type>(
        launch, values, points.source<typename decltype(coordinate)::type>(), output);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward_cuda(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& level_start_index, const Tensor& sampling_locations,
    const Tensor& attention_weights, bool deterministic) {
  check_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations,
                       attention_weights);
  check_ms_deform_attn_grad(grad_output, value, sampling_locations);
  const CudaLauncher launch(value);
  const Tensor grad_outputs = aligned_contiguous(grad_output), values = aligned_contiguous(value);
  const Points points(value, spatial_shapes, level_start_index, sampling_locations,
                      attention_weights);
  const Tensor grad_value = new_zeros(value, value.sizes(), accumulation_type(value.scalar_type()));
  const Tensor grad_locations =
      torch::stable::new_empty(sampling_locations, sampling_locations.sizes());
  const Tensor grad_weights =
      torch::stable::new_empty(attention_weights, attention_weights.sizes());
  dispatch(value, points, [&](auto type, auto coordinate) {
    using C = typename decltype(coordinate)::type;
    points_backward<typename decltype(type)::type>(
        launch, grad_outputs, values, points.source<C>(), deterministic, grad_value,
        {mutable_data_of<C>(grad_locations), mutable_data_of<C>(grad_weights)});
  });
  return {torch::stable::to(grad_value, value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, MMDEFORM_CUDA_DISPATCH_KEY, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward_cuda));
}

}  // namespace mmdeform
