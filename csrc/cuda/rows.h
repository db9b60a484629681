// What forward and backward share: chunks of a row, sums over its threads, dropout.
#pragma once

#include <device.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../equation.h"
#include "policy.h"

namespace fusednorm::cuda {

// Adjacent elements of T as they lie in memory.
template <class T>
struct Chunk {
  static constexpr int per_words = 16 / sizeof(T);
  static constexpr int size = chunk / per_words;
  Words at[size];
};

template <class T>
DEVICE void to_floats(const Chunk<T>& from, float (&to)[chunk]) {
#pragma unroll
  for (int i = 0; i < chunk * int(sizeof(T)) / 4; ++i) {
    const uint32_t word = from.at[i / 4].at[i % 4];
    if constexpr (sizeof(T) == 4)
      to[i] = as_float(word);
    else
      unpack<T>(word, to[2 * i], to[2 * i + 1]);
  }
}

template <class T>
DEVICE void forget(Chunk<T>& value) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (uint32_t& word : value.at[0].at) forget(word);
  }
}

template <class T>
DEVICE Chunk<T> from_floats(const float (&from)[chunk]) {
  Chunk<T> to;
#pragma unroll
  for (int i = 0; i < chunk * int(sizeof(T)) / 4; ++i) {
    uint32_t& word = to.at[i / 4].at[i % 4];
    if constexpr (sizeof(T) == 4)
      word = as_bits(from[i]);
    else
      word = pack<T>(from[2 * i], from[2 * i + 1]);
  }
  return to;
}

// What a row gives a block: the columns from `begin` to `end`, in vectors of 16 bytes or one by
// one.
struct Span {
  int begin, end;
  bool vectors;
};

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

// The elements at `col`; 0 beyond the span.
template <class T, bool ONCE>
DEVICE Chunk<T> load_chunk(const T* row, int col, const Span& span) {
  Chunk<T> value = {};
  if (span.vectors) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::size; ++i) {
      const int at = col + i * Chunk<T>::per_words;
      if (at >= span.end) continue;
      const Words* from = reinterpret_cast<const Words*>(row + at);
      value.at[i] = ONCE ? load_once(from) : load(from);
    }
  } else {
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      if (col + i >= span.end) continue;
      constexpr int per_word = 4 / sizeof(T);
      uint32_t& word = value.at[i / Chunk<T>::per_words].at[i / per_word % 4];
      if constexpr (sizeof(T) == 4)
        word = load(reinterpret_cast<const uint32_t*>(row + col + i));
      else
        word |= uint32_t(load(reinterpret_cast<const uint16_t*>(row + col + i))) << i % 2 * 16;
    }
  }
  return value;
}

template <class T>
DEVICE void store_chunk(T* row, int col, const Span& span, const Chunk<T>& value) {
  if (span.vectors) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::size; ++i) {
      const int at = col + i * Chunk<T>::per_words;
      if (at < span.end) store(reinterpret_cast<Words*>(row + at), value.at[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      if (col + i >= span.end) continue;
      constexpr int per_word = 4 / sizeof(T);
      const uint32_t word = value.at[i / Chunk<T>::per_words].at[i / per_word % 4];
      if constexpr (sizeof(T) == 4)
        store(reinterpret_cast<uint32_t*>(row + col + i), word);
      else
        store(reinterpret_cast<uint16_t*>(row + col + i), uint16_t(word >> i % 2 * 16));
    }
  }
}

// The parameter at `col` as floats; `value` where it is absent.
template <class W>
DEVICE void load_parameter(const Term& term, int col, const Span& span, float value,
                           float (&to)[chunk]) {
  if (term.data == nullptr) {
#pragma unroll
    for (float& element : to) element = value;
  } else {
    to_floats(load_chunk<W, false>(static_cast<const W*>(term.data), col, span), to);
  }
}

template <class T>
DEVICE T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// One of the groups of threads that share a row, as one of its threads sees it.
template <int THREADS>
struct Group {
  static constexpr int warps = (THREADS + 31) / 32;

  DEVICE int index() const { return thread_index() / THREADS; }
  DEVICE int lane() const { return thread_index() % THREADS; }
  // The first column of its k-th chunk: those of adjacent threads are adjacent.
  DEVICE int col(const Span& span, int k) const {
    return span.begin + (k * THREADS + lane()) * chunk;
  }
};

// Adds up K values over a row's threads, in an order that depends on their number alone. `slots` is
// shared memory for 2 * K * warps floats: two sums in a row do not meet there, so that one barrier
// a sum is enough.
template <int THREADS, bool SPLIT, int K>
DEVICE void add_up(float (&values)[K], float* slots, int& phase) {
  constexpr int warps = Group<THREADS>::warps;
#pragma unroll
  for (int mask = (THREADS < 32 ? THREADS : 32) / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (float& value : values) value += shuffle_xor(value, mask);
  }
  if constexpr (THREADS > 32) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    float* mine = slots + phase * K * warps;
    phase ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) shared_store(mine + k * warps + warp, values[k]);
    }
    if constexpr (SPLIT)
      sync_cluster();
    else
      sync_block();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float sum = 0.0f;
      if constexpr (SPLIT) {
        for (int i = lane; i < warps * cluster_size(); i += 32)
          sum += peer_load(mine + k * warps + i % warps, i / warps);
      } else if (lane < warps) {
        sum = shared_load(mine + k * warps + lane);
      }
      values[k] = sum;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
      for (float& value : values) value += shuffle_xor(value, mask);
    }
  }
}

// What dropout multiplies the chunk at `col` by: 0 or 1 / (1 - p). Philox 4x32-10 of Salmon et al.,
// *Parallel random numbers: as easy as 1, 2, 3*, 2011.
DEVICE void keep_factors(const Dropout& dropout, int64_t row, int col, float (&keep)[chunk]) {
  const uint64_t seed = load(dropout.seed);
#pragma unroll
  for (int quad = 0; quad < chunk / 4; ++quad) {
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

// What block `rank` of `blocks` has of a row: whole chunks, as evenly as they go.
DEVICE Span span_of(int64_t cols, int rank, int blocks, bool vectors) {
  const int total = int(cols);
  const int width = ((total + blocks - 1) / blocks + chunk - 1) / chunk * chunk;
  const int begin = rank * width < total ? rank * width : total;
  return {begin, begin + width < total ? begin + width : total, vectors};
}

constexpr const char* too_long = "the row is too long for the CUDA kernels of this device";

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with the element types of a call as arguments: f(rows, parameters).
template <class F>
const char* with_types(DType rows, DType parameters, F&& f) {
  if (rows == DType::f32) return f(float(), float());
  if (rows == DType::bf16)
    return parameters == DType::f32 ? f(BFloat16(), float()) : f(BFloat16(), BFloat16());
  return parameters == DType::f32 ? f(Float16(), float()) : f(Float16(), Float16());
}

// Calls f with the tier's index as a type: f(std::integral_constant<int, index>).
template <int COUNT, int INDEX = 0, class F>
const char* with_tier(int index, F&& f) {
  if constexpr (INDEX + 1 < COUNT)
    if (index != INDEX) return with_tier<COUNT, INDEX + 1>(index, f);
  return f(std::integral_constant<int, INDEX>());
}

inline DType parameter_dtype(const Problem& p, DType rows) {
  return p.weight.data ? p.weight.dtype : p.bias.data ? p.bias.dtype : rows;
}

}  // namespace fusednorm::cuda
