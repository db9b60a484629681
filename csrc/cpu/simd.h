// Vectors of the compute type C, and how the element types are loaded into and stored from them.
//
// Every level compiles this file with flags of its own. Nothing here or in the kernels may have
// external linkage or instantiate a template of the standard library: the linker would keep one
// copy for all levels, and a processor could meet instructions that it does not have.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

template <class T, int n>
struct VectorType {
  typedef T type __attribute__((vector_size(sizeof(T) * n)));
};
template <class T, int n>
using VectorOf = typename VectorType<T, n>::type;

template <class C>
constexpr int lanes = register_bytes / sizeof(C);
template <class C>
using Vector = VectorOf<C, lanes<C>>;

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class To, class From>
ALWAYS_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

template <class V, class T>
ALWAYS_INLINE V load_bits(const T* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

// Multiplies and adds with one rounding, on every level that has the instruction.
ALWAYS_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return Vector<float>(_mm512_fmadd_ps(a, b, c));
#elif defined(__FMA__)
  return Vector<float>(_mm256_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
  return Vector<float>(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}
ALWAYS_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return Vector<double>(_mm512_fmadd_pd(a, b, c));
#elif defined(__FMA__)
  return Vector<double>(_mm256_fmadd_pd(a, b, c));
#elif defined(__aarch64__)
  return Vector<double>(vfmaq_f64(float64x2_t(c), float64x2_t(a), float64x2_t(b)));
#else
  return a * b + c;
#endif
}

template <int n>
ALWAYS_INLINE VectorOf<float, n> widen(VectorOf<uint16_t, n> bits, bf16) {
  using Words = VectorOf<uint32_t, n>;
#if defined(__AVX512F__)
  // One instruction moves each word to the upper half of its lane, where widening and shifting are
  // two.
  if constexpr (n == 16) {
    const __m512i source =
        _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                         7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    const __m512i words = _mm512_castsi256_si512(bits_as<__m256i>(bits));
    return bits_as<VectorOf<float, n>>(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, source, words));
  }
#endif
  return bits_as<VectorOf<float, n>>(__builtin_convertvector(bits, Words) << 16);
}

template <int n>
ALWAYS_INLINE VectorOf<uint16_t, n> narrow(VectorOf<float, n> value, bf16) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zeros.
  if constexpr (n == 16) {
    constexpr int subnormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(value, subnormal) == 0, 1))
      return bits_as<VectorOf<uint16_t, n>>(_mm512_cvtneps_pbh(value));
  }
#endif
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    const __m512i bits = bits_as<__m512i>(value);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half =
        _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7FFF), is_odd, _mm512_set1_epi32(0x8000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i nearest_even =
        _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), is_nan, _mm512_set1_epi32(0x7FC00000));
    const __m512i upper_words =
        _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return bits_as<VectorOf<uint16_t, n>>(
        _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper_words, nearest_even)));
  }
#endif
  using Words = VectorOf<uint32_t, n>;
  const Words bits = bits_as<Words>(value);
  const Words nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  // Adding to a NaN could make an infinity of it.
  const Words is_nan = Words(value != value);
  return __builtin_convertvector((nearest_even & ~is_nan) | (0x7FC0 & is_nan),
                                 VectorOf<uint16_t, n>);
}

template <int n>
ALWAYS_INLINE VectorOf<float, n> widen(VectorOf<uint16_t, n> bits, f16) {
#if defined(__AVX512F__)
  if constexpr (n == 16) return VectorOf<float, n>(_mm512_cvtph_ps(bits_as<__m256i>(bits)));
#endif
#if defined(__F16C__)
  if constexpr (n == 8) return VectorOf<float, n>(_mm256_cvtph_ps(bits_as<__m128i>(bits)));
#endif
#if defined(__aarch64__)
  if constexpr (n == 4) return VectorOf<float, n>(vcvt_f32_f16(bits_as<float16x4_t>(bits)));
#endif
  using Words = VectorOf<uint32_t, n>;
  using Floats = VectorOf<float, n>;
  const Words words = __builtin_convertvector(bits, Words);
  const Words sign = (words & 0x8000) << 16;
  const Words magnitude = words & 0x7FFF;
  // Exponents are 112 apart; multiplying by 2^112 also makes subnormal numbers normal.
  const Words scaled = bits_as<Words>(bits_as<Floats>(magnitude << 13) * 0x1p112f);
  const Words special = Words(magnitude >= 0x7C00) & 0x7F800000;
  return bits_as<Floats>(scaled | special | sign);
}

template <int n>
ALWAYS_INLINE VectorOf<uint16_t, n> narrow(VectorOf<float, n> value, f16) {
#if defined(__AVX512F__)
  if constexpr (n == 16)
    return bits_as<VectorOf<uint16_t, n>>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  if constexpr (n == 8)
    return bits_as<VectorOf<uint16_t, n>>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__aarch64__)
  if constexpr (n == 4) return bits_as<VectorOf<uint16_t, n>>(vcvt_f16_f32(float32x4_t(value)));
#endif
  using Words = VectorOf<uint32_t, n>;
  using Floats = VectorOf<float, n>;
  const Words bits = bits_as<Words>(value);
  const Words sign = (bits >> 16) & 0x8000;
  const Words magnitude = bits & 0x7FFFFFFF;
  const Words rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  const Words normal = (rounded - (112u << 23)) >> 13;
  // Below 2^-14 the spacing is 2^-24, that of floats around 1/2.
  const Words subnormal = bits_as<Words>(bits_as<Floats>(magnitude) + 0.5f) - 0x3F000000;
  const Words is_small = Words(magnitude < (113u << 23));
  const Words is_large = Words(rounded >= (143u << 23));
  const Words is_nan = Words(magnitude > 0x7F800000);
  const Words finite = (subnormal & is_small) | (normal & ~is_small);
  const Words infinite = (0x7C00 & ~is_nan) | (0x7E00 & is_nan);
  return __builtin_convertvector((finite & ~is_large) | (infinite & is_large) | sign,
                                 VectorOf<uint16_t, n>);
}

// Loads a vector of C from lanes<C> elements of type T.
template <class C, class T>
ALWAYS_INLINE Vector<C> load(const T* from) {
  constexpr int n = lanes<C>;
  if constexpr (sizeof(T) == 2) {
    const auto value = widen<n>(load_bits<VectorOf<uint16_t, n>>(from), T{});
    return __builtin_convertvector(value, Vector<C>);
  } else {
    return __builtin_convertvector((load_bits<VectorOf<T, n>>(from)), Vector<C>);
  }
}

// Converts a vector of C to lanes<C> elements of type T.
template <class C, class T>
ALWAYS_INLINE auto converted(Vector<C> value) {
  constexpr int n = lanes<C>;
  if constexpr (sizeof(T) == 2) {
    // From double there is no direct way.
    return narrow<n>(__builtin_convertvector(value, VectorOf<float, n>), T{});
  } else {
    return __builtin_convertvector(value, VectorOf<T, n>);
  }
}

template <class C, class T>
ALWAYS_INLINE void store(T* to, Vector<C> value) {
  const auto bits = converted<C, T>(value);
  memcpy(to, &bits, sizeof bits);
}

// Stores past the cache, to an address that is a multiple of the size of the vector.
template <class C, class T>
ALWAYS_INLINE void stream(T* to, Vector<C> value) {
  const auto bits = converted<C, T>(value);
#if defined(__AVX512F__)
  if constexpr (sizeof bits == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits_as<__m512i>(bits));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof bits == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits_as<__m256i>(bits));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof bits == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits_as<__m128i>(bits));
#endif
  memcpy(to, &bits, sizeof bits);
}

// Makes what was streamed visible before whatever tells others that it is there.
ALWAYS_INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// How much of a vector exists: all of it, or the first `count` lanes at the end of a row.
struct Whole {};
struct Part {
  int count;
};

// Copies the first `count` of n elements; 0 to the places of the others in `padded`. A loop over
// the elements takes most of the time of a short row; one access under a mask does not.
template <int n, class T>
ALWAYS_INLINE void load_first(T (&padded)[n], const T* from, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint64_t mask = ~uint64_t(0) >> (64 - count * sizeof(T));
  if constexpr (sizeof padded == 64) {
    _mm512_storeu_si512(padded, _mm512_maskz_loadu_epi8(mask, from));
    return;
  } else if constexpr (sizeof padded == 32) {
    _mm256_storeu_epi8(padded, _mm256_maskz_loadu_epi8(__mmask32(mask), from));
    return;
  }
#endif
  memset(padded, 0, sizeof padded);
  for (int i = 0; i < count; ++i) padded[i] = from[i];
}
template <int n, class T>
ALWAYS_INLINE void store_first(T* to, const T (&padded)[n], int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint64_t mask = ~uint64_t(0) >> (64 - count * sizeof(T));
  if constexpr (sizeof padded == 64) {
    _mm512_mask_storeu_epi8(to, mask, _mm512_loadu_si512(padded));
    return;
  } else if constexpr (sizeof padded == 32) {
    _mm256_mask_storeu_epi8(to, __mmask32(mask), _mm256_loadu_epi8(padded));
    return;
  }
#endif
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}

template <class C, class T>
ALWAYS_INLINE Vector<C> load(const T* from, Whole) {
  return load<C>(from);
}
template <class C, class T>
ALWAYS_INLINE Vector<C> load(const T* from, Part part) {
  T padded[lanes<C>];
  load_first(padded, from, part.count);
  return load<C>(padded);
}

template <class C, class T>
ALWAYS_INLINE void store(T* to, Vector<C> value, Whole) {
  store<C>(to, value);
}
template <class C, class T>
ALWAYS_INLINE void store(T* to, Vector<C> value, Part part) {
  T padded[lanes<C>];
  store<C>(padded, value);
  store_first(to, padded, part.count);
}

// Returns the lanes that exist, and 0 in the others.
template <class C>
ALWAYS_INLINE Vector<C> existing(Vector<C> value, Whole) {
  return value;
}
template <class C>
ALWAYS_INLINE Vector<C> existing(Vector<C> value, Part part) {
  for (int i = part.count; i < lanes<C>; ++i) value[i] = 0;
  return value;
}

// Adds up the lanes, in pairs.
template <class C, int n>
ALWAYS_INLINE C add_lanes(VectorOf<C, n> value) {
  if constexpr (n == 1) {
    return value[0];
  } else {
    using Half = VectorOf<C, n / 2>;
    struct Halves {
      Half low, high;
    };
    const auto halves = bits_as<Halves>(value);
    return add_lanes<C, n / 2>(halves.low + halves.high);
  }
}

// Adds up the lanes of each of R vectors, in the same pairs: four of them together, in a third of
// the instructions.
template <class C, int R>
ALWAYS_INLINE VectorOf<C, R> add_lanes_of(const Vector<C> (&of)[R]) {
  if constexpr (R > 4) {
    struct Two {
      VectorOf<C, R / 2> low, high;
    };
    const auto& halves = reinterpret_cast<const Vector<C>(&)[2][R / 2]>(of);
    return bits_as<VectorOf<C, R>>(
        Two{add_lanes_of<C, R / 2>(halves[0]), add_lanes_of<C, R / 2>(halves[1])});
  } else if constexpr (R == 4 && lanes<C> == 16) {
#if defined(__AVX512F__)
    const auto halves = [](Vector<C> a, Vector<C> b) {
      return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xEE);
    };
    const __m512 low = halves(of[0], of[1]), high = halves(of[2], of[3]);
    __m512 sum = _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xDD);
    sum += _mm512_permute_ps(sum, 0x4E);
    sum += _mm512_permute_ps(sum, 0xB1);
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return VectorOf<C, R>(_mm512_castps512_ps128(_mm512_permutexvar_ps(first, sum)));
#endif
  } else if constexpr (R == 4 && lanes<C> == 8 && sizeof(C) == 4) {
#if defined(__AVX2__)
    const auto halves = [](Vector<C> a, Vector<C> b) {
      return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
    };
    // Rows 0 and 2, then 1 and 3: what is left of two rows lies side by side in each half.
    const __m256 even = halves(of[0], of[2]), odd = halves(of[1], of[3]);
    const __m256 pairs = _mm256_shuffle_ps(even, odd, 0x44) + _mm256_shuffle_ps(even, odd, 0xEE);
    const __m256 sums = pairs + _mm256_permute_ps(pairs, 0xB1);
    return VectorOf<C, R>(
        _mm_shuffle_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1), 0x88));
#endif
  }
  VectorOf<C, R> sums;
  for (int r = 0; r < R; ++r) sums[r] = add_lanes<C, lanes<C>>(of[r]);
  return sums;
}

template <int R>
ALWAYS_INLINE VectorOf<double, R> square_root(VectorOf<double, R> of) {
#if defined(__AVX2__)
  if constexpr (R == 4) return VectorOf<double, R>(_mm256_sqrt_pd(of));
#endif
#if defined(__AVX512F__)
  if constexpr (R == 8) return VectorOf<double, R>(_mm512_sqrt_pd(of));
#endif
  for (int r = 0; r < R; ++r) of[r] = __builtin_sqrt(of[r]);
  return of;
}

// Calls f with a value of the element type that `dtype` names.
template <class F>
ALWAYS_INLINE void with_type(fusednorm::DType dtype, F&& f) {
  using fusednorm::DType;
  switch (dtype) {
    case DType::f16: return f(f16{});
    case DType::bf16: return f(bf16{});
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::none: return;
  }
}

// Rounds to the type that `dtype` names and back; leaves the value alone where that is none.
template <class C>
ALWAYS_INLINE Vector<C> rounded(Vector<C> value, fusednorm::DType dtype) {
  using fusednorm::DType;
  if (__builtin_expect(dtype == DType::none, 1)) return value;
  with_type(dtype, [&](auto type) {
    decltype(type) elements[lanes<C>];
    store<C>(elements, value);
    value = load<C>(elements);
  });
  return value;
}

// Four words for each counter (quad, row, 0): Philox 4x32-10 (Salmon et al., *Parallel random
// numbers: as easy as 1, 2, 3*, 2011). Each 64-bit lane holds one word.
constexpr int quads = register_bytes / 8;
using Words = VectorOf<uint64_t, quads>;

ALWAYS_INLINE Words multiply_words(Words a, uint32_t b) {
#if defined(__AVX512F__)
  return Words(_mm512_mul_epu32(bits_as<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return Words(_mm256_mul_epu32(bits_as<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return Words(_mm_mul_epu32(bits_as<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return a * b;
#endif
}

inline void philox(uint64_t first_quad, uint64_t row, uint64_t seed, Words words[4]) {
  constexpr uint64_t word = 0xFFFFFFFF;
  Words c0, c1 = Words{} + (row & word), c2 = Words{} + (row >> 32), c3 = Words{};
  for (int i = 0; i < quads; ++i) c0[i] = first_quad + i;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words a = multiply_words(c0, 0xD2511F53), b = multiply_words(c2, 0xCD9E8D57);
    c0 = (b >> 32) ^ c1 ^ k0;
    c2 = (a >> 32) ^ c3 ^ k1;
    c1 = b & word;
    c3 = a & word;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

}  // namespace
