// The bias of dat_attn and its gradient, for kernels compiled once per capability.
//
// A register holds queries j, j + 1, ... of one row of the map. Their places in the table are
// evenly spaced columns of one row. So the cells around them form a window that one or two
// registers hold, a shuffle hands each lane its cells, and the columns are the same for all rows of
// queries. The table is interpolated along x once for each of its rows that a tile touches, then
// along y.
#pragma once

#include "cpu/dat_attn.h"
#include "cpu/vec_math.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {

// Cells of zeros around a table. Places outside are moved to -2 or to the table's size, where a
// place and the cell after it lie in the border.
constexpr int64_t kBorder = 2;

// A table with its border, and room behind each row for a window of two registers.
template <typename A>
struct TableLayout {
  int64_t height, width, stride;

  explicit TableLayout(const DatAttnArgs& args)
      : height(args.table_height),
        width(args.table_width),
        stride(args.table_width + 2 * kBorder + 2 * kLanes<A>) {}
  int64_t count() const { return (height + 2 * kBorder) * stride; }
  int64_t cell(int64_t row, int64_t column) const {
    return (row + kBorder) * stride + column + kBorder;
  }
};

// Where rows, or columns, of queries lie, and how their displacement maps to cells of the table.
template <typename A>
struct Axis {
  A size, table_size;
  bool align_corners;

  Axis(int64_t size, int64_t table_size, bool align_corners)
      : size(static_cast<A>(size)),
        table_size(static_cast<A>(table_size)),
        align_corners(align_corners) {}

  // Normalised places of queries first, first + 1, ..., the last of which is repeated.
  Vec<A> queries(int64_t first) const {
    Vec<A> index = __builtin_convertvector(lane_indices<A>(), Vec<A>) + static_cast<A>(first);
    index = index < size ? index : broadcast<A>(size - 1);
    if (!align_corners) return (2 * index + 1) / size - 1;
    return size > 1 ? 2 * index / (size - 1) - 1 : Vec<A>{};
  }

  // Places in the table. What does not contribute is moved into the border; comparisons with NaN
  // are false.
  Vec<A> places(Vec<A> queries, A position) const {
    const Vec<A> place = ((queries - position) * A(0.5) + 1) * A(0.5) * (table_size - 1);
    const Vec<A> beyond = place >= table_size ? broadcast<A>(table_size) : broadcast<A>(-kBorder);
    return (place > -1) & (place < table_size) ? place : beyond;
  }

  // The derivative of places by the position.
  A slope() const { return A(-0.25) * (table_size - 1); }
};

// The rows of the table that a tile's rows of queries read, for one key.
template <typename A>
struct TileRows {
  int32_t low[kDatAttnRows];
  A fraction[kDatAttnRows];

  void set(const Axis<A>& axis, const Vec<A>* queries, A position) {
    for (int i = 0; i < kDatAttnRows; i += kLanes<A>) {
      const Vec<A> place = axis.places(queries[i / kLanes<A>], position);
      const IntVec<A> floor = floor_to_int<A>(place);
      const Vec<A> rest = place - __builtin_convertvector(floor, Vec<A>);
      for (int j = 0; j < kLanes<A> && i + j < kDatAttnRows; ++j) {
        low[i + j] = static_cast<int32_t>(floor[j]);
        fraction[i + j] = rest[j];
      }
    }
  }
};

// The columns of the table that a tile's columns of queries read, for one key.
template <typename A>
struct TileColumns {
  Vec<A> place, fraction;
  IntVec<A> index;  // of the cell to the left, in the window
  int64_t first;    // column of the window's first cell
  int64_t span;     // cells in the window

  void set(const Axis<A>& axis, Vec<A> queries, A position) {
    place = axis.places(queries, position);
    const IntVec<A> low = floor_to_int<A>(place);
    fraction = place - __builtin_convertvector(low, Vec<A>);
    first = low[0];
    index = low - low[0];
    span = index[kLanes<A> - 1] + 2;
  }
  // Registers that hold the window; 0: more than two.
  int registers() const { return span <= kLanes<A> ? 1 : span <= 2 * kLanes<A> ? 2 : 0; }
};

// A row of the table at the places of a tile's columns, and its derivative by the place.
template <typename A>
struct RowValues {
  Vec<A> value, slope;
};

template <int kRegisters, typename A>
inline RowValues<A> interpolate(const A* window, const TileColumns<A>& columns) {
  Vec<A> left, right;
  if constexpr (kRegisters == 1) {
    const Vec<A> cells = load(window);
    left = shuffle<A>(cells, columns.index);
    right = shuffle<A>(cells, columns.index + 1);
  } else if constexpr (kRegisters == 2) {
    const Vec<A> cells = load(window), more = load(window + kLanes<A>);
    left = shuffle<A>(cells, more, columns.index);
    right = shuffle<A>(cells, more, columns.index + 1);
  } else {
    for (int i = 0; i < kLanes<A>; ++i) {
      left[i] = window[columns.index[i]];
      right[i] = window[columns.index[i] + 1];
    }
  }
  const Vec<A> slope = right - left;
  return {left + columns.fraction * slope, slope};
}

// Calls function(v, bias) for rows v of a tile.
template <int kRegisters, typename A, typename F>
inline void for_each_bias(const A* table, const TableLayout<A>& layout, const TileRows<A>& rows,
                          const TileColumns<A>& columns, int64_t count, const F& function) {
  int32_t current = rows.low[0];
  const A* window = table + layout.cell(current, columns.first);
  Vec<A> low = interpolate<kRegisters>(window, columns).value;
  Vec<A> high = interpolate<kRegisters>(window + layout.stride, columns).value;
  for (int64_t v = 0; v < count; ++v) {
    if (rows.low[v] != current) {
      window = table + layout.cell(rows.low[v], columns.first);
      low = rows.low[v] == current + 1 ? high : interpolate<kRegisters>(window, columns).value;
      high = interpolate<kRegisters>(window + layout.stride, columns).value;
      current = rows.low[v];
    }
    function(v, low + rows.fraction[v] * (high - low));
  }
}

// Adds sums over lanes, each weighted by how much it reads of a cell, to the gradient of a window.
// The tents of all lanes are made once for a key and used for all rows.
template <int kRegisters, typename A>
struct Tents {
  Vec<A> weights[kLanes<A>][kRegisters];

  explicit Tents(const TileColumns<A>& columns) {
    A places[kLanes<A>];
    store(places, columns.place);
    for (int k = 0; k < kRegisters; ++k) {
      const Vec<A> cells = __builtin_convertvector(lane_indices<A>(), Vec<A>) +
                           static_cast<A>(columns.first + k * kLanes<A>);
      for (int i = 0; i < kLanes<A>; ++i) {
        const Vec<A> distance = cells - places[i];
        const Vec<A> tent = 1 - larger<A>(distance, -distance);
        weights[i][k] = larger<A>(tent, Vec<A>{});
      }
    }
  }

  void add(Vec<A> lanes, const TileColumns<A>&, A* window) const {
    A values[kLanes<A>];
    store(values, lanes);
    for (int k = 0; k < kRegisters; ++k) {
      Vec<A> even = load(window + k * kLanes<A>), odd = {};
#pragma GCC unroll 8
      for (int i = 0; i < kLanes<A>; i += 2) {
        even += values[i] * weights[i][k];
        odd += values[i + 1] * weights[i + 1][k];
      }
      store(window + k * kLanes<A>, even + odd);
    }
  }
};

template <typename A>
struct Tents<0, A> {
  explicit Tents(const TileColumns<A>&) {}

  void add(Vec<A> lanes, const TileColumns<A>& columns, A* window) const {
    const Vec<A> right = columns.fraction * lanes, left = lanes - right;
    for (int i = 0; i < kLanes<A>; ++i) {
      window[columns.index[i]] += left[i];
      window[columns.index[i] + 1] += right[i];
    }
  }
};

// Adds the gradients of one key's biases in a tile to the table's, and returns those of its places:
// sums over rows of the derivatives by row (y) and column (x), in lanes. `grad(v)` is the gradient
// of row v's biases.
template <int kRegisters, typename A, typename F>
inline void bias_gradients(const A* table, A* grad_table, const TableLayout<A>& layout,
                           const TileRows<A>& rows, const TileColumns<A>& columns, int64_t count,
                           const F& grad, Vec<A>* grad_y, Vec<A>* grad_x) {
  const Tents<kRegisters, A> tents(columns);
  Vec<A> sum_y = {}, sum_x = {};
  // What rows so far have left for the table's row `waiting`, which later rows may add to.
  Vec<A> rest = {};
  int32_t waiting = rows.low[0];
  int64_t cell = layout.cell(waiting, columns.first);
  RowValues<A> high = interpolate<kRegisters>(table + cell, columns);
  for (int64_t v = 0; v < count;) {
    const int32_t row = rows.low[v];
    Vec<A> sum = {}, sum_high = {};
    for (; v < count && rows.low[v] == row; ++v) {
      const Vec<A> g = grad(v);
      sum += g;
      sum_high += rows.fraction[v] * g;
    }
    if (row != waiting) {
      tents.add(rest, columns, grad_table + cell);
      rest = Vec<A>{};
      cell = layout.cell(row, columns.first);
      high = interpolate<kRegisters>(table + cell, columns);
    }
    const RowValues<A> low = high;
    tents.add(rest + (sum - sum_high), columns, grad_table + cell);
    cell += layout.stride;
    high = interpolate<kRegisters>(table + cell, columns);
    sum_y += sum * (high.value - low.value);
    sum_x += (sum - sum_high) * low.slope + sum_high * high.slope;
    rest = sum_high;
    waiting = row + 1;
  }
  tents.add(rest, columns, grad_table + cell);
  *grad_y = sum_y;
  *grad_x = sum_x;
}

}  // namespace MMDEFORM_CPU_NAMESPACE
}  // namespace mmdeform
