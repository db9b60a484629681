// What forward and backward share: chunks of a row, sums over its threads, dropout.
#pragma once

#include <device.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../equation.h"
#include "policy.h"

namespace fusednorm::cuda {

// The adjacent elements of T in 16 bytes: what a thread reads and writes at a time.
template <class T>
constexpr int chunk = 16 / int(sizeof(T));

template <class T>
DEVICE void to_floats(const Words& from, float (&to)[chunk<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      to[i] = as_float(from.at[i]);
    else
      unpack<T>(from.at[i], to[2 * i], to[2 * i + 1]);
  }
}

template <class T>
DEVICE Words from_floats(const float (&from)[chunk<T>]) {
  Words to;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      to.at[i] = as_bits(from[i]);
    else
      to.at[i] = pack<T>(from[2 * i], from[2 * i + 1]);
  }
  return to;
}

inline bool starts_vector(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether every row of a call can be read and written in aligned vectors of 16 bytes.
inline bool have_vectors(const Problem& p, std::initializer_list<Rows> all) {
  for (const Rows& rows : all) {
    if (rows.data == nullptr) continue;
    const int64_t step = rows.dtype == DType::f32 ? 4 : 8;
    if (p.cols % step || rows.stride % step || !starts_vector(rows.data)) return false;
  }
  return starts_vector(p.weight.data) && starts_vector(p.bias.data);
}

// A chunk of a row that ends after `left` elements, 0 beyond. VECTORS: the chunk is there as a
// whole or not at all.
template <class T, bool VECTORS>
DEVICE Words load_chunk(const T* from, int left) {
  Words value = {};
  if constexpr (VECTORS) {
    if (left > 0) value = load_once(reinterpret_cast<const Words*>(from));
  } else {
    constexpr int per_word = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) {
      if (i >= left) continue;
      uint32_t& word = value.at[i / per_word];
      if constexpr (sizeof(T) == 4)
        word = load(reinterpret_cast<const uint32_t*>(from + i));
      else
        word |= uint32_t(load(reinterpret_cast<const uint16_t*>(from + i))) << i % 2 * 16;
    }
  }
  return value;
}

template <class T, bool VECTORS>
DEVICE void store_chunk(T* to, int left, const Words& value) {
  if constexpr (VECTORS) {
    if (left > 0) store(reinterpret_cast<Words*>(to), value);
  } else {
    constexpr int per_word = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) {
      if (i >= left) continue;
      const uint32_t word = value.at[i / per_word];
      if constexpr (sizeof(T) == 4)
        store(reinterpret_cast<uint32_t*>(to + i), word);
      else
        store(reinterpret_cast<uint16_t*>(to + i), uint16_t(word >> i % 2 * 16));
    }
  }
}

// A parameter as a kernel of rows of T takes it: of their dtype, float32, or absent.
struct Parameter {
  enum Kind : int { absent, own, wide };

  Parameter(const Term& term, DType rows)
      : data(term.data),
        kind(!term.data           ? absent
             : term.dtype == rows ? own
                                  : wide) {}

  const void* data;
  Kind kind;
};

// The parameter of the chunk at `col` of a row that ends after `left` elements: `absent` where
// there is none, 0 beyond the row.
template <class T, bool VECTORS>
DEVICE void load_parameter(const Parameter& from, int col, int left, float absent,
                           float (&to)[chunk<T>]) {
  const T* const own = static_cast<const T*>(from.data) + col;
  const float* const wide = static_cast<const float*>(from.data) + col;
  if (VECTORS && from.kind == Parameter::own) {
    Words words = {};
    if (left > 0) words = load(reinterpret_cast<const Words*>(own));
    to_floats<T>(words, to);
  } else if (VECTORS && from.kind == Parameter::wide) {
#pragma unroll
    for (int i = 0; i < chunk<T>; i += 4) {
      Words words = {};
      if (left > 0) words = load(reinterpret_cast<const Words*>(wide + i));
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = as_float(words.at[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) {
      to[i] = i < left ? absent : 0.0f;
      if (i >= left || from.kind == Parameter::absent) continue;
      if constexpr (sizeof(T) == 2) {
        if (from.kind == Parameter::own) {
          float unused;
          unpack<T>(load(reinterpret_cast<const uint16_t*>(own + i)), to[i], unused);
          continue;
        }
      }
      to[i] = load(wide + i);
    }
  }
}

template <class T>
DEVICE T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// The columns of a row that a block has.
struct Span {
  int begin, end;
};

// What one of `blocks` blocks has of a row: whole chunks, as evenly as they go.
template <class T>
constexpr int width_of(int64_t cols, int blocks) {
  return int((cols + blocks - 1) / blocks + chunk<T> - 1) / chunk<T> * chunk<T>;
}
DEVICE Span span_of(int cols, int rank, int width) {
  const int begin = rank * width < cols ? rank * width : cols;
  return {begin, begin + width < cols ? begin + width : cols};
}

// One of the groups of threads that share a row, as one of its threads sees it. Its chunks are
// `step` columns apart: those of adjacent threads are adjacent. CERTAIN: the elements of a thread
// that every row has.
template <int THREADS, int CERTAIN, class T>
struct Group {
  Span span;

  DEVICE int threads() const { return THREADS <= 32 ? THREADS : block_threads(); }
  DEVICE int index() const { return THREADS <= 32 ? unsigned(thread_index()) / THREADS : 0; }
  DEVICE int lane() const {
    return THREADS <= 32 ? unsigned(thread_index()) % THREADS : thread_index();
  }
  DEVICE int step() const { return threads() * chunk<T>; }
  DEVICE int col(int k) const { return span.begin + lane() * chunk<T> + k * step(); }
  // The elements that the row has from the k-th chunk on.
  DEVICE int left(int k) const {
    return (k + 1) * chunk<T> <= CERTAIN ? chunk<T> : span.end - col(k);
  }
  // Whether no thread of the warp has a k-th chunk: where some row may end before it, once for 8
  // elements.
  DEVICE bool ends_before(int k) const {
    const bool tested = k * chunk<T> % 8 == 0 && k * chunk<T> >= CERTAIN + (THREADS > 32 ? 0 : 8);
    if (CERTAIN == 0 || !tested) return false;
    const int warp = THREADS > 32 ? unsigned(thread_index()) / 32 * 32 * chunk<T> : 0;
    return span.begin + warp + k * step() >= span.end;
  }
};

// total / count, rounded as a division rounds it, from inverse = 1 / count.
DEVICE float divide(float total, float count, float inverse) {
  const float quotient = total * inverse;
  return multiply_add(multiply_add(-quotient, count, total), inverse, quotient);
}

template <int K>
DEVICE void add_lanes(float (&values)[K], int lanes) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (float& value : values) value += shuffle_xor(value, mask);
  }
}

// Adds up K values over a row's threads, those of the whole cluster where SPLIT, in an order that
// depends on their number alone. `slots` is shared memory for 2 * K * warps floats: two sums in a
// row do not meet there, so that one barrier a sum is enough.
template <int THREADS, bool SPLIT, int K>
DEVICE void add_up(float (&values)[K], float* slots, int& phase) {
  add_lanes(values, THREADS < 32 ? THREADS : 32);
  if constexpr (THREADS > 32) {
    constexpr unsigned most = THREADS / 32;
    const unsigned warp = unsigned(thread_index()) / 32, lane = unsigned(thread_index()) % 32;
    const unsigned warps = unsigned(block_threads()) / 32;
    float* mine = slots + phase * K * most;
    phase ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) shared_store(mine + k * most + warp, values[k]);
    }
    if constexpr (SPLIT) {
      sync_cluster();
#pragma unroll
      for (int k = 0; k < K; ++k) {
        values[k] = 0.0f;
#pragma unroll 1
        for (unsigned i = lane; i < most * cluster_size(); i += 32)
          if (i % most < warps) values[k] += peer_load(mine + k * most + i % most, i / most);
      }
      add_lanes(values, 32);
    } else {
      sync_block();
      const unsigned other = lane % most;
#pragma unroll
      for (int k = 0; k < K; ++k)
        values[k] = other < warps ? shared_load(mine + k * most + other) : 0.0f;
      add_lanes(values, most);
    }
  }
}

// What dropout multiplies the chunk at `col` by: 0 or 1 / (1 - p). Philox 4x32-10 of Salmon et al.,
// *Parallel random numbers: as easy as 1, 2, 3*, 2011.
template <int COLS>
DEVICE void keep_factors(const Dropout& dropout, int64_t row, int col, float (&keep)[COLS]) {
  const uint64_t seed = load(dropout.seed);
#pragma unroll
  for (int quad = 0; quad < COLS / 4; ++quad) {
    uint32_t c0 = col / 4 + quad, c1 = uint32_t(row), c2 = uint32_t(row >> 32), c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
      c0 = uint32_t(b >> 32) ^ c1 ^ k0;
      c2 = uint32_t(a >> 32) ^ c3 ^ k1;
      c1 = uint32_t(b);
      c3 = uint32_t(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint32_t words[4] = {c0, c1, c2, c3};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      keep[quad * 4 + i] = words[i] < dropout.drop_below ? 0.0f : float(dropout.inverse_keep);
  }
}

constexpr const char* too_long = "the row is too long for the CUDA kernels of this device";

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(T()) with the type of a row's elements.
template <class F>
const char* with_type(DType rows, F&& f) {
  if (rows == DType::f32) return f(float());
  return rows == DType::bf16 ? f(BFloat16()) : f(Float16());
}

// Calls f with the tier's index as a type: f(std::integral_constant<int, index>).
template <int COUNT, int INDEX = 0, class F>
const char* with_tier(int index, F&& f) {
  if constexpr (INDEX + 1 < COUNT)
    if (index != INDEX) return with_tier<COUNT, INDEX + 1>(index, f);
  return f(std::integral_constant<int, INDEX>());
}

}  // namespace fusednorm::cuda
