// Deformable position-sensitive RoI pooling on CUDA.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/roi_pool.cuh"

namespace mmdeform {
namespace {

// The part, of `parts`, in which a bin, of `bins`, lies along an axis.
__device__ __forceinline__ int part_of(int bin, int parts, int bins) {
  return static_cast<int>(divide(static_cast<int64_t>(bin) * parts, bins));
}

template <typename A, typename C>
struct DeformPsRoiPoolBins {
  const A* __restrict__ rois;    // (R, 5): image, x1, y1, x2, y2
  const C* __restrict__ offset;  // (R, K, 2, part_size, part_size): x, y; or null
  A spatial_scale, trans_std;
  int group_size, part_size, samples;

  __device__ __forceinline__ RoiPoolAxis<A> axis(const RoiPoolShape& shape,
                                                 const RoiPoolIndex& index, bool rows) const {
    const A half = static_cast<A>(0.5), smallest = static_cast<A>(0.1);
    const A* corners = rois + 5 * index.roi + (rows ? 2 : 1);
    const A begin = multiply_rounded(std::round(corners[0]), spatial_scale) - half;
    const A end = multiply_rounded(std::round(corners[2]) + 1, spatial_scale) - half;
    const A extent = end - begin < smallest ? smallest : end - begin;  // NaN stays
    const A bin_size = extent / static_cast<A>(rows ? shape.Ph : shape.Pw);
    A start = begin + multiply_rounded(static_cast<A>(rows ? index.row : index.column), bin_size);
    if (offset != nullptr) {
      const int64_t plane = 2 * (index.roi * shape.K + index.k) + (rows ? 1 : 0);
      const int row = part_of(index.row, part_size, shape.Ph);
      const int column = part_of(index.column, part_size, shape.Pw);
      const C moved = offset[(plane * part_size + row) * part_size + column];
      start += multiply_rounded(static_cast<A>(moved) * trans_std, extent);
    }
    const A step = bin_size / static_cast<A>(samples);
    RoiPoolAxis<A> axis = RoiPoolAxis<A>::of(start, step, A(0), static_cast<A>(samples), samples,
                                             rows ? shape.H : shape.W, half);
    axis.divisor = static_cast<A>(axis.contributing_samples());
    axis.reach = trans_std * extent;
    return axis;
  }

  __device__ __forceinline__ int64_t image(const RoiPoolShape& shape,
                                           const RoiPoolIndex& index) const {
    const int64_t cells = static_cast<int64_t>(group_size) * group_size;
    const A image = rois[5 * index.roi];
    if (!(image >= 0 && image < shape.images / cells)) __trap();
    const int64_t row = part_of(index.row, group_size, shape.Ph);
    return static_cast<int64_t>(image) * cells + row * group_size +
           part_of(index.column, group_size, shape.Pw);
  }

  __device__ __forceinline__ A mask(const RoiPoolShape&, const RoiPoolIndex&) const { return 1; }
};

// Sums gradients over the bins of each part.
template <typename A, typename C>
__global__ void __launch_bounds__(kRoiPoolThreads)
    deform_ps_roi_pool_parts_kernel(const A* __restrict__ grad_bins,  // (R, K, 2, Ph, Pw)
                                    RoiPoolShape shape, int part_size, int64_t parts,
                                    C* __restrict__ grad_offset) {  // (R, K, 2, part, part)
  const int64_t part = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (part >= parts) return;
  const int64_t line = divide(part, part_size), plane = divide(line, part_size);
  const int64_t row = line - plane * part_size, column = part - line * part_size;
  // The bins for which part_of is this part.
  const int first_row = static_cast<int>((row * shape.Ph + part_size - 1) / part_size);
  const int end_row = static_cast<int>(((row + 1) * shape.Ph + part_size - 1) / part_size);
  const int first_column = static_cast<int>((column * shape.Pw + part_size - 1) / part_size);
  const int end_column = static_cast<int>(((column + 1) * shape.Pw + part_size - 1) / part_size);
  A sum = 0;
  for (int i = first_row; i < end_row; ++i) {
    for (int j = first_column; j < end_column; ++j) {
      sum += grad_bins[plane * shape.bins() + static_cast<int64_t>(i) * shape.Pw + j];
    }
  }
  grad_offset[part] = static_cast<C>(sum);
}

// Keeps contiguous copies alive for as long as kernels are launched with their pointers.
struct BinTensors {
  Tensor rois;
  std::optional<Tensor> offset;

  BinTensors(const Tensor& rois, const std::optional<Tensor>& offset)
      : rois(aligned_contiguous(rois)) {
    if (offset.has_value()) this->offset = aligned_contiguous(*offset);
  }

  template <typename A, typename C>
  DeformPsRoiPoolBins<A, C> bins(const RoiPoolGeometry& g) const {
    return {data_of<A>(rois),
            offset.has_value() ? data_of<C>(*offset) : nullptr,
            static_cast<A>(g.spatial_scale),
            static_cast<A>(g.offset_scale),
            static_cast<int>(g.group_size),
            static_cast<int>(g.part_h),
            static_cast<int>(g.samples)};
  }
};

Tensor deform_ps_roi_pool_cuda(const Tensor& input, const Tensor& rois,
                               const std::optional<Tensor>& offset,
                               const std::vector<int64_t>& output_size, double spatial_scale,
                               int64_t output_dim, int64_t group_size, int64_t part_size,
                               int64_t sample_per_part, double trans_std) {
  const RoiPoolGeometry g =
      check_deform_ps_roi_pool(input, rois, offset, output_size, spatial_scale, output_dim,
                               group_size, part_size, sample_per_part, trans_std);
  const RoiPoolShape shape = roi_pool_shape(g);
  const CudaLauncher launch(input);
  const Tensor pixels = roi_pool_input(input, g);
  const BinTensors tensors(rois, offset);
  const Tensor output = torch::stable::new_empty(input, {g.rois, g.output_dim, g.bins_h, g.bins_w});
  roi_pool_dispatch("deform_ps_roi_pool", input,
                    roi_pool_coordinate_type(input, offset, std::nullopt), shape,
                    [&](auto type, auto coordinate, auto vector) {
                      using T = typename decltype(type)::type;
                      using C = typename decltype(coordinate)::type;
                      roi_pool_forward<T, decltype(vector)::value>(
                          launch, pixels, tensors.bins<accumulation_t<T>, C>(g), shape, output);
                    });
  return output;
}

std::tuple<Tensor, Tensor> deform_ps_roi_pool_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& rois,
    const std::optional<Tensor>& offset, const std::vector<int64_t>& output_size,
    double spatial_scale, int64_t output_dim, int64_t group_size, int64_t part_size,
    int64_t sample_per_part, double trans_std, bool deterministic) {
  const RoiPoolGeometry g =
      check_deform_ps_roi_pool(input, rois, offset, output_size, spatial_scale, output_dim,
                               group_size, part_size, sample_per_part, trans_std);
  check_roi_pool_gradient(grad_output, input, g);
  const RoiPoolShape shape = roi_pool_shape(g);
  const CudaLauncher launch(input);
  const Tensor pixels = roi_pool_input(input, g);
  const BinTensors tensors(rois, offset);
  const Tensor grad_input = roi_pool_grad_input(input, g);
  const Tensor grad_offset = offset.has_value() ? torch::stable::new_empty(*offset, offset->sizes())
                                                : torch::stable::new_empty(input, {0});
  // A part may hold several bins.
  const Tensor grad_bins =
      torch::stable::new_empty(rois, {offset.has_value() ? 2 * shape.items() : 0});
  roi_pool_dispatch(
      "deform_ps_roi_pool_backward", input, roi_pool_coordinate_type(input, offset, std::nullopt),
      shape, [&](auto type, auto coordinate, auto vector) {
        using T = typename decltype(type)::type;
        using C = typename decltype(coordinate)::type;
        using A = accumulation_t<T>;
        A* const bin_data = offset.has_value() ? mutable_data_of<A>(grad_bins) : nullptr;
        A* const no_mask = nullptr;
        roi_pool_backward<T, decltype(vector)::value>(launch, grad_output, pixels,
                                                      tensors.bins<A, C>(g), shape, grad_input,
                                                      bin_data, no_mask, deterministic);
        launch("deform_ps_roi_pool_parts_kernel", deform_ps_roi_pool_parts_kernel<A, C>,
               ceil_div(grad_offset.numel(), kRoiPoolThreads), kRoiPoolThreads, 0, bin_data, shape,
               static_cast<int>(part_size), grad_offset.numel(), mutable_data_of<C>(grad_offset));
      });
  return {roi_pool_finish_grad_input(grad_input, input), grad_offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmdeform, MMDEFORM_CUDA_DISPATCH_KEY, m) {
  m.impl("deform_ps_roi_pool", TORCH_BOX(&deform_ps_roi_pool_cuda));
  m.impl("deform_ps_roi_pool_backward", TORCH_BOX(&deform_ps_roi_pool_backward_cuda));
}

}  // namespace mmdeform
