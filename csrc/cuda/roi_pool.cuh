// Host side of RoI pooling, for operators that describe their bins.
//
// `Bins` says where the samples of an item lie:
//   RoiPoolAxis<A> axis(shape, index, bool rows);  // its samples along one axis
//   int64_t image(shape, index);                   // stops the kernel where there is no such image
//   A mask(shape, index);

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cuda_launch.h"
#include "common/cuda_tensor.h"
#include "common/roi_pool_checks.h"
#include "cuda/roi_pool_backward.cuh"
#include "cuda/roi_pool_forward.cuh"
#include "cuda/roi_pool_repeatable.cuh"

namespace mmdeform {

// Each position-sensitive cell is an image of its own. Kernels count in 32 bits within an image,
// within the channels of a pixel and within the bins of a RoI.
inline RoiPoolShape roi_pool_shape(const RoiPoolGeometry& g) {
  constexpr int64_t kLimit = int64_t{1} << 24;
  STD_TORCH_CHECK(g.height < kLimit && g.width < kLimit && g.channels < kLimit,
                  "input: expected channels, height and width below 2**24, got ", g.channels, ", ",
                  g.height, " and ", g.width);
  STD_TORCH_CHECK(g.bins() < kLimit, "output_size: expected fewer than 2**24 bins, got ", g.bins_h,
                  " x ", g.bins_w);
  STD_TORCH_CHECK(g.images <= (int64_t{1} << 30) / g.cells(),
                  "input: expected at most 2**30 images, counting each of ", g.cells(),
                  " position-sensitive cells, got ", g.images);
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {g.rois,           g.images * g.cells(), narrow(g.output_dim), narrow(g.classes),
          narrow(g.height), narrow(g.width),      narrow(g.bins_h),     narrow(g.bins_w)};
}

// (N, C, H, W) with elements in the order (N, cells, H, W, C / cells), in which the channels that a
// bin pools lie side by side.
inline Tensor roi_pool_input(const Tensor& input, const RoiPoolGeometry& g) {
  const Tensor cells = torch::stable::view(
      input, {g.images, g.output_dim, g.group_size, g.group_size, g.height, g.width});
  return aligned_contiguous(permute(cells, {0, 2, 3, 4, 5, 1}));
}

// Zeros in that order, in the accumulation dtype.
inline Tensor roi_pool_grad_input(const Tensor& input, const RoiPoolGeometry& g) {
  return torch::stable::new_zeros(
      input, {g.images, g.group_size, g.group_size, g.height, g.width, g.output_dim},
      accumulation_type(input.scalar_type()));
}

// The gradient in the shape and dtype of the input.
inline Tensor roi_pool_finish_grad_input(const Tensor& grad_input, const Tensor& input) {
  const Tensor permuted = permute(grad_input, {0, 5, 1, 2, 3, 4});
  Tensor result = torch::stable::new_empty(input, permuted.sizes());
  torch::stable::copy_(result, permuted);
  return torch::stable::view(result, input.sizes());
}

// Calls function(Type<T>, Type<C>, Constant<vector length>).
template <typename Function>
void roi_pool_dispatch(const char* name, const Tensor& input, ScalarType coordinates,
                       const RoiPoolShape& shape, const Function& function) {
  dispatch_dtypes<torch::headeronly::Half, torch::headeronly::BFloat16>(
      name, input.scalar_type(), coordinates, [&](auto type, auto coordinate) {
        constexpr int kVector = kVectorBytes / sizeof(typename decltype(type)::type);
        if (vector_length(input, {shape.class_channels()}) == kVector) {
          return function(type, coordinate, Constant<kVector>());
        }
        function(type, coordinate, Constant<1>());
      });
}

// Runs of one vector per lane that cover the channels of a class.
inline int roi_pool_chunks(const RoiPoolShape& shape, int vector) {
  return static_cast<int>(ceil_div(shape.class_channels(), kWarpSize * vector));
}

template <typename T, int kVector, typename Bins>
void roi_pool_forward(const CudaLauncher& launch, const Tensor& input, const Bins& bins,
                      const RoiPoolShape& shape, const Tensor& output) {
  const int64_t count = ceil_div(shape.bins(), kRoiPoolMaxTileBins);
  const int tile_bins = static_cast<int>(ceil_div(shape.bins(), count));
  const RoiPoolTiles tiles{tile_bins, static_cast<int>(ceil_div(shape.bins(), tile_bins)),
                           roi_pool_chunks(shape, kVector)};
  launch("roi_pool_forward_kernel", roi_pool_forward_kernel<T, kVector, Bins>,
         shape.R * shape.K * tiles.tiles * tiles.chunks, kRoiPoolThreads,
         tile_bins * kRoiPoolTileRow<kVector> * sizeof(T), data_of<T>(input), bins, shape, tiles,
         mutable_data_of<T>(output));
}

// `grad_input` is the tensor behind gradients.input, which a deterministic pass does not use.
template <typename T, int kVector, typename Bins, typename G>
void roi_pool_backward(const CudaLauncher& launch, const Tensor& grad_output, const Tensor& input,
                       const Bins& bins, const RoiPoolShape& shape, const Tensor& grad_input,
                       G* grad_offset, G* grad_mask, bool deterministic) {
  using A = accumulation_t<T>;
  const Tensor grad_rows = aligned_channels_last(grad_output);
  const RoiPoolGradients<A, G> gradients{deterministic ? nullptr : mutable_data_of<A>(grad_input),
                                         grad_offset, grad_mask};
  launch("roi_pool_backward_kernel", roi_pool_backward_kernel<T, kVector, Bins, G>,
         ceil_div(shape.items(), kRoiPoolWarps), kRoiPoolThreads, 0, data_of<T>(grad_rows),
         data_of<T>(input), bins, shape, gradients);
  if (!deterministic) return;
  const Tensor boxes = torch::stable::new_empty(
      input, {shape.items(), static_cast<int64_t>(sizeof(RoiPoolBox) / sizeof(int))},
      ScalarType::Int);
  RoiPoolBox* const boxes_data = static_cast<RoiPoolBox*>(boxes.mutable_data_ptr());
  launch("roi_pool_boxes_kernel", roi_pool_boxes_kernel<A, Bins>,
         ceil_div(shape.items(), kRoiPoolThreads), kRoiPoolThreads, 0, bins, shape, boxes_data);
  const int chunks = roi_pool_chunks(shape, kVector);
  launch("roi_pool_grad_input_kernel", roi_pool_grad_input_kernel<T, kVector, Bins>,
         ceil_div(roi_pool_owners(shape, chunks), kRoiPoolWarps), kRoiPoolThreads, 0,
         data_of<T>(grad_rows), bins, boxes_data, shape, chunks, mutable_data_of<A>(grad_input));
}

}  // namespace mmdeform
