// CPU kernels of deform_roi_pool, compiled once per instruction set.
#include "cpu/roi_pool_kernel.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {
namespace {

// Samples lie at the centres of equal cells of a bin.
struct CentredSamples {
  template <typename A>
  static constexpr A margin = 1;

  template <typename A>
  static RoiAxis<A> axis(const RoiPoolGeometry& g, A first, A second, int64_t bins, int64_t size) {
    const A spatial_scale = static_cast<A>(g.spatial_scale);
    RoiAxis<A> axis{};
    axis.size = size;
    axis.start = rounded(first * spatial_scale) - A(0.5);
    axis.extent = rounded(second * spatial_scale) - A(0.5) - axis.start;
    axis.bin_size = axis.extent / A(bins);
    const A scale = static_cast<A>(g.offset_scale) * axis.extent;
    axis.scale = is_finite(scale) ? scale : A(0);
    if (g.samples > 0) {
      axis.samples = A(g.samples);
      axis.visited = g.samples;
    } else {
      axis.samples = __builtin_ceil(axis.bin_size);
      // More than half a pixel lies between two samples: no more of them fit in the image.
      const A most = A(2 * size + 8);
      if (axis.samples > 0 && is_finite(axis.samples))
        axis.visited = static_cast<int64_t>(axis.samples < most ? axis.samples : most);
    }
    return axis;
  }

  template <typename A>
  static A begin(const RoiPoolGeometry&, const RoiAxis<A>& axis, int64_t bin, A offset) {
    return axis.start + rounded(A(bin) * axis.bin_size) + rounded(axis.scale * offset);
  }

  // The first sample that may lie in the image, where not all are visited.
  template <typename A>
  static A first(const RoiAxis<A>& axis, A begin) {
    const A hidden = axis.samples - A(axis.visited);
    if (!(hidden > 0)) return 0;
    const A first = __builtin_floor((-margin<A> - begin) / (axis.bin_size / axis.samples)) - A(2);
    return first > hidden ? hidden : first > 0 ? first : A(0);
  }

  template <typename A>
  static A shift(const RoiAxis<A>& axis, A index) {
    return (index + A(0.5)) * axis.bin_size / axis.samples;
  }

  template <typename A>
  static A divisor(const RoiAxis<A>& y, const RoiAxis<A>& x, const AxisTable<A>&,
                   const AxisTable<A>&) {
    return y.samples * x.samples;
  }
};

}  // namespace

const RoiPoolKernels& deform_roi_pool_kernels() {
  static constexpr RoiPoolKernels table = kernels<CentredSamples>();
  return table;
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
