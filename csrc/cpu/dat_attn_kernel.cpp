// See dat_attn.h. Compiled once per instruction set.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/dat_attn_bias.h"
#include "cpu/gemm.h"
#include "cpu/transpose.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {
namespace {

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

template <typename T, typename C, typename A = Accumulation<T>>
void forward(const DatAttnArgs& args, int64_t index, int64_t chunk, void* memory) {
  const Unit<T, C> unit(args, index, false, memory);
  const Scratch<A>& s = unit.s;
  const int64_t pixels = args.height * args.width;
  const T* query = static_cast<const T*>(args.query) + index * args.channels * pixels;
  T* output = static_cast<T*>(args.output) + index * args.channels * pixels;
  A* logsumexp = static_cast<A*>(args.logsumexp) + index * pixels;
  unit.for_each_tile(chunk, [&](const Tile<A>& tile) {
    pack_tile(args, tile, query, static_cast<A>(args.scale), s.query);
    std::fill(s.output, s.output + tile.panels * s.rows * kGemmColumns<A>, A{0});
    Vec<A> largest[kDatAttnRows], total[kDatAttnRows];
    for (int64_t v = 0; v < kDatAttnRows; ++v) {
      largest[v] = broadcast<A>(-INFINITY);
      total[v] = Vec<A>{};
    }
    unit.for_each_block([&](int64_t first, int64_t count) {
      unit.logits(tile, first, count);
      for (int64_t v = 0; v < 2 * tile.panels; ++v) {
        A* weights = s.weights + tile.place(v, kKeys);
        Vec<A> best = largest[v];
        for (int64_t n = 0; n < count; ++n)
          best = larger<A>(load(weights + n * kGemmColumns<A>), best);
        const Vec<A> shrink = exp<A>(largest[v] - best);
        Vec<A> sum = total[v] * shrink;
        for (int64_t n = 0; n < count; ++n) {
          const Vec<A> weight = exp<A>(load(weights + n * kGemmColumns<A>) - best);
          sum += weight;
          store(weights + n * kGemmColumns<A>, weight);
        }
        largest[v] = best;
        total[v] = sum;
        A* sums = s.output + tile.place(v, s.rows);
        for (int64_t c = 0; c < s.rows; ++c, sums += kGemmColumns<A>)
          store(sums, load(sums) * shrink);
      }
      unit.mix(tile, s.value, s.weights, first, count, s.output);
    });
    for (int64_t v = 0; v < tile.rows; ++v) {
      A* to = logsumexp + (tile.row + v) * args.width + tile.column;
      for (int64_t i = 0; i < tile.lanes; ++i) to[i] = largest[v][i] + std::log(total[v][i]);
      total[v] = 1 / total[v];
    }
    unpack_tile(args, tile, s.output, s.rows, total, output);
  });
}

// Adds the gradients of the biases of a tile and a block of keys.
template <typename T, typename C, typename A = Accumulation<T>>
void add_bias_gradients(const Unit<T, C>& unit, const Tile<A>& tile, int64_t count, A* positions) {
  const Scratch<A>& s = unit.s;
  Vec<A> sums[4];  // y and x of two keys
  for (int64_t n = 0; n < count; ++n) {
    const TileRows<A>& rows = s.tile_rows[n];
    const TileColumns<A>& columns = s.tile_columns[n];
    const A* from = s.grads + n * kGemmColumns<A>;
    const auto grad = [&](int64_t v) { return load(from + tile.place(v, kKeys)); };
    const auto add = [&](auto registers) {
      bias_gradients<registers.value>(s.table, s.grad_table, unit.layout, rows, columns, tile.rows,
                                      grad, sums + n % 2 * 2, sums + n % 2 * 2 + 1);
    };
    switch (columns.registers()) {
      case 1:
        add(std::integral_constant<int, 1>());
        break;
      case 2:
        add(std::integral_constant<int, 2>());
        break;
      default:
        add(std::integral_constant<int, 0>());
    }
    if (n % 2 == 0 && n + 1 == count) sums[2] = sums[3] = Vec<A>{};
    if (n % 2 == 1 || n + 1 == count) add_sums(sums, positions + n / 2 * 4);
  }
}

// grad_key, or grad_value, from its sums.
template <typename T, typename A>
void write_keys(const DatAttnArgs& args, const Scratch<A>& s, int64_t unit, const A* sums,
                void* grad) {
  rows_to_planes<T>(sums, s.columns, args.channels, args.keys, nullptr,
                    static_cast<T*>(grad) + unit * args.channels * args.keys, args.keys);
}

template <typename T, typename C, typename A = Accumulation<T>>
void backward(const DatAttnArgs& args, int64_t index, int64_t chunk, void* memory) {
  Unit<T, C> unit(args, index, true, memory);
  Scratch<A>& s = unit.s;
  const int64_t pixels = args.height * args.width, item = index * args.chunks + chunk;
  if (args.key_sums != nullptr) {
    s.grad_key = static_cast<A*>(args.key_sums) + 2 * item * s.keys * s.columns;
    s.grad_value = s.grad_key + s.keys * s.columns;
  }
  A* grad_positions = static_cast<A*>(args.position_sums) + item * s.keys * 2;
  std::fill(s.grad_key, s.grad_key + s.keys * s.columns, A{0});
  std::fill(s.grad_value, s.grad_value + s.keys * s.columns, A{0});
  std::fill(grad_positions, grad_positions + s.keys * 2, A{0});
  std::fill(s.grad_table, s.grad_table + unit.layout.count(), A{0});
  const int64_t first_element = index * args.channels * pixels;
  const T* query = static_cast<const T*>(args.query) + first_element;
  const T* output = static_cast<const T*>(args.output) + first_element;
  const T* grad_output = static_cast<const T*>(args.grad_output) + first_element;
  T* grad_query = static_cast<T*>(args.grad_query) + first_element;
  const A* logsumexp = static_cast<const A*>(args.logsumexp) + index * pixels;
  Vec<A> scales[kDatAttnRows];
  for (Vec<A>& scale : scales) scale = broadcast<A>(static_cast<A>(args.scale));

  unit.for_each_tile(chunk, [&](const Tile<A>& tile) {
    pack_tile(args, tile, query, static_cast<A>(args.scale), s.query);
    pack_tile(args, tile, grad_output, A{1}, s.grad_output);
    pack_tile(args, tile, output, A{1}, s.output);
    transpose_tile(args, tile, s.query, s.columns, s.query_rows);
    transpose_tile(args, tile, s.grad_output, s.columns, s.grad_rows);
    std::fill(s.grad_query, s.grad_query + tile.panels * s.rows * kGemmColumns<A>, A{0});
    // Queries behind the map have no gradient of the output and no logits: they add zeros.
    Vec<A> shift[kDatAttnRows] = {}, delta[kDatAttnRows] = {};
    for (int64_t v = 0; v < tile.rows; ++v) {
      const A* from = logsumexp + (tile.row + v) * args.width + tile.column;
      shift[v] = tile.lanes == kLanes<A> ? load(from) : load_first(from, tile.lanes);
      const int64_t place = tile.place(v, args.channels);
      for (int64_t c = 0; c < args.channels; ++c) {
        delta[v] += load(s.grad_output + place + c * kGemmColumns<A>) *
                    load(s.output + place + c * kGemmColumns<A>);
      }
    }
    unit.for_each_block([&](int64_t first, int64_t count) {
      unit.logits(tile, first, count);
      std::fill(s.grads, s.grads + tile.panels * kKeys * kGemmColumns<A>, A{0});
      unit.product(tile, s.value, s.grad_output, first, count, s.grads);
      for (int64_t v = 0; v < 2 * tile.panels; ++v) {
        A* weights = s.weights + tile.place(v, kKeys);
        A* grads = s.grads + tile.place(v, kKeys);
        for (int64_t n = 0; n < count; ++n) {
          const Vec<A> weight = exp<A>(load(weights) - shift[v]);
          store(weights, weight);
          store(grads, weight * (load(grads) - delta[v]));
          weights += kGemmColumns<A>;
          grads += kGemmColumns<A>;
        }
      }
      unit.mix(tile, s.key, s.grads, first, count, s.grad_query);
      unit.collect(tile, s.weights, s.grad_rows, first, count, s.grad_value);
      unit.collect(tile, s.grads, s.query_rows, first, count, s.grad_key);
      add_bias_gradients<T, C>(unit, tile, count, grad_positions + 2 * first);
    });
    unpack_tile(args, tile, s.grad_query, s.rows, scales, grad_query);
  });
  A* table_sums = static_cast<A*>(args.table_sums) + item * unit.layout.height * unit.layout.width;
  for (int64_t r = 0; r < unit.layout.height; ++r) {
    const A* row = s.grad_table + unit.layout.cell(r, 0);
    std::copy(row, row + unit.layout.width, table_sums + r * unit.layout.width);
  }
  if (args.key_sums == nullptr) {
    write_keys<T>(args, s, index, s.grad_key, args.grad_key);
    write_keys<T>(args, s, index, s.grad_value, args.grad_value);
  }
}

template <typename T, typename A = Accumulation<T>>
void finish_unit(const DatAttnArgs& args, int64_t unit) {
  const Scratch<A> s(args, true, nullptr);
  const int64_t size = s.keys * s.columns;
  A* sums = static_cast<A*>(args.key_sums) + 2 * unit * args.chunks * size;
  for (int64_t chunk = 1; chunk < args.chunks; ++chunk)
    for (int64_t i = 0; i < 2 * size; ++i) sums[i] += sums[2 * chunk * size + i];
  write_keys<T>(args, s, unit, sums, args.grad_key);
  write_keys<T>(args, s, unit, sums + size, args.grad_value);
}

template <typename T, typename C, typename A = Accumulation<T>>
void finish_positions(const DatAttnArgs& args, int64_t image, int64_t group) {
  const int64_t keys = round_up(args.keys, kGemmRows), heads = args.heads / args.groups;
  const int64_t items = heads * args.chunks;
  const A slopes[2] = {Axis<A>(args.height, args.table_height, args.align_corners).slope(),
                       Axis<A>(args.width, args.table_width, args.align_corners).slope()};
  const A* sums = static_cast<const A*>(args.position_sums) +
                  (image * args.heads + group * heads) * args.chunks * keys * 2;
  C* grad = static_cast<C*>(args.grad_positions) + (image * args.groups + group) * args.keys * 2;
  for (int64_t i = 0; i < 2 * args.keys; ++i) {
    A sum = 0;
    for (int64_t item = 0; item < items; ++item) sum += sums[item * keys * 2 + i];
    grad[i] = narrow<C>(sum * slopes[i % 2]);
  }
}

template <typename T, typename C, typename A = Accumulation<T>>
void finish_table(const DatAttnArgs& args, int64_t head) {
  const int64_t cells = args.table_height * args.table_width;
  const A* sums = static_cast<const A*>(args.table_sums) + head * args.chunks * cells;
  C* grad = static_cast<C*>(args.grad_table) + head * cells;
  for (int64_t i = 0; i < cells; ++i) {
    A sum = 0;
    for (int64_t image = 0; image < args.batch; ++image)
      for (int64_t chunk = 0; chunk < args.chunks; ++chunk)
        sum += sums[(image * args.heads * args.chunks + chunk) * cells + i];
    grad[i] = narrow<C>(sum);
  }
}

template <typename A>
int64_t forward_scratch(const DatAttnArgs& args) {
  return Scratch<A>(args, false, nullptr).count;
}

template <typename A>
int64_t backward_scratch(const DatAttnArgs& args) {
  return Scratch<A>(args, true, nullptr).count;
}

template <typename A>
int64_t unit_sums(const DatAttnArgs& args) {
  const Scratch<A> s(args, true, nullptr);
  return s.keys * s.columns;
}

template <typename A>
int64_t position_sums(const DatAttnArgs& args) {
  return 2 * Scratch<A>(args, true, nullptr).keys;
}

template <typename T, typename C, typename A = Accumulation<T>>
constexpr DatAttnKernels kernels() {
  return {forward_scratch<A>, backward_scratch<A>,    unit_sums<A>,
          position_sums<A>,   forward<T, C>,          backward<T, C>,
          finish_unit<T>,     finish_positions<T, C>, finish_table<T, C>};
}

}  // namespace

const DatAttnTable& dat_attn_table() {
  static constexpr DatAttnTable table = {kernels<double, double>(),     kernels<float, float>(),
                                         kernels<Half, Half>(),         kernels<Half, float>(),
                                         kernels<BFloat16, BFloat16>(), kernels<BFloat16, float>()};
  return table;
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
