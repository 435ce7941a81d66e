// Transposition between planes (channels first) and rows (channels last), with conversion.
#pragma once

#include "cpu/vec.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {

// rows[p * row_stride + c] = planes[c * plane_stride + p]
template <typename T, typename A = Accumulation<T>>
void planes_to_rows(const T* planes, int64_t plane_stride, int64_t channels, int64_t pixels,
                    A* rows, int64_t row_stride) {
  constexpr int kBlock = kLanes<A>;
  for (int64_t p = 0; p < pixels; p += kBlock) {
    for (int64_t c = 0; c < channels; c += kBlock) {
      if (p + kBlock > pixels || c + kBlock > channels) {
        for (int64_t pp = p; pp < pixels && pp < p + kBlock; ++pp)
          for (int64_t cc = c; cc < channels && cc < c + kBlock; ++cc)
            rows[pp * row_stride + cc] = widen(planes[cc * plane_stride + pp]);
        continue;
      }
      alignas(64) A block[kBlock][kBlock];
      for (int i = 0; i < kBlock; ++i) store(block[i], load(planes + (c + i) * plane_stride + p));
      for (int j = 0; j < kBlock; ++j)
        for (int i = 0; i < kBlock; ++i) rows[(p + j) * row_stride + c + i] = block[i][j];
    }
  }
}

// planes[c * plane_stride + p] = rows[p * row_stride + c] + bias[c]; bias may be null.
template <typename T, typename A = Accumulation<T>>
void rows_to_planes(const A* rows, int64_t row_stride, int64_t channels, int64_t pixels,
                    const T* bias, T* planes, int64_t plane_stride) {
  constexpr int kBlock = kLanes<A>;
  for (int64_t c = 0; c < channels; c += kBlock) {
    for (int64_t p = 0; p < pixels; p += kBlock) {
      if (p + kBlock > pixels || c + kBlock > channels) {
        for (int64_t cc = c; cc < channels && cc < c + kBlock; ++cc) {
          const A shift = bias == nullptr ? A{0} : widen(bias[cc]);
          for (int64_t pp = p; pp < pixels && pp < p + kBlock; ++pp)
            planes[cc * plane_stride + pp] = narrow<T>(rows[pp * row_stride + cc] + shift);
        }
        continue;
      }
      alignas(64) A block[kBlock][kBlock];
      for (int j = 0; j < kBlock; ++j)
        for (int i = 0; i < kBlock; ++i) block[i][j] = rows[(p + j) * row_stride + c + i];
      for (int i = 0; i < kBlock; ++i) {
        const A shift = bias == nullptr ? A{0} : widen(bias[c + i]);
        store(planes + (c + i) * plane_stride + p, load(block[i]) + shift);
      }
    }
  }
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
