// The kernels themselves, compiled once for each instruction set (see simd.h).
//
// A row is read from memory once: what comes after the first pass over it finds it in cache. All
// multiplications that are fused with an addition are written so, and the compiler fuses no others:
// the bits of a row depend on its contents, N, the types and the instruction set alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "layer_norm.h"
#include "simd.h"

namespace {

using fusednorm::Dropout;
using fusednorm::DType;
using fusednorm::Forward;
using fusednorm::Problem;
using fusednorm::Rows;
using fusednorm::Term;
using fusednorm::cpu::Backward;
using fusednorm::cpu::Fold;

// Memory for one row, or a few, of a thread's own, allocated when it is first asked for.
template <class C>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  C* get() {
    if (data_ == nullptr) {
      constexpr size_t line = 64;
      data_ = static_cast<C*>(aligned_alloc(line, (size_ * sizeof(C) + line - 1) / line * line));
      if (data_ == nullptr) abort();
    }
    return data_;
  }

  C* zeros() { return static_cast<C*>(memset(get(), 0, size_ * sizeof(C))); }

 private:
  int64_t size_;
  C* data_ = nullptr;
};

// One row of any type.
struct Row {
  char* data = nullptr;
  DType dtype = DType::none;

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

ALWAYS_INLINE int64_t bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

ALWAYS_INLINE Row row_of(const Rows& rows, int64_t row) {
  if (rows.data == nullptr) return {};
  return {static_cast<char*>(rows.data) + rows.offset(row) * bytes(rows.dtype), rows.dtype};
}

template <class C>
constexpr DType dtype_of = std::is_same_v<C, double> ? DType::f64 : DType::f32;

// Whether rows of T can be worked on in C: float for all but double.
template <class C, class T>
constexpr bool computes = std::is_same_v<C, double> == std::is_same_v<T, double>;

ALWAYS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows that are worked on together, to share loads and to wait together for their sums. Their bits
// do not depend on it.
constexpr int group = 4;

// Whether so many are: where long rows are a multiple of 2048 bytes apart, their columns take the
// same one or two places in the first cache, which has eight of each at best.
ALWAYS_INLINE bool in_groups(const Rows& rows, int64_t cols) {
  const int64_t size = bytes(rows.dtype);
  return rows.data == nullptr || rows.stride * size % 2048 != 0 || cols * size <= 512;
}

// Asks for the rows of the next group, of long ones for the beginning: where rows are far apart,
// nothing else reads ahead.
ALWAYS_INLINE void read_ahead(const Rows& rows, int64_t row, int64_t count, int64_t end,
                              int64_t cols) {
  if (rows.data == nullptr || rows.stride == cols) return;
  constexpr int64_t line = 64, most = 1024;
  for (int64_t next = row + group; next < min_of(row + group + count, end); ++next) {
    const char* const data = row_of(rows, next).data;
    for (int64_t at = 0; at < min_of(cols * bytes(rows.dtype), most); at += line)
      __builtin_prefetch(data + at);
  }
}

// Whether whole vectors of these rows, which are not read again soon, can be stored past the cache.
template <class C, class T>
ALWAYS_INLINE bool may_stream(const Rows& rows, int64_t cols) {
  return rows.beyond_cache && cols % lanes<C> == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % (lanes<C> * sizeof(T)) == 0;
}

template <class C, class T, class P, class S>
ALWAYS_INLINE void put(T* to, Vector<C> value, P part, S) {
  if constexpr (S::value && std::is_same_v<P, Whole>)
    stream<C>(to, value);
  else
    store<C>(to, value, part);
}

template <class C, class F>
ALWAYS_INLINE void for_columns(int64_t cols, F&& f) {
  int64_t col = 0;
  for (; col + lanes<C> <= cols; col += lanes<C>) f(col, Whole{});
  if (col < cols) f(col, Part{int(cols - col)});
}

// Adds up K quantities over the columns of a row: f(column, part, sums) adds to sums[0 .. K - 1].
// Blocks of columns are added up in double, so that long rows lose no digits.
template <class C, int K, class F>
ALWAYS_INLINE void sum_columns(int64_t cols, double (&totals)[K], F&& f) {
  constexpr int chains = 4;  // independent additions in flight
  constexpr int64_t block = 64 * chains * lanes<C>;
  for (double& total : totals) total = 0.0;
  for (int64_t col = 0; col < cols;) {
    const int64_t end = min_of(cols, col + block);
    Vector<C> sums[chains][K] = {};
    for (; col + chains * lanes<C> <= end; col += chains * lanes<C>) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) f(col + chain * lanes<C>, Whole{}, sums[chain]);
    }
    for (; col + lanes<C> <= end; col += lanes<C>) f(col, Whole{}, sums[0]);
    if (col < end) {
      f(col, Part{int(end - col)}, sums[0]);
      col = end;
    }
    for (int k = 0; k < K; ++k) {
      const Vector<C> sum = (sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]);
      totals[k] += add_lanes<C, lanes<C>>(sum);
    }
  }
}

template <class C, class P>
ALWAYS_INLINE Vector<C> load_any(const Row& from, int64_t col, P part) {
  Vector<C> value;
  with_type(from.dtype, [&](auto type) { value = load<C>(from.as<decltype(type)>() + col, part); });
  return value;
}

template <class C, class P>
ALWAYS_INLINE void store_any(const Row& to, int64_t col, Vector<C> value, P part) {
  with_type(to.dtype, [&](auto type) { store<C>(to.as<decltype(type)>() + col, value, part); });
}

// Returns a row as elements of C: itself, or a converted copy.
template <class C>
const C* in_compute_type(const Row& row, int64_t cols, Buffer<C>& copy) {
  if (row.dtype == dtype_of<C>) return row.as<C>();
  C* to = copy.get();
  for_columns<C>(
      cols, [&](int64_t col, auto part) { store<C>(to + col, load_any<C>(row, col, part), part); });
  return to;
}

// A term as a vector of C for the sample at hand; null where the term is absent.
template <class C>
class SampleVector {
 public:
  SampleVector(const Term& term, int64_t cols) : term_(term), cols_(cols), copy_(cols) {}

  const C* of(int64_t sample) {
    if (term_.data == nullptr) return nullptr;
    if (vector_ != nullptr && (sample == sample_ || term_.stride == 0)) return vector_;
    sample_ = sample;
    const int64_t offset = sample * term_.stride * bytes(term_.dtype);
    char* data = static_cast<char*>(const_cast<void*>(term_.data)) + offset;
    const Row row{data, term_.dtype};
    vector_ = term_.is_number ? repeated(row) : in_compute_type(row, cols_, copy_);
    return vector_;
  }

 private:
  const C* repeated(const Row& number) {
    const Vector<C> value = Vector<C>{} + load_any<C>(number, 0, Part{1})[0];
    C* to = copy_.get();
    for_columns<C>(cols_, [&](int64_t col, auto part) { store<C>(to + col, value, part); });
    return to;
  }

  Term term_;
  int64_t cols_;
  Buffer<C> copy_;
  const C* vector_ = nullptr;
  int64_t sample_ = 0;
};

// What dropout multiplies a row by: 0 or 1 / (1 - p); null without dropout.
template <class C>
const C* keep_factors(const Dropout& dropout, int64_t row, int64_t cols, Buffer<C>& buffer) {
  if (dropout.seed == nullptr) return nullptr;
  C* keep = buffer.get();
  const C kept = C(dropout.inverse_keep);
  for (int64_t first = 0; 4 * first < cols; first += quads) {
    Words words[4];
    philox(first, row, *dropout.seed, words);
    for (int quad = 0; quad < quads; ++quad) {
      for (int word = 0; word < 4; ++word)
        keep[4 * (first + quad) + word] = words[word][quad] < dropout.drop_below ? C(0) : kept;
    }
  }
  return keep;
}

// keep_factors writes whole vectors of quads.
ALWAYS_INLINE int64_t keep_size(int64_t cols) { return cols + 4 * quads; }

// h = residual + gate * keep * x, rounded as it is stored: the statistics, and with them the
// backward, are those of the h that the next layer sees.
template <class C>
void form_stream(const Row& x, const Row& residual, const C* gate, const C* keep, const Row& h,
                 int64_t cols) {
  for_columns<C>(cols, [&](int64_t col, auto part) {
    Vector<C> value = load_any<C>(x, col, part);
    if (keep) value *= load<C>(keep + col, part);
    if (gate) value *= load<C>(gate + col, part);
    if (residual) value += load_any<C>(residual, col, part);
    store_any<C>(h, col, value, part);
  });
}

template <class C>
struct Affine {
  const C *weight, *bias, *scale, *shift;
  DType x_hat_dtype;

  // Whether it is a weight and a bias, and nothing else.
  bool is_plain() const { return weight && bias && !scale && !shift && x_hat_dtype == DType::none; }
};

template <class C>
struct Statistics {
  C mean, rstd;
};

// Returns about the mean of a row: that of a few vectors spread over it.
template <class C, class F>
ALWAYS_INLINE C near_mean(int64_t cols, F&& row) {
  constexpr int pieces = 4;
  Vector<C> sum{};
  if (cols < pieces * lanes<C>) {
    for_columns<C>(cols, [&](int64_t col, auto part) { sum += row(col, part); });
    return add_lanes<C, lanes<C>>(sum) / C(cols);
  }
#pragma GCC unroll 4
  for (int piece = 0; piece < pieces; ++piece)
    sum += row(cols / pieces / lanes<C> * lanes<C> * piece, Whole{});
  return add_lanes<C, lanes<C>>(sum) / C(pieces * lanes<C>);
}

template <class C, class F>
ALWAYS_INLINE void sum_centred(int64_t cols, C centre, double (&totals)[2], F&& row) {
  sum_columns<C>(cols, totals, [&](int64_t col, auto part, Vector<C>* sums) {
    const Vector<C> centred = existing<C>(row(col, part) - centre, part);
    sums[0] += centred;
    sums[1] = multiply_add(centred, centred, sums[1]);
  });
}

// Normalises R rows that `source` has: source.load(r, col, part) forms h on the first pass,
// source.again(r, col, part) gives it once more, source.leave(r, col, part) does so for the last
// time. What happens to a row does not depend on R.
template <class C, int R, class T, class Source>
ALWAYS_INLINE void normalize(const Source& source, T* const (&z)[R], int64_t cols, bool rms,
                             double eps, const Affine<C>& affine, bool streamed,
                             Statistics<C> (&statistics)[R]) {
  C centre[R];
  double totals[R][2];
  for (int r = 0; r < R; ++r) {
    const auto row = [&](int64_t col, auto part) { return source.load(r, col, part); };
    centre[r] = rms ? C(0) : near_mean<C>(cols, row);
    sum_centred<C>(cols, centre[r], totals[r], row);
  }
  C rstd[R], offset[R];
  for (int r = 0; r < R; ++r) {
    double correction = rms ? 0.0 : totals[r][0] / cols;
    double variance = totals[r][1] / cols - correction * correction;
    if (!(correction * correction <= 0.25 * variance)) {
      // Digits would cancel: once more from the mean itself. What rounding left in it does no harm.
      const auto row = [&](int64_t col, auto part) { return source.again(r, col, part); };
      centre[r] = C(centre[r] + correction);
      sum_centred<C>(cols, centre[r], totals[r], row);
      correction = totals[r][0] / cols;
      variance = totals[r][1] / cols - correction * correction;
    }
    const double inverse = 1.0 / __builtin_sqrt(variance + eps);
    rstd[r] = C(inverse);
    offset[r] = C(-correction * inverse);
    statistics[r] = {C(centre[r] + correction), rstd[r]};
  }
  const auto x_hat = [&](int r, int64_t col, auto part) {
    const Vector<C> centred = source.leave(r, col, part) - centre[r];
    return multiply_add(centred, Vector<C>{} + rstd[r], Vector<C>{} + offset[r]);
  };
  // The most frequent case, without a branch in the loop.
  const auto plain = [&](auto streamed) {
    for_columns<C>(cols, [&](int64_t col, auto part) {
      const Vector<C> weight = load<C>(affine.weight + col, part);
      const Vector<C> bias = load<C>(affine.bias + col, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        put<C>(z[r] + col, multiply_add(x_hat(r, col, part), weight, bias), part, streamed);
    });
  };
  if (affine.is_plain() && streamed) {
    plain(std::true_type{});
  } else if (affine.is_plain()) {
    plain(std::false_type{});
  } else {
    for_columns<C>(cols, [&](int64_t col, auto part) {
      for (int r = 0; r < R; ++r) {
        Vector<C> value = rounded<C>(x_hat(r, col, part), affine.x_hat_dtype);
        if (affine.weight) {
          const Vector<C> weight = load<C>(affine.weight + col, part);
          value = affine.bias ? multiply_add(value, weight, load<C>(affine.bias + col, part))
                              : value * weight;
        } else if (affine.bias) {
          value += load<C>(affine.bias + col, part);
        }
        if (affine.scale) value = multiply_add(value, load<C>(affine.scale + col, part), value);
        if (affine.shift) value += load<C>(affine.shift + col, part);
        store<C>(z[r] + col, value, part);
      }
    });
  }
}

// Rows that are normalised as they are.
template <class C, class T, int R>
struct StoredRows {
  const T* h[R];

  template <class P>
  ALWAYS_INLINE Vector<C> load(int r, int64_t col, P part) const {
    return ::load<C>(h[r] + col, part);
  }
  template <class P>
  ALWAYS_INLINE Vector<C> again(int r, int64_t col, P part) const {
    return load(r, col, part);
  }
  template <class P>
  ALWAYS_INLINE Vector<C> leave(int r, int64_t col, P part) const {
    return load(r, col, part);
  }
};

// Rows of the stream, all of one type: h = residual + gate * keep * x, rounded as it is stored.
template <class C, class T, int R>
struct FormedRows {
  const T *x[R], *residual[R];
  const C *gate, *keep;
  T *h[R], *streamed[R];

  template <class P>
  ALWAYS_INLINE Vector<C> load(int r, int64_t col, P part) const {
    Vector<C> value = ::load<C>(x[r] + col, part);
    if (keep) value *= ::load<C>(keep + col, part);
    if (gate) value *= ::load<C>(gate + col, part);
    if (residual[r]) value += ::load<C>(residual[r] + col, part);
    store<C>(h[r] + col, value, part);
    return sizeof(T) == sizeof(C) ? value : ::load<C>(h[r] + col, part);
  }
  template <class P>
  ALWAYS_INLINE Vector<C> again(int r, int64_t col, P part) const {
    return ::load<C>(h[r] + col, part);
  }
  template <class P>
  ALWAYS_INLINE Vector<C> leave(int r, int64_t col, P part) const {
    const Vector<C> value = ::load<C>(h[r] + col, part);
    if (streamed[r]) put<C>(streamed[r] + col, value, part, std::true_type{});
    return value;
  }
};

template <class C>
class Normalization {
 public:
  explicit Normalization(const Forward& p)
      : p_(p),
        cols_(p.cols),
        gates_(p.gate, cols_),
        weights_(p.weight, cols_),
        biases_(p.bias, cols_),
        scales_(p.scale, cols_),
        shifts_(p.shift, cols_),
        keep_(keep_size(cols_)),
        source_(cols_),
        result_(cols_),
        stream_(group * cols_) {}

  void run(int64_t first, int64_t last) {
    for (int64_t row = first; row < last;) {
      const int64_t sample = row / p_.rows_per_sample;
      const int64_t end = min_of(last, (sample + 1) * p_.rows_per_sample);
      gate_ = gates_.of(sample);
      affine_ = {weights_.of(sample), biases_.of(sample), scales_.of(sample), shifts_.of(sample),
                 p_.x_hat_dtype};
      row = run_directly(row, end);
      for (; row < end; ++row) run_row(row);
    }
  }

 private:
  // Normalises rows that are read and written in one type; returns the first row that is left.
  int64_t run_directly(int64_t row, int64_t end) {
    const DType dtype = p_.z.dtype;
    if (p_.x.dtype != dtype || (p_.h_dtype != DType::none && p_.h_dtype != dtype) ||
        (p_.residual.data && p_.residual.dtype != dtype))
      return row;
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (computes<C, T>) {
        constexpr int64_t near = 16384;  // bytes of h that stay in the first cache
        if (!p_.dropout.seed && group * cols_ * int64_t(sizeof(T)) <= near &&
            in_groups(p_.x, cols_))
          for (; row + group <= end; row += group) run_group<T, group>(row, end);
        for (; row < end; ++row) run_group<T, 1>(row, end);
      }
    });
    return row;
  }

  template <class T, int R>
  void run_group(int64_t row, int64_t end) {
    read_ahead(p_.x, row, R, end, cols_);
    read_ahead(p_.residual, row, R, end, cols_);
    T* z[R];
    for (int r = 0; r < R; ++r) z[r] = row_of(p_.z, row + r).template as<T>();
    const bool streamed = may_stream<C, T>(p_.z, cols_);
    Statistics<C> statistics[R];
    if (p_.h_dtype == DType::none) {
      StoredRows<C, T, R> source;
      for (int r = 0; r < R; ++r) source.h[r] = row_of(p_.x, row + r).template as<T>();
      normalize<C, R, T>(source, z, cols_, p_.rms, p_.eps, affine_, streamed, statistics);
    } else {
      FormedRows<C, T, R> source;
      const bool streams_h = p_.h.data && may_stream<C, T>(p_.h, cols_);
      source.gate = gate_;
      source.keep = keep_factors(p_.dropout, row, cols_, keep_);
      for (int r = 0; r < R; ++r) {
        source.x[r] = row_of(p_.x, row + r).template as<T>();
        source.residual[r] = row_of(p_.residual, row + r).template as<T>();
        T* h = row_of(p_.h, row + r).template as<T>();
        source.streamed[r] = streams_h ? h : nullptr;
        source.h[r] = streams_h || !h ? reinterpret_cast<T*>(stream_.get()) + r * cols_ : h;
      }
      normalize<C, R, T>(source, z, cols_, p_.rms, p_.eps, affine_, streamed, statistics);
    }
    for (int r = 0; r < R; ++r) save(row + r, statistics[r]);
  }

  void run_row(int64_t row) {
    const Row x = row_of(p_.x, row);
    Row h = x;
    if (p_.h_dtype != DType::none) {
      h = row_of(p_.h, row);
      if (!h) h = {reinterpret_cast<char*>(stream_.get()), p_.h_dtype};
      const C* keep = keep_factors(p_.dropout, row, cols_, keep_);
      form_stream(x, row_of(p_.residual, row), gate_, keep, h, cols_);
    }
    const Row z = row_of(p_.z, row);
    C* const to[1] = {z.dtype == dtype_of<C> ? z.as<C>() : result_.get()};
    const StoredRows<C, C, 1> source{{in_compute_type(h, cols_, source_)}};
    Statistics<C> statistics[1];
    normalize<C, 1, C>(source, to, cols_, p_.rms, p_.eps, affine_, false, statistics);
    save(row, statistics[0]);
    if (z.dtype == dtype_of<C>) return;
    for_columns<C>(cols_, [&](int64_t col, auto part) {
      store_any<C>(z, col, load<C>(to[0] + col, part), part);
    });
  }

  void save(int64_t row, const Statistics<C>& statistics) {
    if (p_.mean) static_cast<C*>(p_.mean)[row] = statistics.mean;
    if (p_.rstd) static_cast<C*>(p_.rstd)[row] = statistics.rstd;
  }

  const Forward& p_;
  int64_t cols_;
  SampleVector<C> gates_, weights_, biases_, scales_, shifts_;
  Buffer<C> keep_, source_, result_;
  Buffer<double> stream_;
  const C* gate_ = nullptr;
  Affine<C> affine_;
};

// Sums over rows of dz * x_hat, dz, and dresidual * dropout(x), [N] each; null where not wanted.
template <class C>
struct ColumnSums {
  C *dz_x_hat, *dz, *dgate;
};

// Of a plain norm with a weight: dx and both sums, dx alone, or something else.
enum class Wanted { all, dx, some };

// Differentiates R rows through the norm: adds to the sums, and writes rstd * (g + x_hat * c1 +
// c2), plus dh where that is not null, to `out` where that is not null. `factor` is weight * (1 +
// scale), null for 1.
template <class C, int R, class T>
ALWAYS_INLINE void differentiate(const T* const (&dz)[R], const T* const (&h)[R],
                                 const T* const* dh, T* const* out,
                                 const Statistics<C> (&statistics)[R], int64_t cols, bool rms,
                                 const C* factor, DType x_hat_dtype, const ColumnSums<C>& sums,
                                 bool streamed) {
  C c1[R] = {}, c2[R] = {};
  if (out) {
    for (int r = 0; r < R; ++r) {
      const C mean = statistics[r].mean, rstd = statistics[r].rstd;
      double totals[2];
      sum_columns<C>(cols, totals, [&](int64_t col, auto part, Vector<C>* sums) {
        const Vector<C> centred = load<C>(h[r] + col, part) - mean;
        Vector<C> g = load<C>(dz[r] + col, part);
        if (factor) g *= load<C>(factor + col, part);
        sums[0] = multiply_add(g, centred, sums[0]);
        sums[1] += g;
      });
      c1[r] = C(-totals[0] / cols * rstd);
      c2[r] = rms ? C(0) : C(-totals[1] / cols);
    }
  }
  // The two most frequent cases, a plain norm with trained parameters and one with frozen ones,
  // have no branch in the loop.
  const auto run = [&](auto wanted, auto streamed) {
    constexpr bool all = wanted == Wanted::all, plain = wanted != Wanted::some;
    const bool dweight = all || (!plain && sums.dz_x_hat), dbias = all || (!plain && sums.dz);
    for_columns<C>(cols, [&](int64_t col, auto part) {
      Vector<C> dz_x_hat{}, dz_sum{}, weight{};
      if (dweight) dz_x_hat = load<C>(sums.dz_x_hat + col, part);
      if (dbias) dz_sum = load<C>(sums.dz + col, part);
      if (plain || factor) weight = load<C>(factor + col, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const auto [mean, rstd] = statistics[r];
        const Vector<C> x_hat = (load<C>(h[r] + col, part) - mean) * rstd;
        const Vector<C> value = load<C>(dz[r] + col, part);
        if (dweight)
          dz_x_hat = multiply_add(value, plain ? x_hat : rounded<C>(x_hat, x_hat_dtype), dz_x_hat);
        if (dbias) dz_sum += value;
        if (plain || out) {
          const Vector<C> g = plain || factor ? value * weight : value;
          const Vector<C> projection =
              multiply_add(x_hat, Vector<C>{} + c1[r], Vector<C>{} + c2[r]);
          Vector<C> total = (g + projection) * rstd;
          if (dh) total += load<C>(dh[r] + col, part);
          put<C>(out[r] + col, total, part, streamed);
        }
      }
      if (dweight) store<C>(sums.dz_x_hat + col, dz_x_hat, part);
      if (dbias) store<C>(sums.dz + col, dz_sum, part);
    });
  };
  const auto run_streamed = [&](auto wanted) {
    if (streamed)
      run(wanted, std::true_type{});
    else
      run(wanted, std::false_type{});
  };
  if (!out || !factor || x_hat_dtype != DType::none || !sums.dz_x_hat != !sums.dz)
    run(std::integral_constant<Wanted, Wanted::some>{}, std::false_type{});
  else if (sums.dz)
    run_streamed(std::integral_constant<Wanted, Wanted::all>{});
  else
    run_streamed(std::integral_constant<Wanted, Wanted::dx>{});
}

// Writes columns of one row of `p.out`: the sums of `count` rows that lie one after the other.
template <class C>
void fold_columns(const Fold& p, const C* partials, int64_t row, int64_t first, int64_t last) {
  const Row out{static_cast<char*>(p.out), p.dtype};
  const auto sum = [&](int64_t col, auto part) {
    Vector<C> total{};
    for (int64_t i = 0; i < p.count; ++i) total += load<C>(partials + i * p.cols + col, part);
    return total;
  };
  if (p.is_number) {
    double total[1];
    sum_columns<C>(p.cols, total,
                   [&](int64_t col, auto part, Vector<C>* sums) { sums[0] += sum(col, part); });
    store_any<C>(out, row, Vector<C>{} + C(total[0]), Part{1});
    return;
  }
  for_columns<C>(last - first, [&](int64_t col, auto part) {
    store_any<C>(out, row * p.cols + first + col, sum(first + col, part), part);
  });
}

template <class C>
class Differentiation {
 public:
  explicit Differentiation(const Backward& p)
      : p_(p),
        cols_(p.cols),
        gates_(p.gate, cols_),
        weights_(p.weight, cols_),
        biases_(p.bias, cols_),
        scales_(p.scale, cols_),
        keep_(keep_size(cols_)),
        factor_(cols_),
        dz_x_hat_(cols_),
        dz_(cols_),
        dgate_(cols_),
        own_dgate_(cols_),
        own_dscale_(cols_),
        own_dshift_(cols_),
        dz_copy_(cols_),
        h_copy_(cols_),
        total_(cols_) {
    sums_.dz_x_hat = p.dweight || p.dscale ? dz_x_hat_.zeros() : nullptr;
    const bool wants_dz = p.dbias || p.dshift || (p.dscale && p.bias.data);
    sums_.dz = wants_dz ? dz_.zeros() : nullptr;
    sums_.dgate = p.dgate ? dgate_.zeros() : nullptr;
  }

  void run(int64_t task) {
    C* dweight = partial_row(p_.dweight, task);
    C* dbias = partial_row(p_.dbias, task);
    const int64_t last = p_.units * (task + 1) / p_.tasks;
    for (int64_t unit = p_.units * task / p_.tasks; unit < last; ++unit)
      run_unit(unit, dweight, dbias);
  }

 private:
  // Short sums are added up to long ones: the error grows with the root of the number of rows.
  static constexpr int64_t rows_per_sum = 128;

  // Returns one zeroed row of partial sums, or null.
  C* partial_row(void* partials, int64_t row) {
    if (partials == nullptr) return nullptr;
    return static_cast<C*>(memset(static_cast<C*>(partials) + row * cols_, 0, cols_ * sizeof(C)));
  }

  // Returns where the sums over a unit go, zeroed, or null; `own` where no others are added to
  // them.
  C* unit_row(const Fold& sums, int64_t unit, Buffer<C>& own) {
    if (sums.partials) return partial_row(const_cast<void*>(sums.partials), unit);
    return sums ? own.zeros() : nullptr;
  }

  void finish(const Fold& sums, int64_t unit, const C* row) {
    if (sums && !sums.partials) fold_columns<C>(sums, row, unit, 0, cols_);
  }

  void run_unit(int64_t unit, C* dweight, C* dbias) {
    const int64_t sample = unit / p_.units_per_sample, piece = unit % p_.units_per_sample;
    const int64_t start = sample * p_.rows_per_sample;
    const int64_t last = start + p_.rows_per_sample * (piece + 1) / p_.units_per_sample;
    C* dscale = unit_row(p_.dscale, unit, own_dscale_);
    C* dshift = unit_row(p_.dshift, unit, own_dshift_);
    C* dgate = unit_row(p_.dgate, unit, own_dgate_);
    load_sample(sample);
    for (int64_t row = start + p_.rows_per_sample * piece / p_.units_per_sample; row < last;) {
      const int64_t end = min_of(last, row + rows_per_sum);
      row = run_directly(row, end);
      for (; row < end; ++row) run_row(row);
      add_sums(dweight, dbias, dscale, dshift, dgate);
    }
    finish(p_.dscale, unit, dscale);
    finish(p_.dshift, unit, dshift);
    finish(p_.dgate, unit, dgate);
  }

  void load_sample(int64_t sample) {
    gate_vector_ = gates_.of(sample);
    weight_vector_ = weights_.of(sample);
    scale_vector_ = scales_.of(sample);
    bias_vector_ = biases_.of(sample);
    factor_vector_ = weight_vector_;
    if (scale_vector_ == nullptr) return;
    C* factor = factor_.get();
    for_columns<C>(cols_, [&](int64_t col, auto part) {
      Vector<C> value = load<C>(scale_vector_ + col, part) + 1;
      if (weight_vector_) value *= load<C>(weight_vector_ + col, part);
      store<C>(factor + col, value, part);
    });
    factor_vector_ = factor;
  }

  Statistics<C> statistics(int64_t row) const {
    return {p_.mean ? static_cast<const C*>(p_.mean)[row] : C(0),
            static_cast<const C*>(p_.rstd)[row]};
  }

  // Differentiates rows that are read and written in one type, with nothing around the norm but dh;
  // returns the first row that is left.
  int64_t run_directly(int64_t row, int64_t end) {
    const DType dtype = p_.h.dtype;
    if (p_.dz.dtype != dtype || (p_.dh.data && p_.dh.dtype != dtype) || p_.dresidual.data ||
        p_.dgate || p_.gate.data || p_.dropout.seed || (p_.dx.data && p_.dx.dtype != dtype))
      return row;
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (computes<C, T>) {
        const bool streamed = may_stream<C, T>(p_.dx, cols_);
        if (in_groups(p_.h, cols_) && in_groups(p_.dz, cols_))
          for (; row + group <= end; row += group) run_group<T, group>(row, end, streamed);
        for (; row + 2 <= end; row += 2) run_group<T, 2>(row, end, streamed);
        for (; row < end; ++row) run_group<T, 1>(row, end, streamed);
      }
    });
    return row;
  }

  template <class T, int R>
  void run_group(int64_t row, int64_t end, bool streamed) {
    read_ahead(p_.dz, row, R, end, cols_);
    read_ahead(p_.h, row, R, end, cols_);
    read_ahead(p_.dh, row, R, end, cols_);
    const T *dz[R], *h[R], *dh[R];
    T* dx[R];
    Statistics<C> stats[R];
    for (int r = 0; r < R; ++r) {
      dz[r] = row_of(p_.dz, row + r).template as<T>();
      h[r] = row_of(p_.h, row + r).template as<T>();
      dh[r] = row_of(p_.dh, row + r).template as<T>();
      dx[r] = row_of(p_.dx, row + r).template as<T>();
      stats[r] = statistics(row + r);
    }
    differentiate<C, R, T>(dz, h, p_.dh.data ? dh : nullptr, p_.dx.data ? dx : nullptr, stats,
                           cols_, p_.rms, factor_vector_, p_.x_hat_dtype, sums_, streamed);
  }

  void run_row(int64_t row) {
    const bool through_row = p_.dx.data || p_.dresidual.data || p_.dgate;
    C* total = nullptr;
    if (p_.dz.data) {
      const C* dz[1] = {in_compute_type(row_of(p_.dz, row), cols_, dz_copy_)};
      const C* h[1] = {in_compute_type(row_of(p_.h, row), cols_, h_copy_)};
      const Statistics<C> stats[1] = {statistics(row)};
      total = through_row ? total_.get() : nullptr;
      differentiate<C, 1, C>(dz, h, nullptr, total ? &total : nullptr, stats, cols_, p_.rms,
                             factor_vector_, p_.x_hat_dtype, sums_, false);
    }
    if (through_row) leave_stream(row, total);
  }

  // From the gradient of h by the norm, `total`, or null, to those of residual, gate and x.
  void leave_stream(int64_t row, const C* total) {
    const C* keep = keep_factors(p_.dropout, row, cols_, keep_);
    const Row dh = row_of(p_.dh, row), x = row_of(p_.x, row);
    const Row dresidual = row_of(p_.dresidual, row), dx = row_of(p_.dx, row);
    for_columns<C>(cols_, [&](int64_t col, auto part) {
      Vector<C> value{};
      if (total) value = load<C>(total + col, part);
      if (dh) value += load_any<C>(dh, col, part);
      if (dresidual) store_any<C>(dresidual, col, value, part);
      if (keep) value *= load<C>(keep + col, part);
      if (sums_.dgate) {
        const Vector<C> sum = load<C>(sums_.dgate + col, part);
        store<C>(sums_.dgate + col, multiply_add(value, load_any<C>(x, col, part), sum), part);
      }
      if (gate_vector_) value *= load<C>(gate_vector_ + col, part);
      if (dx) store_any<C>(dx, col, value, part);
    });
  }

  // Adds the sums over some rows to those of the unit and of the task, and starts anew.
  void add_sums(C* dweight, C* dbias, C* dscale, C* dshift, C* dgate) {
    const auto add = [](C* to, int64_t col, Vector<C> value, auto part) {
      store<C>(to + col, load<C>(to + col, part) + value, part);
    };
    const auto take = [](C* from, int64_t col, auto part) {
      if (from == nullptr) return Vector<C>{};
      const Vector<C> value = load<C>(from + col, part);
      store<C>(from + col, Vector<C>{}, part);
      return value;
    };
    for_columns<C>(cols_, [&](int64_t col, auto part) {
      const Vector<C> dz_x_hat = take(sums_.dz_x_hat, col, part);
      const Vector<C> dz = take(sums_.dz, col, part);
      Vector<C> factor = Vector<C>{} + 1;
      if (scale_vector_) factor += load<C>(scale_vector_ + col, part);
      if (dweight) add(dweight, col, dz_x_hat * factor, part);
      if (dbias) add(dbias, col, dz * factor, part);
      if (dshift) add(dshift, col, dz, part);
      if (dgate) add(dgate, col, take(sums_.dgate, col, part), part);
      if (dscale) {
        Vector<C> value = dz_x_hat;
        if (weight_vector_) value *= load<C>(weight_vector_ + col, part);
        if (bias_vector_) value = multiply_add(dz, load<C>(bias_vector_ + col, part), value);
        add(dscale, col, value, part);
      }
    });
  }

  const Backward& p_;
  int64_t cols_;
  SampleVector<C> gates_, weights_, biases_, scales_;
  Buffer<C> keep_, factor_, dz_x_hat_, dz_, dgate_, own_dgate_, own_dscale_, own_dshift_;
  Buffer<C> dz_copy_, h_copy_, total_;
  ColumnSums<C> sums_;
  const C *gate_vector_, *weight_vector_, *bias_vector_, *scale_vector_, *factor_vector_;
};

void run_forward(const Forward& p, int64_t first_row, int64_t last_row) {
  if (p.compute == DType::f64)
    Normalization<double>(p).run(first_row, last_row);
  else
    Normalization<float>(p).run(first_row, last_row);
  end_of_stream();
}

template <class C>
void backward_tasks(const Backward& p, int64_t first, int64_t last) {
  Differentiation<C> differentiation(p);
  for (int64_t task = first; task < last; ++task) differentiation.run(task);
}

void run_backward(const Backward& p, int64_t first_task, int64_t last_task) {
  if (p.compute == DType::f64)
    backward_tasks<double>(p, first_task, last_task);
  else
    backward_tasks<float>(p, first_task, last_task);
  end_of_stream();
}

template <class C>
void fold_row(const Fold& p, int64_t row, int64_t first, int64_t last) {
  const C* partials = static_cast<const C*>(p.partials) + row * p.count * p.cols;
  fold_columns<C>(p, partials, row, first, last);
}

void run_fold(const Fold& p, int64_t row, int64_t first_col, int64_t last_col) {
  if (p.compute == DType::f64)
    fold_row<double>(p, row, first_col, last_col);
  else
    fold_row<float>(p, row, first_col, last_col);
}

}  // namespace
