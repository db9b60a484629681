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
  ~Buffer() { free(memory_); }

  C* get() {
    if (data_ == nullptr) {
      // Small blocks that are asked for with an alignment take longest of a small call.
      constexpr size_t line = 64;
      memory_ = malloc(size_ * sizeof(C) + line);
      if (memory_ == nullptr) abort();
      data_ = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(memory_) + line - 1) / line * line);
    }
    return data_;
  }

  C* zeros() { return static_cast<C*>(memset(get(), 0, size_ * sizeof(C))); }

 private:
  int64_t size_;
  void* memory_ = nullptr;
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
// Of so few columns that waiting takes longer than working, where there are registers for more.
constexpr int short_group = register_bytes == 64 ? 8 : group;
constexpr int64_t short_cols = 128;

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
  const int64_t first = row + (count > group ? count : group);
  for (int64_t next = first; next < min_of(first + count, end); ++next) {
    const char* const data = row_of(rows, next).data;
    for (int64_t at = 0; at < min_of(cols * bytes(rows.dtype), most); at += line)
      __builtin_prefetch(data + at);
  }
}

// Whether whole vectors of these rows, which are not read again soon, can be stored past the cache.
// Not where many short rows are written at a time: lines that are left half written cost more.
template <class C, class T>
ALWAYS_INLINE bool may_stream(const Rows& rows, int64_t cols) {
  const bool leaves_halves = sizeof(T) < sizeof(C) && cols <= short_cols;
  return rows.beyond_cache && !leaves_halves && cols % lanes<C> == 0 &&
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

// Adds up K quantities over the columns of each of R rows: what f(row) returns is called with
// (column, part, sums) and adds to sums[0 .. K - 1]; what it knows of the row it holds by value, in
// registers. Blocks of columns are added up in double, so that long rows lose no digits.
template <class C, int R, int K, class F>
ALWAYS_INLINE void sum_columns(int64_t cols, VectorOf<double, R> (&totals)[K], F&& f) {
  constexpr int chains = 4;  // independent additions in flight
  constexpr int64_t block = 64 * chains * lanes<C>;
  for (auto& total : totals) total = VectorOf<double, R>{};
  for (int64_t first = 0; first < cols; first += block) {
    const int64_t end = min_of(cols, first + block);
    Vector<C> row_sums[K][R];
    for (int r = 0; r < R; ++r) {
      const auto add = f(r);
      Vector<C> sums[chains][K] = {};
      int64_t col = first;
      for (; col + chains * lanes<C> <= end; col += chains * lanes<C>) {
#pragma GCC unroll 4
        for (int chain = 0; chain < chains; ++chain)
          add(col + chain * lanes<C>, Whole{}, sums[chain]);
      }
      for (; col + lanes<C> <= end; col += lanes<C>) add(col, Whole{}, sums[0]);
      if (col < end) add(col, Part{int(end - col)}, sums[0]);
      for (int k = 0; k < K; ++k)
        row_sums[k][r] = (sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]);
    }
    for (int k = 0; k < K; ++k)
      totals[k] += __builtin_convertvector((add_lanes_of<C, R>(row_sums[k])), VectorOf<double, R>);
  }
}

// The same of one row: f(column, part, sums).
template <class C, int K, class F>
ALWAYS_INLINE void sum_columns(int64_t cols, double (&totals)[K], F&& f) {
  VectorOf<double, 1> sums[K];
  sum_columns<C, 1>(cols, sums, [&](int) { return f; });
  for (int k = 0; k < K; ++k) totals[k] = sums[k][0];
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

// About the mean of a row is that of a few vectors spread over it, of all where there are no more.
constexpr int near_pieces = 4;

template <class C, int R, class Source>
ALWAYS_INLINE VectorOf<C, R> near_means(const Source& source, int64_t cols) {
  Vector<C> sums[R];
  const bool is_short = cols < near_pieces * lanes<C>;
  for (int r = 0; r < R; ++r) {
    const auto row = source.one(r);
    Vector<C> sum{};
    if (is_short) {
      for_columns<C>(cols, [&](int64_t col, auto part) { sum += row.load(0, col, part); });
    } else {
#pragma GCC unroll 4
      for (int piece = 0; piece < near_pieces; ++piece)
        sum += row.load(0, cols / near_pieces / lanes<C> * lanes<C> * piece, Whole{});
    }
    sums[r] = sum;
  }
  return add_lanes_of<C, R>(sums) / C(is_short ? cols : near_pieces * lanes<C>);
}

// Sums the distances from the centres, and their squares; `again` says that h is formed.
template <class C, int R, class Source, class Again>
ALWAYS_INLINE void sum_centred(const Source& source, int64_t cols, VectorOf<C, R> centres,
                               VectorOf<double, R> (&totals)[2], Again again) {
  sum_columns<C, R>(cols, totals, [&](int r) {
    const auto row = source.one(r);
    const Vector<C> centre = Vector<C>{} + centres[r];
    return [=](int64_t col, auto part, Vector<C>* sums) {
      Vector<C> h;
      if constexpr (Again::value)
        h = row.again(0, col, part);
      else
        h = row.load(0, col, part);
      const Vector<C> centred = existing<C>(h - centre, part);
      sums[0] += centred;
      sums[1] = multiply_add(centred, centred, sums[1]);
    };
  });
}

// Normalises R rows that `source` has: source.load(r, col, part) forms h on the first pass,
// source.again(r, col, part) gives it once more, source.leave(r, col, part) does so for the last
// time; source.one(r) is one of them alone. What happens to a row does not depend on R.
template <class C, int R, class Z, class Source>
ALWAYS_INLINE void normalize(const Source& source, Z* const (&z)[R], int64_t cols, bool rms,
                             double eps, const Affine<C>& affine, bool streamed,
                             Statistics<C> (&statistics)[R]) {
  using Exact = VectorOf<double, R>;
  VectorOf<C, R> centres{};
  Exact totals[2];
  // Short rows are formed by then. A second loop beside it makes the first slower for long ones.
  constexpr bool forms_early = Source::forms && R == short_group;
  bool formed = false;
  if (!rms) {
    centres = near_means<C, R>(source, cols);
    formed = forms_early && cols <= near_pieces * lanes<C>;
  }
  if (formed)
    sum_centred<C, R>(source, cols, centres, totals, std::bool_constant<forms_early>{});
  else
    sum_centred<C, R>(source, cols, centres, totals, std::false_type{});
  const double count = double(cols);
  Exact corrections{};
  if (!rms) corrections = totals[0] / count;
  Exact variances = totals[1] / count - corrections * corrections;
  for (int r = 0; r < R; ++r) {
    if (corrections[r] * corrections[r] <= 0.25 * variances[r]) continue;
    // Digits would cancel: once more from the mean itself. What rounding left in it does no harm.
    const VectorOf<C, 1> mean{C(centres[r] + corrections[r])};
    VectorOf<double, 1> one[2];
    sum_centred<C, 1>(source.one(r), cols, mean, one, std::true_type{});
    centres[r] = mean[0];
    corrections[r] = one[0][0] / count;
    variances[r] = one[1][0] / count - corrections[r] * corrections[r];
  }
  const Exact inverses = 1.0 / square_root<R>(variances + eps);
  C centre[R], rstd[R], offset[R];
  for (int r = 0; r < R; ++r) {
    centre[r] = centres[r];
    rstd[r] = C(inverses[r]);
    offset[r] = C(-corrections[r] * inverses[r]);
    statistics[r] = {C(centre[r] + corrections[r]), rstd[r]};
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
  static constexpr bool forms = false;
  const T* h[R];

  ALWAYS_INLINE StoredRows<C, T, 1> one(int r) const { return {{h[r]}}; }

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

// Rows of the stream, of x in X and all others in H: h = residual + gate * keep * x, rounded as it
// is stored.
template <class C, class X, class H, int R>
struct FormedRows {
  static constexpr bool forms = true;
  const X* x[R];
  const H* residual[R];
  const C *gate, *keep;
  H *h[R], *streamed[R];

  ALWAYS_INLINE FormedRows<C, X, H, 1> one(int r) const {
    return {{x[r]}, {residual[r]}, gate, keep, {h[r]}, {streamed[r]}};
  }

  template <class P>
  ALWAYS_INLINE Vector<C> load(int r, int64_t col, P part) const {
    Vector<C> value = ::load<C>(x[r] + col, part);
    if (keep) value *= ::load<C>(keep + col, part);
    if (gate) value *= ::load<C>(gate + col, part);
    if (residual[r]) value += ::load<C>(residual[r] + col, part);
    store<C>(h[r] + col, value, part);
    return sizeof(H) == sizeof(C) ? value : ::load<C>(h[r] + col, part);
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
        stream_(short_group * cols_) {}

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
  // Normalises rows that are read in one type, with a stream and results in that type or in C;
  // returns the first row that is left.
  int64_t run_directly(int64_t row, int64_t end) {
    const DType x = p_.x.dtype, z = p_.z.dtype, h = p_.h_dtype == DType::none ? x : p_.h_dtype;
    if (p_.residual.data && p_.residual.dtype != h) return row;
    with_type(x, [&](auto type) {
      using T = decltype(type);
      if constexpr (computes<C, T>) {
        if (h == x && z == x) row = run_groups<T, T, T>(row, end);
        if constexpr (!std::is_same_v<C, T>) {
          constexpr DType own = dtype_of<C>;
          if (h == own && z == x) row = run_groups<T, C, T>(row, end);
          if (h == own && z == own) row = run_groups<T, C, C>(row, end);
          if (h == x && z == own) row = run_groups<T, T, C>(row, end);
        }
      }
    });
    return row;
  }

  template <class X, class H, class Z>
  int64_t run_groups(int64_t row, int64_t end) {
    constexpr int64_t near = 16384;  // bytes of h that stay in the first cache
    constexpr bool one_type = std::is_same_v<X, H> && std::is_same_v<X, Z>;
    if (!p_.dropout.seed && group * cols_ * int64_t(sizeof(H)) <= near && in_groups(p_.x, cols_)) {
      if constexpr (one_type)
        if (cols_ <= short_cols)
          for (; row + short_group <= end; row += short_group)
            run_group<X, H, Z, short_group>(row, end);
      for (; row + group <= end; row += group) run_group<X, H, Z, group>(row, end);
    }
    for (; row < end; ++row) run_group<X, H, Z, 1>(row, end);
    return row;
  }

  template <class X, class H, class Z, int R>
  void run_group(int64_t row, int64_t end) {
    read_ahead(p_.x, row, R, end, cols_);
    read_ahead(p_.residual, row, R, end, cols_);
    Z* z[R];
    for (int r = 0; r < R; ++r) z[r] = row_of(p_.z, row + r).template as<Z>();
    const bool streamed = may_stream<C, Z>(p_.z, cols_);
    Statistics<C> statistics[R];
    const bool formed = !std::is_same_v<X, H> || p_.h_dtype != DType::none;
    if constexpr (std::is_same_v<X, H>)
      if (!formed) {
        StoredRows<C, X, R> source;
        for (int r = 0; r < R; ++r) source.h[r] = row_of(p_.x, row + r).template as<X>();
        normalize<C, R, Z>(source, z, cols_, p_.rms, p_.eps, affine_, streamed, statistics);
      }
    if (formed) {
      FormedRows<C, X, H, R> source;
      const bool streams_h = p_.h.data && may_stream<C, H>(p_.h, cols_);
      source.gate = gate_;
      source.keep = keep_factors(p_.dropout, row, cols_, keep_);
      for (int r = 0; r < R; ++r) {
        source.x[r] = row_of(p_.x, row + r).template as<X>();
        source.residual[r] = row_of(p_.residual, row + r).template as<H>();
        H* h = row_of(p_.h, row + r).template as<H>();
        source.streamed[r] = streams_h ? h : nullptr;
        source.h[r] = streams_h || !h ? reinterpret_cast<H*>(stream_.get()) + r * cols_ : h;
      }
      normalize<C, R, Z>(source, z, cols_, p_.rms, p_.eps, affine_, streamed, statistics);
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

// R rows that are differentiated, or a tile of them: dz in Z, dx in X, all others in H; null where
// absent. Neither `dh` nor `dresidual` is without dx.
template <class Z, class H, class X, int R>
struct GradientRows {
  const Z* dz[R];
  const H *h[R], *dh[R];
  X* dx[R];
  H* dresidual[R];
};

// What the gradient by h is made with: rstd * (g + x_hat * c1 + c2).
template <class C>
struct Projection {
  C mean, rstd, c1, c2;
};

// `factor` is weight * (1 + scale), null for 1.
template <class C, int R, class Z, class H, class X>
ALWAYS_INLINE void project(const GradientRows<Z, H, X, R>& rows, int64_t cols, bool rms,
                           const C* factor, Projection<C> (&projections)[R]) {
  VectorOf<double, R> totals[2];
  sum_columns<C, R>(cols, totals, [&](int r) {
    const Z* const dz = rows.dz[r];
    const H* const h = rows.h[r];
    const Vector<C> mean = Vector<C>{} + projections[r].mean;
    return [=](int64_t col, auto part, Vector<C>* sums) {
      const Vector<C> centred = load<C>(h + col, part) - mean;
      Vector<C> g = load<C>(dz + col, part);
      if (factor) g *= load<C>(factor + col, part);
      sums[0] = multiply_add(g, centred, sums[0]);
      sums[1] += g;
    };
  });
  for (auto& total : totals) total = -total / double(cols);
  for (int r = 0; r < R; ++r) {
    projections[r].c1 = C(totals[0][r] * projections[r].rstd);
    projections[r].c2 = rms ? C(0) : C(totals[1][r]);
  }
}

// Differentiates R rows through the norm: adds to the sums, and writes the gradient by h, with dh
// in it, where dx and dresidual are.
template <class C, int R, class Z, class H, class X>
ALWAYS_INLINE void differentiate(const GradientRows<Z, H, X, R>& rows, int64_t cols,
                                 const C* factor, DType x_hat_dtype, const ColumnSums<C>& sums,
                                 const Projection<C> (&projections)[R], bool streamed) {
  const bool has_dx = rows.dx[0], has_dh = rows.dh[0];
  // Of one type with dx it is dx: the loop has no registers for more addresses.
  const bool has_dresidual = !std::is_same_v<H, X> && rows.dresidual[0];
  // The two most frequent cases, a plain norm with trained parameters and one with frozen ones,
  // have no branch in the loop.
  const auto run = [&](auto wanted, auto streamed, auto adds_dh) {
    constexpr bool all = wanted == Wanted::all, plain = wanted != Wanted::some;
    const bool dweight = all || (!plain && sums.dz_x_hat), dbias = all || (!plain && sums.dz);
    // Copies that no store can change: they stay in registers.
    GradientRows<Z, H, X, R> at;
    Projection<C> of[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      at.dz[r] = rows.dz[r], at.h[r] = rows.h[r], at.dh[r] = rows.dh[r];
      at.dx[r] = rows.dx[r], at.dresidual[r] = rows.dresidual[r];
      of[r] = projections[r];
    }
    for_columns<C>(cols, [&](int64_t col, auto part) {
      Vector<C> dz_x_hat{}, dz_sum{}, weight{};
      if (dweight) dz_x_hat = load<C>(sums.dz_x_hat + col, part);
      if (dbias) dz_sum = load<C>(sums.dz + col, part);
      if (plain || factor) weight = load<C>(factor + col, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const auto [mean, rstd, c1, c2] = of[r];
        const Vector<C> x_hat = (load<C>(at.h[r] + col, part) - mean) * rstd;
        const Vector<C> value = load<C>(at.dz[r] + col, part);
        if (dweight)
          dz_x_hat = multiply_add(value, plain ? x_hat : rounded<C>(x_hat, x_hat_dtype), dz_x_hat);
        if (dbias) dz_sum += value;
        if (plain || has_dx) {
          const Vector<C> g = plain || factor ? value * weight : value;
          const Vector<C> projection = multiply_add(x_hat, Vector<C>{} + c1, Vector<C>{} + c2);
          Vector<C> total = (g + projection) * rstd;
          if (adds_dh && has_dh) total += load<C>(at.dh[r] + col, part);
          put<C>(at.dx[r] + col, total, part, streamed);
          if (has_dresidual) put<C>(at.dresidual[r] + col, total, part, streamed);
        }
      }
      if (dweight) store<C>(sums.dz_x_hat + col, dz_x_hat, part);
      if (dbias) store<C>(sums.dz + col, dz_sum, part);
    });
  };
  const auto run_streamed = [&](auto wanted) {
    const auto run_with = [&](auto adds_dh) {
      if (streamed)
        run(wanted, std::true_type{}, adds_dh);
      else
        run(wanted, std::false_type{}, adds_dh);
    };
    if (has_dh)
      run_with(std::true_type{});
    else
      run_with(std::false_type{});
  };
  if (!has_dx || !factor || x_hat_dtype != DType::none || !sums.dz_x_hat != !sums.dz)
    run(std::integral_constant<Wanted, Wanted::some>{}, std::false_type{}, std::true_type{});
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
    bias_vector_ = p_.dscale ? biases_.of(sample) : nullptr;
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

  Projection<C> statistics(int64_t row) const {
    return {p_.mean ? static_cast<const C*>(p_.mean)[row] : C(0),
            static_cast<const C*>(p_.rstd)[row], C(0), C(0)};
  }

  // Differentiates rows with nothing around the norm but dh, where dx is of one type and all others
  // are of that one or of C; returns the first row that is left.
  int64_t run_directly(int64_t row, int64_t end) {
    const DType z = p_.dz.dtype, h = p_.h.dtype;
    if (!p_.dz.data || (p_.dh.data && p_.dh.dtype != h) ||
        (p_.dresidual.data && (p_.dresidual.dtype != h || !p_.dx.data)) || p_.dgate ||
        p_.gate.data || p_.dropout.seed)
      return row;
    const DType x = p_.dx.data ? p_.dx.dtype : z == dtype_of<C> ? h : z;
    if (p_.dresidual.data && h == x) return row;
    with_type(x, [&](auto type) {
      using T = decltype(type);
      if constexpr (computes<C, T>) {
        if (z == x && h == x) row = run_rows<T, T, T>(row, end);
        if constexpr (!std::is_same_v<C, T>) {
          constexpr DType own = dtype_of<C>;
          if (z == x && h == own) row = run_rows<T, C, T>(row, end);
          if (z == own && h == own) row = run_rows<C, C, T>(row, end);
          if (z == own && h == x) row = run_rows<C, T, T>(row, end);
        }
      }
    });
    return row;
  }

  template <class Z, class H, class X>
  int64_t run_rows(int64_t row, int64_t end) {
    const bool streamed = may_stream<C, X>(p_.dx, cols_) &&
                          (!p_.dresidual.data || may_stream<C, H>(p_.dresidual, cols_));
    if constexpr (std::is_same_v<Z, X> && std::is_same_v<H, X>)
      if (in_groups(p_.h, cols_) && in_groups(p_.dz, cols_))
        for (; row + group <= end; row += group) run_group<Z, H, X, group>(row, end, streamed);
    for (; row + 2 <= end; row += 2) run_group<Z, H, X, 2>(row, end, streamed);
    for (; row < end; ++row) run_group<Z, H, X, 1>(row, end, streamed);
    return row;
  }

  template <class Z, class H, class X, int R>
  void run_group(int64_t row, int64_t end, bool streamed) {
    read_ahead(p_.dz, row, R, end, cols_);
    read_ahead(p_.h, row, R, end, cols_);
    read_ahead(p_.dh, row, R, end, cols_);
    GradientRows<Z, H, X, R> rows;
    for (int r = 0; r < R; ++r) {
      rows.dz[r] = row_of(p_.dz, row + r).template as<Z>();
      rows.h[r] = row_of(p_.h, row + r).template as<H>();
      rows.dh[r] = row_of(p_.dh, row + r).template as<H>();
      rows.dx[r] = row_of(p_.dx, row + r).template as<X>();
      rows.dresidual[r] = row_of(p_.dresidual, row + r).template as<H>();
    }
    differentiate_rows(rows, row, streamed);
  }

  template <class Z, class H, class X, int R>
  ALWAYS_INLINE void differentiate_rows(const GradientRows<Z, H, X, R>& rows, int64_t row,
                                        bool streamed) {
    Projection<C> projections[R];
    for (int r = 0; r < R; ++r) projections[r] = statistics(row + r);
    if (rows.dx[0]) project<C, R>(rows, cols_, p_.rms, factor_vector_, projections);
    differentiate<C, R>(rows, cols_, factor_vector_, p_.x_hat_dtype, sums_, projections, streamed);
  }

  void run_row(int64_t row) {
    const bool through_row = p_.dx.data || p_.dresidual.data || p_.dgate;
    C* total = nullptr;
    if (p_.dz.data) {
      if (through_row) total = total_.get();
      const GradientRows<C, C, C, 1> rows{{in_compute_type(row_of(p_.dz, row), cols_, dz_copy_)},
                                          {in_compute_type(row_of(p_.h, row), cols_, h_copy_)},
                                          {nullptr},
                                          {total},
                                          {nullptr}};
      differentiate_rows(rows, row, false);
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
