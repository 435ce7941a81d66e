// How the kernels of deformable attention hold queries and keys. Neighbouring threads own
// neighbouring queries (or keys), as they lie in memory; what they meet one after another lies in
// tiles in shared memory.

#pragma once

#include "cuda/dat_attn.cuh"

namespace mmdeform {

// The channels of a query or key that one of kLanes neighbouring threads holds in registers. The
// lanes' vectors alternate, so that they read a row of shared memory from different banks. Channels
// from Dh on are zeros.
template <typename A, int kLanes>
struct DatAttnChannels {
  static constexpr int kVector = kVectorBytes / sizeof(A);
  static constexpr int kVectors = 8;
  static constexpr int kChannels = kLanes * kVectors * kVector;  // of all lanes
  static constexpr int kOwners = kDatAttnThreads / kLanes;       // queries or keys of a block
  // A tile in shared memory: one row for each of several keys or queries. The vector behind a row
  // keeps writes of one channel of many rows from falling into the same bank.
  static constexpr int kRowVectors = kLanes * kVectors + 1;
  static constexpr int kTileRows = kLanes <= 2 ? 32 : 64 / kLanes;
  static constexpr int kTileVectors = kTileRows * kRowVectors;
  using TileVector = Vector<A, kVector>;

  A data[kVectors][kVector];

  __device__ static int lane() { return threadIdx.x % kLanes; }
  __device__ static int channel(int v, int i) { return (v * kLanes + lane()) * kVector + i; }

  __device__ DatAttnChannels() : data{} {}

  // Channels of item `index` of `count` that lie side by side: head[channel * count + index].
  template <typename T>
  __device__ DatAttnChannels(const T* head, int Dh, int64_t count, int64_t index) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int c = channel(v, i);
        data[v][i] = index < count && c < Dh ? static_cast<A>(head[c * count + index]) : A(0);
      }
    }
  }

  template <typename T>
  __device__ void store(T* head, int Dh, int64_t count, int64_t index, A factor) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int c = channel(v, i);
        if (index < count && c < Dh) head[c * count + index] = static_cast<T>(data[v][i] * factor);
      }
    }
  }

  // Dot product with a row of a tile; every lane gets it. All lanes of the warp must take part. One
  // sum for each element of a vector: additions to a single one would wait for each other.
  __device__ A dot(const TileVector* row) const {
    A sums[kVector] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const TileVector vector = row[v * kLanes + lane()];
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += data[v][i] * vector.data[i];
    }
#pragma unroll
    for (int i = 1; i < kVector; ++i) sums[0] += sums[i];
    return sum_over_lanes(sums[0], kLanes);
  }

  __device__ void add(A weight, const TileVector* row) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const TileVector vector = row[v * kLanes + lane()];
#pragma unroll
      for (int i = 0; i < kVector; ++i) data[v][i] += weight * vector.data[i];
    }
  }

  __device__ void add(A weight, const DatAttnChannels& other) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) data[v][i] += weight * other.data[v][i];
    }
  }

  __device__ void scale(A factor) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) data[v][i] *= factor;
    }
  }

  // Fills a tile with items from `first` on, zeros behind the last of `count`.
  template <typename T>
  __device__ static void load_tile(const T* head, int Dh, int64_t count, int64_t first,
                                   TileVector* tile) {
    A* const elements = reinterpret_cast<A*>(tile);
    for (int i = threadIdx.x; i < kTileRows * kChannels; i += kDatAttnThreads) {
      const int row = i % kTileRows, c = i / kTileRows;
      const bool exists = first + row < count && c < Dh;
      elements[row * kRowVectors * kVector + c] =
          exists ? static_cast<A>(head[c * count + first + row]) : A(0);
    }
  }
};

// What threads that own queries meet: keys and values, in shared memory.
template <typename T, int kLanes>
struct DatAttnKeyTile {
  using A = accumulation_t<T>;
  using Channels = DatAttnChannels<A, kLanes>;

  typename Channels::TileVector keys[Channels::kTileVectors];
  typename Channels::TileVector values[Channels::kTileVectors];
  A positions[Channels::kTileRows * 2];

  // Loads keys from `first` on and returns their number. Between two barriers: all threads are done
  // with what was there before, and all have loaded their part.
  __device__ int load(const DatAttnInputs<T>& in, int head, int first) {
    __syncthreads();
    Channels::load_tile(in.key + in.key_head(head), in.Dh, in.Ns, first, keys);
    Channels::load_tile(in.value + in.key_head(head), in.Dh, in.Ns, first, values);
    const int count = min(Channels::kTileRows, in.Ns - first);
    const A* source = in.head_positions(head) + static_cast<int64_t>(first) * 2;
    for (int i = threadIdx.x; i < count * 2; i += kDatAttnThreads) positions[i] = source[i];
    __syncthreads();
    return count;
  }

  __device__ const typename Channels::TileVector* key(int n) const {
    return keys + n * Channels::kRowVectors;
  }
  __device__ const typename Channels::TileVector* value(int n) const {
    return values + n * Channels::kRowVectors;
  }
  __device__ A y(int n) const { return positions[2 * n]; }
  __device__ A x(int n) const { return positions[2 * n + 1]; }
};

// A query that kLanes neighbouring threads own: its place, its bias to any key.
template <typename T, int kLanes>
struct DatAttnQuery {
  using A = accumulation_t<T>;
  using Channels = DatAttnChannels<A, kLanes>;

  int head, index;  // index >= in.queries(): none, computed but not stored
  A y, x;

  __device__ DatAttnQuery(const DatAttnInputs<T>& in, int head, int first)
      : head(head), index(first + threadIdx.x / kLanes) {
    const int i = index / in.W;
    y = in.query_position(i, in.H);
    x = in.query_position(index - i * in.W, in.W);
  }

  __device__ bool exists(const DatAttnInputs<T>& in) const { return index < in.queries(); }

  __device__ Channels load(const DatAttnInputs<T>& in, const T* tensor) const {
    return Channels(tensor + in.query_head(head), in.Dh, in.queries(), index);
  }

  __device__ void store(const DatAttnInputs<T>& in, const Channels& channels, A factor,
                        T* tensor) const {
    channels.store(tensor + in.query_head(head), in.Dh, in.queries(), index, factor);
  }

  // Where a number per query lies.
  __device__ int64_t number(const DatAttnInputs<T>& in) const {
    return static_cast<int64_t>(head) * in.queries() + index;
  }

  // The logit of a key of the tile. All lanes of the warp must take part.
  __device__ A logit(const DatAttnInputs<T>& in, const Channels& query,
                     const DatAttnKeyTile<T, kLanes>& tile, int n) const {
    const DatAttnBias<A> bias(in.head_table(head), in.Th, in.Tw, y, x, tile.y(n), tile.x(n));
    return in.scale * query.dot(tile.key(n)) + bias.value();
  }
};

// Blocks of queries that make up a head.
template <typename T, int kLanes>
__host__ __device__ int dat_attn_query_blocks(const DatAttnInputs<T>& in) {
  constexpr int kOwners = DatAttnQuery<T, kLanes>::Channels::kOwners;
  return in.queries() / kOwners + (in.queries() % kOwners != 0);
}

}  // namespace mmdeform
