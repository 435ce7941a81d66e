// The sampling rule of every operator: bilinear interpolation with zero padding.

#pragma once

#include <cmath>

#ifdef __CUDACC__
#define MMDEFORM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMDEFORM_HOST_DEVICE inline
#endif

namespace mmdeform {

// A sampling position within an image of H x W pixels. Corner k in 0..3 is the pixel
// (h_low + k / 2, w_low + k % 2).
template <typename A>
struct BilinearPoint {
  int pixel;         // h_low * W + w_low; outside the image where corner 0 is
  unsigned corners;  // bit k: corner k lies inside the image; 0: the position does not contribute
  A lh, lw;          // fractions h - h_low and w - w_low
};

// Pixel index of corner k; meaningful only where its bit is set.
template <typename A>
MMDEFORM_HOST_DEVICE int corner_pixel(const BilinearPoint<A>& point, int W, int k) {
  return point.pixel + (k & 1) + (k & 2 ? W : 0);
}

template <typename A>
MMDEFORM_HOST_DEVICE bool has_corner(const BilinearPoint<A>& point, int k) {
  return point.corners >> k & 1;
}

template <typename A>
MMDEFORM_HOST_DEVICE A corner_weight(const BilinearPoint<A>& point, int k) {
  return (k & 2 ? point.lh : 1 - point.lh) * (k & 1 ? point.lw : 1 - point.lw);
}

// Derivatives of sum_k corner_weight(k) * dot[k] by h and w; right-sided at integer positions.
template <typename A>
MMDEFORM_HOST_DEVICE A derivative_h(const BilinearPoint<A>& point, const A dot[4]) {
  return (1 - point.lw) * (dot[2] - dot[0]) + point.lw * (dot[3] - dot[1]);
}

template <typename A>
MMDEFORM_HOST_DEVICE A derivative_w(const BilinearPoint<A>& point, const A dot[4]) {
  return (1 - point.lh) * (dot[1] - dot[0]) + point.lh * (dot[3] - dot[2]);
}

// A position contributes if and only if -1 < h < H and -1 < w < W. NaN fails the comparisons, and
// nothing is converted to an integer before they have passed.
template <typename A>
MMDEFORM_HOST_DEVICE BilinearPoint<A> bilinear_point(A h, A w, int H, int W) {
  if (!(h > -1 && h < H && w > -1 && w < W)) return {0, 0, 0, 0};
  const A h_floor = std::floor(h), w_floor = std::floor(w);
  const int h_low = static_cast<int>(h_floor), w_low = static_cast<int>(w_floor);
  const unsigned columns = (w_low >= 0 ? 1u : 0u) | (w_low + 1 < W ? 2u : 0u);
  const unsigned corners = (h_low >= 0 ? columns : 0u) | (h_low + 1 < H ? columns << 2 : 0u);
  return {h_low * W + w_low, corners, h - h_floor, w - w_floor};
}

}  // namespace mmdeform
