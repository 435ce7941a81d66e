// Kernels of multi-scale deformable attention on raw memory.
//
// N images, S tokens (pixels of all levels), Lq queries, M heads, Dh channels per head, L levels,
// P points. T is the type of value and grad_output, C that of locations and weights, A the
// accumulation type. A "row" is one (image, query, head), a "point" one of a row's L * P.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace mmdeform {

struct MsDeformAttnArgs {
  int64_t tokens, queries, heads, channels, points;  // S, Lq, M, Dh, L * P

  // Properties of each point's level, repeated for its P points: one loop serves all levels.
  const void* width_a;    // A [L * P]
  const void* height_a;   // A [L * P]
  const int32_t* width;   // [L * P]
  const int32_t* height;  // [L * P]
  const int64_t* start;   // [L * P], the level's first token

  const void* value;          // T [N, S, M, Dh], channels adjacent
  int64_t value_image_bytes;  // strides of value
  int64_t value_token_bytes;
  int64_t value_head_bytes;
  const void* locations;  // C [N, Lq, M, L * P, 2], (x, y)
  const void* weights;    // C [N, Lq, M, L * P]
  const void* zeros;      // T [Dh]: what lies outside every image

  void* output = nullptr;             // T [N, Lq, M, Dh]
  const void* grad_output = nullptr;  // T [N, Lq, M, Dh]
  void* grad_value = nullptr;         // T [N, S, M, Dh]
  void* grad_locations = nullptr;     // C [N, Lq, M, L * P, 2]
  void* grad_weights = nullptr;       // C [N, Lq, M, L * P]
};

// Queries [first, last) of one image and head.
struct MsDeformAttnBlock {
  int64_t image, head, first, last;
};

// Words of int64_t that each kernel needs as scratch memory per point.
constexpr int64_t kMsDeformAttnScratch = 18;

// `copy` is null or memory of T [S, Dh] for a copy of the head's value, which is faster to sample:
// in value itself a head's pixels are M * Dh channels apart and compete for few lines of a cache.
struct MsDeformAttnKernels {
  // Writes the output of a block.
  void (*forward)(const MsDeformAttnArgs&, const MsDeformAttnBlock&, int64_t* scratch, void* copy);
  // Writes grad_locations and grad_weights of a block.
  void (*backward_points)(const MsDeformAttnArgs&, const MsDeformAttnBlock&, int64_t* scratch,
                          void* copy);
  // Writes grad_value of `channels` channels from `channel` on, of one image and head. `sums` is
  // memory of A [S + 1, channels].
  void (*backward_value)(const MsDeformAttnArgs&, int64_t image, int64_t head, int64_t channel,
                         int64_t channels, int64_t* scratch, void* sums);
};

using MsDeformAttnTable = KernelsByDtype<MsDeformAttnKernels>;
MMDEFORM_DECLARE_KERNELS(MsDeformAttnTable, ms_deform_attn_table)

}  // namespace mmdeform
