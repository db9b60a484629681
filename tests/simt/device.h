// A host in place of a GPU, with the names and the meaning of csrc/cuda/gpu/device.h: machine.cpp
// runs the threads of a block one after another and checks what they do. What a GPU would not
// forgive makes `launch` return a message.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define DEVICE inline
#define KERNEL(threads, blocks) void
#define PARAMETER(type) const type

namespace fusednorm::cuda {

constexpr bool can_split = true;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct alignas(16) Words {
  uint32_t at[4];
};

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
  bool dependent = false;
};

struct Processors {
  int count;
  int shared_bytes;
  bool have_clusters;
};

// Global memory of a launch. A kernel may read what is not written, or write what is; an access
// lies in one row. Call for_each_buffer(parameter, f), found beside the type of the parameter,
// calls f with each of them.
struct Buffer {
  const char* name;
  const void* data;
  int64_t rows;
  int64_t row_bytes;
  int64_t stride_bytes;
  bool written;
};

namespace simt {

struct Place {
  int thread;
  int rank;  // in the cluster
  int64_t block;
};

extern const Place* here;  // of the thread that runs
extern Launch running;

int resident_clusters(const Launch& how);
const char* run(const std::vector<Buffer>& buffers, const Launch& how,
                const std::function<void()>& thread);
Processors device();

float shuffle_xor(float value, int mask);
void sync_block();
void sync_cluster();

void check_load(const char* what, const void* from, int bytes);
void check_partial(const void* from, int bytes);
void check_store(const void* to, int bytes);
char* shared_memory();
void check_shared_load(const char* what, const void* from, int bytes);
void check_shared_store(const void* to, int bytes);
const void* peer(const void* mine, int bytes, int rank);
void copy_async(void* to, const void* from, bool present);
void commit_copies();
void wait_for_copies(int groups);
void wait_for_previous_kernel();

template <class V>
V read(const void* from) {
  static_assert(sizeof(V) % 2 == 0, "memory is followed in units of two bytes");
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace simt

DEVICE float as_float(uint32_t bits) { return simt::read<float>(&bits); }
DEVICE uint32_t as_bits(float value) { return simt::read<uint32_t>(&value); }

namespace simt {

inline float widen(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }
inline float widen(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
  // Infinity and NaN keep their exponent; that of others differs by 112, also below the normal
  // ones.
  if (magnitude >= 0x0f800000u) return as_float(sign | 0x70000000u | magnitude);
  return as_float(sign | as_bits(as_float(magnitude) * 0x1p112f));
}

// The bits above `cut`, rounded to nearest even.
inline uint32_t rounded(uint32_t bits, int cut) {
  return (bits + (1u << (cut - 1)) - 1 + (bits >> cut & 1)) >> cut;
}
// A GPU has one NaN.
template <class T>
uint16_t narrow(float value);
template <>
inline uint16_t narrow<BFloat16>(float value) {
  return uint16_t(std::isnan(value) ? 0x7fff : rounded(as_bits(value), 16));
}
template <>
inline uint16_t narrow<Float16>(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t sign = as_bits(value) >> 16 & 0x8000u, bits = as_bits(value) & 0x7fffffffu;
  uint32_t magnitude;
  if (bits >= 0x47800000u)  // 2^16
    magnitude = 0x7c00;
  else if (bits < 0x38800000u)  // 2^-14: the last bit of a float near 0.5 is that of all these
    magnitude = as_bits(as_float(bits) + 0.5f) - as_bits(0.5f);
  else
    magnitude = rounded(bits - (112u << 23), 13);  // may round up to infinity
  return uint16_t(sign | magnitude);
}

}  // namespace simt

template <class T>
DEVICE void unpack(uint32_t word, float& low, float& high) {
  low = simt::widen(T{uint16_t(word)});
  high = simt::widen(T{uint16_t(word >> 16)});
}
template <class T>
DEVICE uint32_t pack(float low, float high) {
  return simt::narrow<T>(low) | uint32_t(simt::narrow<T>(high)) << 16;
}

template <class V>
DEVICE V* settled(V* pointer) {
  return pointer;
}
DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
// A number next to the exact one, as of a GPU, and always the larger.
namespace simt {
inline float above(double exact) {
  const float nearest = float(exact);
  return nearest < exact ? std::nextafter(nearest, INFINITY) : nearest;
}
}  // namespace simt
DEVICE float reciprocal(float value) { return simt::above(1.0 / value); }
DEVICE float inverse_sqrt(float value) { return simt::above(1.0 / std::sqrt(double(value))); }

DEVICE int thread_index() { return simt::here->thread; }
DEVICE int block_threads() { return simt::running.threads; }
DEVICE int64_t block_index() { return simt::here->block; }
DEVICE int cluster_size() { return simt::running.cluster; }
DEVICE int64_t cluster_index() { return simt::here->block / simt::running.cluster; }
DEVICE int rank_in_cluster() { return simt::here->rank; }

DEVICE float shuffle_xor(float value, int mask) { return simt::shuffle_xor(value, mask); }
DEVICE void sync_block() { simt::sync_block(); }
DEVICE void sync_cluster() { simt::sync_cluster(); }

template <class V>
DEVICE V load(const V* from) {
  simt::check_load("load", from, sizeof(V));
  return simt::read<V>(from);
}
DEVICE Words load_once(const Words* from) {
  simt::check_load("load_once", from, sizeof(Words));
  return simt::read<Words>(from);
}
DEVICE float load_partial(const float* from) {
  simt::check_partial(from, sizeof(float));
  return simt::read<float>(from);
}
template <class V>
DEVICE void store(V* to, V value) {
  simt::check_store(to, sizeof(V));
  std::memcpy(static_cast<void*>(to), &value, sizeof value);
}

template <class V>
DEVICE V* shared(int byte) {
  return reinterpret_cast<V*>(simt::shared_memory() + byte);
}
template <class V>
DEVICE V shared_load(const V* from) {
  simt::check_shared_load("shared_load", from, sizeof(V));
  return simt::read<V>(from);
}
template <class V>
DEVICE void shared_store(V* to, V value) {
  simt::check_shared_store(to, sizeof(V));
  std::memcpy(static_cast<void*>(to), &value, sizeof value);
}
DEVICE float peer_load(const float* mine, int rank) {
  return simt::read<float>(simt::peer(mine, sizeof(float), rank));
}

DEVICE void copy_async(Words* to, const Words* from, bool present) {
  simt::copy_async(to, from, present);
}
DEVICE void commit_copies() { simt::commit_copies(); }
template <int K>
DEVICE void wait_for_copies() {
  simt::wait_for_copies(K);
}

DEVICE void launch_dependents() {}
DEVICE void wait_for_previous_kernel() { simt::wait_for_previous_kernel(); }

using Stream = const void*;

inline const char* processors(Processors& found) {
  found = simt::device();
  return nullptr;
}

template <class P>
const char* resident_clusters(void (*kernel)(P), const Launch& how, int& found) {
  found = simt::resident_clusters(how);
  return nullptr;
}

template <class P>
const char* launch(void (*kernel)(P), const P& parameter, const Launch& how, Stream stream) {
  std::vector<Buffer> buffers;
  for_each_buffer(parameter, [&](const Buffer& buffer) {
    if (buffer.data) buffers.push_back(buffer);
  });
  return simt::run(buffers, how, [&] { kernel(parameter); });
}

}  // namespace fusednorm::cuda

#include "buffers.h"
