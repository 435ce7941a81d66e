// Matrix product on packed panels, for kernels compiled once per capability.
#pragma once

#include "cpu/vec.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {

// Rows of C that a step of the product keeps in registers.
#if defined(__AVX512F__)
constexpr int kGemmRows = 8;
#else
constexpr int kGemmRows = 4;
#endif

// Columns of a packed panel of B.
template <typename A>
constexpr int kGemmColumns = 2 * kLanes<A>;

// C[r][0..kGemmColumns) += sum over k of a[r * row_stride + k * depth_stride] * b[k][...].
template <typename A>
inline void gemm_block(const A* __restrict__ a, int64_t row_stride, int64_t depth_stride,
                       const A* __restrict__ b, int64_t depth, A* __restrict__ c,
                       int64_t c_stride) {
  Vec<A> sums[kGemmRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kGemmRows; ++r) {
    sums[r][0] = load(c + r * c_stride);
    sums[r][1] = load(c + r * c_stride + kLanes<A>);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<A> b0 = load(b + k * kGemmColumns<A>);
    const Vec<A> b1 = load(b + k * kGemmColumns<A> + kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < kGemmRows; ++r) {
      const A scale = a[r * row_stride + k * depth_stride];
      sums[r][0] += scale * b0;
      sums[r][1] += scale * b1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGemmRows; ++r) {
    store(c + r * c_stride, sums[r][0]);
    store(c + r * c_stride + kLanes<A>, sums[r][1]);
  }
}

// C += A B with B packed as [panel][depth][kGemmColumns]. `rows` is a multiple of kGemmRows and
// the rows of C hold panels * kGemmColumns elements.
template <typename A>
inline void gemm(const A* a, int64_t row_stride, int64_t depth_stride, int64_t rows, const A* b,
                 int64_t depth, int64_t panels, A* c, int64_t c_stride) {
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t row = 0; row < rows; row += kGemmRows) {
      gemm_block(a + row * row_stride, row_stride, depth_stride,
                 b + panel * depth * kGemmColumns<A>, depth,
                 c + row * c_stride + panel * kGemmColumns<A>, c_stride);
    }
  }
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
