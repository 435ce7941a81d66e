// Deformable RoI pooling on CUDA.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/roi_pool.cuh"

namespace mmdeform {
namespace {

template <typename A, typename C>
struct DeformRoiPoolBins {
  const A* __restrict__ rois;    // (R, 5): image, x1, y1, x2, y2
  const C* __restrict__ offset;  // (R, 2, Ph, Pw): x, y; or null
  const C* __restrict__ mask_;   // (R, Ph, Pw) or null
  A spatial_scale, gamma;
  int sampling_ratio;

  __device__ __forceinline__ RoiPoolAxis<A> axis(const RoiPoolShape& shape,
                                                 const RoiPoolIndex& index, bool rows) const {
    const A half = static_cast<A>(0.5);
    const A* corners = rois + 5 * index.roi + (rows ? 2 : 1);
    const A begin = multiply_rounded(corners[0], spatial_scale) - half;
    const A end = multiply_rounded(corners[2], spatial_scale) - half;
    const A bin_size = (end - begin) / static_cast<A>(rows ? shape.Ph : shape.Pw);
    const A reach = gamma * (end - begin);
    A start = begin + multiply_rounded(static_cast<A>(rows ? index.row : index.column), bin_size);
    if (offset != nullptr) {
      const int64_t plane = 2 * index.roi + (rows ? 1 : 0);
      start += multiply_rounded(reach, static_cast<A>(offset[plane * shape.bins() + index.bin]));
    }
    const A samples = sampling_ratio > 0 ? static_cast<A>(sampling_ratio) : std::ceil(bin_size);
    const int size = rows ? shape.H : shape.W;
    // More than half a pixel lies between the samples of an adaptive grid.
    const int limit = sampling_ratio > 0 ? sampling_ratio : 2 * size + 8;
    RoiPoolAxis<A> axis =
        RoiPoolAxis<A>::of(start, bin_size / samples, half, samples, limit, size, A(1));
    axis.reach = reach;
    return axis;
  }

  __device__ __forceinline__ int64_t image(const RoiPoolShape& shape,
                                           const RoiPoolIndex& index) const {
    const A image = rois[5 * index.roi];
    if (!(image >= 0 && image < shape.images)) __trap();
    return static_cast<int64_t>(image);
  }

  __device__ __forceinline__ A mask(const RoiPoolShape& shape, const RoiPoolIndex& index) const {
    return mask_ == nullptr ? A(1) : static_cast<A>(mask_[index.roi * shape.bins() + index.bin]);
  }
};

std::optional<Tensor> aligned_contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return mmdeform::aligned_contiguous(*tensor);
}

// Keeps contiguous copies alive for as long as kernels are launched with their pointers.
struct BinTensors {
  Tensor rois;
  std::optional<Tensor> offset, mask;

  BinTensors(const Tensor& rois, const std::optional<Tensor>& offset,
             const std::optional<Tensor>& mask)
      : rois(mmdeform::aligned_contiguous(rois)),
        offset(aligned_contiguous(offset)),
        mask(aligned_contiguous(mask)) {}

  template <typename A, typename C>
  DeformRoiPoolBins<A, C> bins(const RoiPoolGeometry& g) const {
    return {data_of<A>(rois),
            offset.has_value() ? data_of<C>(*offset) : nullptr,
            mask.has_value() ? data_of<C>(*mask) : nullptr,
            static_cast<A>(g.spatial_scale),
            static_cast<A>(g.offset_scale),
            static_cast<int>(g.samples)};
  }
};

Tensor deform_roi_pool_cuda(const Tensor& input, const Tensor& rois,
                            const std::optional<Tensor>& offset, const std::optional<Tensor>& mask,
                            const std::vector<int64_t>& output_size, double spatial_scale,
                            int64_t sampling_ratio, double gamma) {
  const RoiPoolGeometry g = check_deform_roi_pool(input, rois, offset, mask, output_size,
                                                  spatial_scale, sampling_ratio, gamma);
  const RoiPoolShape shape = roi_pool_shape(g);
  const CudaLauncher launch(input);
  const Tensor pixels = roi_pool_input(input, g);
  const BinTensors tensors(rois, offset, mask);
  const Tensor output = torch::stable::new_empty(input, {g.rois, g.output_dim, g.bins_h, g.bins_w});
  roi_pool_dispatch("deform_roi_pool", input, roi_pool_coordinate_type(input, offset, mask), shape,
                    [&](auto type, auto coordinate, auto vector) {
                      using T = typename decltype(type)::type;
                      using C = typename decltype(coordinate)::type;
                      roi_pool_forward<T, decltype(vector)::value>(
                          launch, pixels, tensors.bins<accumulation_t<T>, C>(g), shape, output);
                    });
  return output;
}

// Like a tensor, or of no elements without it.
Tensor empty_like(const std::optional<Tensor>& tensor, const Tensor& input) {
  if (!tensor.has_value()) return torch::stable::new_empty(input, {0});
  return torch::stable::new_empty(*tensor, tensor->sizes());
}

std::tuple<Tensor, Tensor, Tensor> deform_roi_pool_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& rois,
    const std::optional<Tensor>& offset, const std::optional<Tensor>& mask,
    const std::vector<int64_t>& output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, bool deterministic) {
  const RoiPoolGeometry g = check_deform_roi_pool(input, rois, offset, mask, output_size,
                                                  spatial_scale, sampling_ratio, gamma);
  check_roi_pool_gradient(grad_output, input, g);
  const RoiPoolShape shape = roi_pool_shape(g);
  const CudaLauncher launch(input);
  const Tensor pixels = roi_pool_input(input, g);
  const BinTensors tensors(rois, offset, mask);
  const Tensor grad_input = roi_pool_grad_input(input, g);
  const Tensor grad_offset = empty_like(offset, input), grad_mask = empty_like(mask, input);
  roi_pool_dispatch(
      "deform_roi_pool_backward", input, roi_pool_coordinate_type(input, offset, mask), shape,
      [&](auto type, auto coordinate, auto vector) {
        using T = typename decltype(type)::type;
        using C = typename decltype(coordinate)::type;
        roi_pool_backward<T, decltype(vector)::value>(
            launch, grad_output, pixels, tensors.bins<accumulation_t<T>, C>(g), shape, grad_input,
            offset.has_value() ? mutable_data_of<C>(grad_offset) : nullptr,
            mask.has_value() ? mutable_data_of<C>(grad_mask) : nullptr, deterministic);
      });
  return {roi_pool_finish_grad_input(grad_input, input), grad_offset, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, MMDEFORM_CUDA_DISPATCH_KEY, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool_cuda));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward_cuda));
}

}  // namespace mmdeform
