// Kernels of DCNv3 and DCNv4 on raw memory, and the driver that both operators call.
//
// Images are N x H x W x C, C = G groups of channels. T is the type of input and grad_output, C
// that of offsets and weights, A the accumulation type. An output pixel has G * K points, K for
// each group.
#pragma once

#include <cstdint>

#include "common/dcnv3_geometry.h"
#include "cpu/capability.h"

namespace mmdeform {

// The points of an output pixel, the same for all of them; arrays of `points`, rounded up to
// kPointBlock, so that loops over points have no remainder.
struct Dcnv3Taps {
  const void* x;           // A, the tap's distance from the kernel's centre in pixels
  const void* y;           // A
  const int64_t* channel;  // first channel of the point's group
};

constexpr int64_t kPointBlock = 16;

struct Dcnv3Args {
  Dcnv3Geometry geometry;
  Dcnv3Taps taps;
  int64_t points;  // G * K

  const void* input;          // T [N, H * W, C], channels adjacent
  int64_t input_image_bytes;  // strides of input
  int64_t input_pixel_bytes;
  // C, a row for each output pixel of each image: of DCNv3 offsets [G * K, 2] and weights [G * K];
  // of DCNv4, where `weight` is null, both, [G, 3 * K], and what fills up `offset_row` numbers.
  const void* offset;
  const void* weight;
  int64_t offset_row;
  const void* zeros;  // T [C / G]: what lies outside every image

  void* output = nullptr;             // T [N, Ho * Wo, C]
  const void* grad_output = nullptr;  // T [N, Ho * Wo, C]
  void* grad_input = nullptr;         // T [N, H * W, C]
  void* grad_offset = nullptr;        // as offset and weight
  void* grad_weight = nullptr;
};

// Output pixels [first, last) of one image.
struct Dcnv3Block {
  int64_t image, first, last;
};

struct Dcnv3Kernels {
  // Writes the output of a block.
  void (*forward)(const Dcnv3Args&, const Dcnv3Block&, int64_t* scratch);
  // Writes grad_offset and grad_weight of a block.
  void (*backward_points)(const Dcnv3Args&, const Dcnv3Block&, int64_t* scratch);
  // Writes grad_input of `channels` channels from `channel` on, of one image: whole groups, or part
  // of one. `sums` is memory of A [H * W + 1, channels], of A [channels] where T is A.
  void (*backward_input)(const Dcnv3Args&, int64_t image, int64_t channel, int64_t channels,
                         int64_t* scratch, void* sums);
};

// Words of int64_t that each kernel needs as scratch memory.
inline int64_t dcnv3_scratch(int64_t points) { return 22 * (points + 3 * kPointBlock); }

using Dcnv3Table = KernelsByDtype<Dcnv3Kernels>;
MMDEFORM_DECLARE_KERNELS(Dcnv3Table, dcnv3_table)

}  // namespace mmdeform
