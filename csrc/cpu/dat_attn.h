// Kernels of dat_attn on raw memory.
//
// B images, M heads of Dh channels, H x W queries, Ns keys in G groups, tables of Th x Tw biases. T
// is the type of query, key, value and output, C that of positions and table, A the accumulation
// type. All tensors are contiguous. A "unit" is one head of one image.
//
// Queries are adjacent in memory, so a register holds queries of one row of the map; a "tile" is
// one register wide and kDatAttnRows rows high.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace mmdeform {

constexpr int kDatAttnRows = 8;

struct DatAttnArgs {
  int64_t batch, heads, groups, channels, height, width, keys, table_height, table_width;
  double scale;
  bool align_corners;
  // Parts into which the tiles of a unit are split. It depends on sizes alone, so that the order of
  // sums does not depend on the number of threads.
  int64_t chunks;

  const void* query;      // T [B, M, Dh, H, W]
  const void* key;        // T [B, M, Dh, Ns]
  const void* value;      // T [B, M, Dh, Ns]
  const void* positions;  // C [B, G, Ns, 2], (y, x)
  const void* table;      // C [M, Th, Tw]
  void* output;           // T [B, M, Dh, H, W]
  void* logsumexp;        // A [B, M, H, W]

  const void* grad_output = nullptr;  // T [B, M, Dh, H, W]
  void* grad_query = nullptr;         // T [B, M, Dh, H, W]
  void* grad_key = nullptr;           // T [B, M, Dh, Ns]
  void* grad_value = nullptr;         // T [B, M, Dh, Ns]
  void* grad_positions = nullptr;     // C [B, G, Ns, 2]
  void* grad_table = nullptr;         // C [M, Th, Tw]
  // Sums over the tiles of a chunk.
  void* key_sums = nullptr;       // A [B * M * chunks, 2, unit_sums]: of grad_key and grad_value
  void* position_sums = nullptr;  // A [B * M * chunks, Ns in whole blocks, 2]
  void* table_sums = nullptr;     // A [B * M * chunks, Th, Tw]
};

struct DatAttnKernels {
  // Numbers of A that a worker needs as scratch memory.
  int64_t (*forward_scratch)(const DatAttnArgs&);
  int64_t (*backward_scratch)(const DatAttnArgs&);
  // Numbers of A in the sums of grad_key, or grad_value, of one unit.
  int64_t (*unit_sums)(const DatAttnArgs&);
  // and in the sums of grad_positions.
  int64_t (*position_sums)(const DatAttnArgs&);

  // Writes output and logsumexp of one chunk of one unit.
  void (*forward)(const DatAttnArgs&, int64_t unit, int64_t chunk, void* scratch);
  // Writes grad_query and the sums of one chunk of one unit.
  void (*backward)(const DatAttnArgs&, int64_t unit, int64_t chunk, void* scratch);
  // Adds up the chunks' sums: grad_key and grad_value of one unit,
  void (*finish_unit)(const DatAttnArgs&, int64_t unit);
  // grad_positions of one image and group,
  void (*finish_positions)(const DatAttnArgs&, int64_t image, int64_t group);
  // and grad_table of one head.
  void (*finish_table)(const DatAttnArgs&, int64_t head);
};

using DatAttnTable = KernelsByDtype<DatAttnKernels>;
MMDEFORM_DECLARE_KERNELS(DatAttnTable, dat_attn_table)

}  // namespace mmdeform
