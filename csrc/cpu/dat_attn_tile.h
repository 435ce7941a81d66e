// What forward and backward pass of dat_attn share: the memory of a worker, tiles of queries, and
// the logits of a tile; for kernels compiled once per capability.
#pragma once

#include <algorithm>

#include "cpu/dat_attn_bias.h"
#include "cpu/gemm.h"
#include "cpu/transpose.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {

// Keys in a block. Logits of a block and a tile, and their gradients, stay in the first caches.
constexpr int64_t kKeys = 32;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Two registers of queries side by side are a panel of the products, so a tile has this many.
constexpr int64_t kPanels = kDatAttnRows / 2;

// Memory of a worker. Products want rows and columns in whole blocks; the rest is zeros.
template <typename A>
struct Scratch {
  int64_t rows;     // channels, in whole blocks of rows of a product
  int64_t columns;  // channels, in whole panels
  int64_t keys;     // keys, in whole blocks of rows
  int64_t count = 0;
  A* memory;

  A *key, *value;                // [rows, keys]
  A* table;                      // see TableLayout
  A *query, *output;             // [panel, channels or rows, kGemmColumns]
  A *weights, *grads;            // [panel, kKeys, kGemmColumns]
  A *grad_output, *grad_query;   // [panel, channels or rows, kGemmColumns]
  A *query_rows, *grad_rows;     // [panel, columns / kGemmColumns, kGemmColumns, kGemmColumns]
  A *grad_key, *grad_value;      // [keys, columns]
  A* grad_table;                 // see TableLayout
  TileRows<A>* tile_rows;        // [kKeys]
  TileColumns<A>* tile_columns;  // [kKeys]

  Scratch(const DatAttnArgs& args, bool backward, void* memory)
      : rows(round_up(args.channels, kGemmRows)),
        columns(round_up(args.channels, kGemmColumns<A>)),
        keys(round_up(args.keys, kGemmRows)),
        memory(static_cast<A*>(memory)) {
    const int64_t tile = kPanels * kGemmColumns<A>;
    key = take(rows * keys);
    value = take(rows * keys);
    table = take(TableLayout<A>(args).count());
    query = take(tile * args.channels);
    output = take(tile * rows);
    weights = take(tile * kKeys);
    tile_rows = reinterpret_cast<TileRows<A>*>(take_bytes(kKeys * sizeof(TileRows<A>)));
    tile_columns = reinterpret_cast<TileColumns<A>*>(take_bytes(kKeys * sizeof(TileColumns<A>)));
    if (!backward) return;
    grads = take(tile * kKeys);
    grad_output = take(tile * args.channels);
    grad_query = take(tile * rows);
    query_rows = take(tile * columns);
    grad_rows = take(tile * columns);
    grad_table = take(TableLayout<A>(args).count());
    if (args.key_sums == nullptr) {
      grad_key = take(keys * columns);
      grad_value = take(keys * columns);
    }
  }

  // Pieces begin at multiples of 64 bytes, as torch's memory does: vectors lie in some of them.
  A* take(int64_t size) {
    A* result = memory == nullptr ? nullptr : memory + count;
    count += round_up(size, 64 / sizeof(A));
    return result;
  }
  A* take_bytes(int64_t size) { return take((size + sizeof(A) - 1) / sizeof(A)); }
};

// Where queries lie and what of them a tile covers.
template <typename A>
struct Tile {
  int64_t row, column;  // of the first query
  int64_t rows, lanes;  // queries
  int64_t panels;
  Vec<A> places_y[(kDatAttnRows + kLanes<A> - 1) / kLanes<A>], places_x;

  Tile(const DatAttnArgs& args, const Axis<A>& y, const Axis<A>& x, int64_t index) {
    const int64_t strips = (args.width + kLanes<A> - 1) / kLanes<A>;
    row = index / strips * kDatAttnRows;
    column = index % strips * kLanes<A>;
    rows = std::min<int64_t>(kDatAttnRows, args.height - row);
    lanes = std::min<int64_t>(kLanes<A>, args.width - column);
    panels = (rows + 1) / 2;
    for (int64_t i = 0; i < kDatAttnRows; i += kLanes<A>)
      places_y[i / kLanes<A>] = y.queries(row + i);
    places_x = x.queries(column);
  }
  static int64_t count(const DatAttnArgs& args) {
    return (args.width + kLanes<A> - 1) / kLanes<A> *
           ((args.height + kDatAttnRows - 1) / kDatAttnRows);
  }
  // Of row v's register in a packed tile whose panels have `depth` rows.
  static int64_t place(int64_t v, int64_t depth) {
    return v / 2 * depth * kGemmColumns<A> + v % 2 * kLanes<A>;
  }
};

// Brings a tile of [channels, H, W] to [panel, channels, kGemmColumns], times `scale`.
template <typename T, typename A>
void pack_tile(const DatAttnArgs& args, const Tile<A>& tile, const T* planes, A scale, A* packed) {
  for (int64_t v = 0; v < 2 * tile.panels; ++v) {
    const T* from = planes + (tile.row + v) * args.width + tile.column;
    A* to = packed + tile.place(v, args.channels);
    for (int64_t c = 0; c < args.channels; ++c) {
      Vec<A> queries = {};
      if (v < tile.rows) {
        queries = tile.lanes == kLanes<A> ? load(from) : load_first(from, tile.lanes);
      }
      store(to, queries * scale);
      from += args.height * args.width;
      to += kGemmColumns<A>;
    }
  }
}

// Writes a tile of [panel, depth, kGemmColumns] to [channels, H, W]; register v times scale[v].
template <typename T, typename A>
void unpack_tile(const DatAttnArgs& args, const Tile<A>& tile, const A* packed, int64_t depth,
                 const Vec<A>* scale, T* planes) {
  for (int64_t v = 0; v < tile.rows; ++v) {
    T* to = planes + (tile.row + v) * args.width + tile.column;
    const A* from = packed + tile.place(v, depth);
    for (int64_t c = 0; c < args.channels; ++c) {
      const Vec<A> queries = load(from) * scale[v];
      if (tile.lanes == kLanes<A>) {
        store(to, queries);
      } else {
        store_first(to, queries, tile.lanes);
      }
      to += args.height * args.width;
      from += kGemmColumns<A>;
    }
  }
}

// Brings [panel, channels, queries] to [panel, channels / kGemmColumns, queries, kGemmColumns].
template <typename A>
void transpose_tile(const DatAttnArgs& args, const Tile<A>& tile, const A* packed, int64_t columns,
                    A* rows) {
  constexpr int64_t kSize = kGemmColumns<A>;
  std::fill(rows, rows + tile.panels * kSize * columns, A{0});
  for (int64_t panel = 0; panel < tile.panels; ++panel) {
    const A* from = packed + panel * args.channels * kSize;
    A* to = rows + panel * columns * kSize;
    for (int64_t c = 0; c < args.channels; c += kSize) {
      planes_to_rows(from + c * kSize, kSize, std::min(kSize, args.channels - c), kSize,
                     to + c * kSize, kSize);
    }
  }
}

// What all tiles of a unit share.
template <typename T, typename C, typename A = Accumulation<T>>
struct Unit {
  const DatAttnArgs& args;
  Scratch<A> s;
  TableLayout<A> layout;
  Axis<A> y, x;
  int64_t image, head;
  const C* positions;

  Unit(const DatAttnArgs& args, int64_t unit, bool backward, void* memory)
      : args(args),
        s(args, backward, memory),
        layout(args),
        y(args.height, args.table_height, args.align_corners),
        x(args.width, args.table_width, args.align_corners),
        image(unit / args.heads),
        head(unit % args.heads) {
    const int64_t group = head / (args.heads / args.groups);
    positions =
        static_cast<const C*>(args.positions) + (image * args.groups + group) * args.keys * 2;
    const int64_t first = unit * args.channels * args.keys;
    pad(static_cast<const T*>(args.key) + first, s.key);
    pad(static_cast<const T*>(args.value) + first, s.value);
    std::fill(s.table, s.table + layout.count(), A{0});
    const C* table = static_cast<const C*>(args.table) + head * layout.height * layout.width;
    for (int64_t r = 0; r < layout.height; ++r)
      for (int64_t c = 0; c < layout.width; ++c)
        s.table[layout.cell(r, c)] = widen(table[r * layout.width + c]);
  }

  void pad(const T* from, A* to) const {
    std::fill(to, to + s.rows * s.keys, A{0});
    for (int64_t c = 0; c < args.channels; ++c)
      for (int64_t n = 0; n < args.keys; ++n) to[c * s.keys + n] = widen(from[c * args.keys + n]);
  }

  // Fills s.weights with the logits of a tile and of keys [first, first + count).
  void logits(const Tile<A>& tile, int64_t first, int64_t count) const {
    for (int64_t n = 0; n < count; ++n) {
      TileRows<A>& rows = s.tile_rows[n];
      TileColumns<A>& columns = s.tile_columns[n];
      rows.set(y, tile.places_y, widen(positions[2 * (first + n)]));
      columns.set(x, tile.places_x, widen(positions[2 * (first + n) + 1]));
      A* to = s.weights + n * kGemmColumns<A>;
      const auto write = [&](int64_t v, Vec<A> bias) { store(to + tile.place(v, kKeys), bias); };
      const int64_t rows_of_tile = 2 * tile.panels;
      switch (columns.registers()) {
        case 1:
          for_each_bias<1>(s.table, layout, rows, columns, rows_of_tile, write);
          break;
        case 2:
          for_each_bias<2>(s.table, layout, rows, columns, rows_of_tile, write);
          break;
        default:
          for_each_bias<0>(s.table, layout, rows, columns, rows_of_tile, write);
      }
    }
    product(tile, s.key, s.query, first, count, s.weights);
  }

  // result[n, query] += sum over channels of keys[channel, n] * queries[channel, query]
  void product(const Tile<A>& tile, const A* keys, const A* queries, int64_t first, int64_t count,
               A* result) const {
    const int64_t padded = round_up(count, kGemmRows);
    for (int64_t panel = 0; panel < tile.panels; ++panel) {
      A* to = result + panel * kKeys * kGemmColumns<A>;
      std::fill(to + count * kGemmColumns<A>, to + padded * kGemmColumns<A>, A{0});
      gemm(keys + first, 1, s.keys, padded, queries + panel * args.channels * kGemmColumns<A>,
           args.channels, 1, to, kGemmColumns<A>);
    }
  }

  // result[channel, query] += sum over n of keys[channel, n] * weights[n, query]
  void mix(const Tile<A>& tile, const A* keys, const A* weights, int64_t first, int64_t count,
           A* result) const {
    for (int64_t panel = 0; panel < tile.panels; ++panel) {
      gemm(keys + first, s.keys, 1, s.rows, weights + panel * kKeys * kGemmColumns<A>, count, 1,
           result + panel * s.rows * kGemmColumns<A>, kGemmColumns<A>);
    }
  }

  // result[n, channel] += sum over queries of weights[n, query] * rows[query, channel]
  void collect(const Tile<A>& tile, const A* weights, const A* rows, int64_t first, int64_t count,
               A* result) const {
    for (int64_t panel = 0; panel < tile.panels; ++panel) {
      gemm(weights + panel * kKeys * kGemmColumns<A>, kGemmColumns<A>, 1,
           round_up(count, kGemmRows), rows + panel * s.columns * kGemmColumns<A>, kGemmColumns<A>,
           s.columns / kGemmColumns<A>, result + first * s.columns, s.columns);
    }
  }

  // Calls function(tile) for the tiles of a chunk.
  template <typename F>
  void for_each_tile(int64_t chunk, const F& function) const {
    const int64_t tiles = Tile<A>::count(args);
    const int64_t last = tiles * (chunk + 1) / args.chunks;
    for (int64_t i = tiles * chunk / args.chunks; i < last; ++i) function(Tile<A>(args, y, x, i));
  }
  // Calls function(first, count) for blocks of keys.
  template <typename F>
  void for_each_block(const F& function) const {
    for (int64_t n = 0; n < args.keys; n += kKeys) function(n, std::min(kKeys, args.keys - n));
  }
};

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
