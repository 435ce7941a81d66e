// See dat_attn.h. Compiled once per instruction set.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/dat_attn_tile.h"

namespace mmdeform {
namespace MMDEFORM_CPU_NAMESPACE {
namespace {

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
