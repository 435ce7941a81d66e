// CPU kernels of deform_ps_roi_pool, compiled once per instruction set.
#include "cpu/roi_pool_kernel.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {
namespace {

// Samples lie where equal cells of a bin begin; RoIs are rounded to pixels of the image.
struct LeadingSamples {
  template <typename A>
  static constexpr A margin = A(0.5);

  template <typename A>
  static RoiAxis<A> axis(const RoiPoolGeometry& g, A first, A second, int64_t bins, int64_t size) {
    const A spatial_scale = static_cast<A>(g.spatial_scale);
    RoiAxis<A> axis{};
    axis.size = size;
    axis.start = rounded(__builtin_round(first) * spatial_scale) - A(0.5);
    const A end = rounded((__builtin_round(second) + A(1)) * spatial_scale) - A(0.5);
    const A extent = end - axis.start;
    axis.extent = extent < A(0.1) ? A(0.1) : extent;
    axis.bin_size = axis.extent / A(bins);
    axis.samples = A(g.samples);
    axis.step = axis.bin_size / axis.samples;
    axis.visited = g.samples;
    axis.scale = static_cast<A>(g.offset_scale) * axis.extent;
    return axis;
  }

  template <typename A>
  static A begin(const RoiPoolGeometry& g, const RoiAxis<A>& axis, int64_t bin, A offset) {
    return axis.start + rounded(A(bin) * axis.bin_size) +
           rounded(offset * static_cast<A>(g.offset_scale) * axis.extent);
  }

  template <typename A>
  static A first(const RoiAxis<A>&, A) {
    return 0;
  }

  template <typename A>
  static A shift(const RoiAxis<A>& axis, A index) {
    return rounded(index * axis.step);
  }

  template <typename A>
  static A divisor(const RoiAxis<A>&, const RoiAxis<A>&, const AxisTable<A>& rows,
                   const AxisTable<A>& columns) {
    return rows.kept * columns.kept;
  }
};

}  // namespace

const RoiPoolKernels& deform_ps_roi_pool_kernels() {
  static constexpr RoiPoolKernels table = kernels<LeadingSamples>();
  return table;
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
