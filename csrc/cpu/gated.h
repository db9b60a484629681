// The kernels of the gated norm, compiled as those of kernels.h, whose statistics they share.
//
// With s = silu(gate), s' its derivative, g = dy * weight and du the gradient of what is
// normalised:
//
//     gate last:   z = y(x) * s    dy = dz * s    dx = du        dgate = dz * y * s'
//     gate first:  z = y(x * s)    dy = dz        dx = du * s    dgate = du * x * s'
#pragma once

#include "kernels.h"

namespace {

using fusednorm::Gated;
using fusednorm::GatedForward;
using fusednorm::cpu::GatedBackward;

// Returns e^x to about one unit in the last place; no less than e^-87.
ALWAYS_INLINE Vector<float> exponential(Vector<float> x) {
  const Vector<float> zero{};
  x = x < -87.0f ? zero - 87.0f : x;
  x = x > 89.0f ? zero + 89.0f : x;  // e^89 is infinite; NaN stays
  // x = n * ln 2 + r with a whole n, which the last bits of `shifted` hold.
  constexpr float shift = 0x1.8p23f;
  const Vector<float> shifted = multiply_add(x, zero + 0x1.715476p+0f, zero + shift);
  const Vector<float> n = shifted - shift;
  // The upper part of ln 2 has so few digits that its multiples are exact.
  Vector<float> r = multiply_add(n, zero - 0x1.63p-1f, x);
  r = multiply_add(n, zero + 0x1.bd0106p-13f, r);
  Vector<float> sum = zero + 1.0f / 5040;
  constexpr float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float factor : factors) sum = multiply_add(sum, r, zero + factor);
  using Bits = VectorOf<int32_t, lanes<float>>;
  const Bits exponent = bits_as<Bits>(shifted) - bits_as<int32_t>(shift) + 127;
  return sum * bits_as<Vector<float>>(exponent << 23);
}
ALWAYS_INLINE Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class C>
ALWAYS_INLINE Vector<C> sigmoid(Vector<C> gate) {
  return 1 / (1 + exponential(-gate));
}

// Rows of x * silu(gate), kept in C.
template <class C, class T>
struct GatedRows {
  static constexpr bool forms = true;
  const T *x, *gate;
  C* product;

  ALWAYS_INLINE GatedRows one(int) const { return *this; }

  template <class P>
  ALWAYS_INLINE Vector<C> load(int, int64_t col, P part) const {
    const Vector<C> value = ::load<C>(gate + col, part);
    const Vector<C> result = ::load<C>(x + col, part) * (value * sigmoid<C>(value));
    store<C>(product + col, result, part);
    return result;
  }
  template <class P>
  ALWAYS_INLINE Vector<C> again(int, int64_t col, P part) const {
    return ::load<C>(product + col, part);
  }
  template <class P>
  ALWAYS_INLINE Vector<C> leave(int, int64_t col, P part) const {
    return ::load<C>(product + col, part);
  }
};

// What both directions do: find the elements of a place, which is one group of one row.
template <class C>
class Places {
 public:
  explicit Places(const Gated& p)
      : size_(p.group_size),
        groups_(p.groups()),
        weights_(p.weight, p.cols),
        biases_(p.bias, p.cols) {}

  int64_t size() const { return size_; }
  int64_t row(int64_t place) const { return place / groups_; }
  int64_t col(int64_t place) const { return place % groups_ * size_; }

  Row of(const Rows& rows, int64_t place) const {
    Row found = row_of(rows, row(place));
    if (found) found.data += col(place) * bytes(rows.dtype);
    return found;
  }

  const C* weight(int64_t place) { return at(weights_.of(0), place); }
  const C* bias(int64_t place) { return at(biases_.of(0), place); }

 private:
  const C* at(const C* vector, int64_t place) const {
    return vector ? vector + col(place) : nullptr;
  }

  int64_t size_, groups_;
  SampleVector<C> weights_, biases_;
};

template <class C>
class GatedNormalization {
 public:
  explicit GatedNormalization(const GatedForward& p)
      : p_(p),
        places_(p),
        x_(p.group_size),
        gate_(p.group_size),
        x_hat_(p.group_size),
        z_(p.group_size) {}

  void run(int64_t first, int64_t last) {
    const DType dtype = p_.z.dtype;
    if (p_.x.dtype == dtype && p_.gate_input.dtype == dtype)
      with_type(dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (computes<C, T>) {
          const bool streamed = may_stream<C, T>(p_.z, places_.size());
          for (; first < last; ++first)
            run_place(first, places_.of(p_.x, first).template as<T>(),
                      places_.of(p_.gate_input, first).template as<T>(),
                      places_.of(p_.z, first).template as<T>(), streamed);
        }
      });
    for (; first < last; ++first) {
      const C* x = in_compute_type(places_.of(p_.x, first), places_.size(), x_);
      const C* gate = in_compute_type(places_.of(p_.gate_input, first), places_.size(), gate_);
      C* z = z_.get();
      run_place(first, x, gate, z, false);
      const Row to = places_.of(p_.z, first);
      for_columns<C>(places_.size(), [&](int64_t col, auto part) {
        store_any<C>(to, col, load<C>(z + col, part), part);
      });
    }
  }

 private:
  template <class T>
  void run_place(int64_t place, const T* x, const T* gate, T* z, bool streamed) {
    C* const x_hat[1] = {x_hat_.get()};
    const Affine<C> none{nullptr, nullptr, nullptr, nullptr, p_.x_hat_dtype};
    Statistics<C> statistics[1];
    if (p_.gate_first) {
      const GatedRows<C, T> source{x, gate, x_hat[0]};
      normalize<C, 1, C>(source, x_hat, places_.size(), p_.rms, p_.eps, none, false, statistics);
    } else {
      const StoredRows<C, T, 1> source{{x}};
      normalize<C, 1, C>(source, x_hat, places_.size(), p_.rms, p_.eps, none, false, statistics);
    }
    if (p_.mean) static_cast<C*>(p_.mean)[place] = statistics[0].mean;
    if (p_.rstd) static_cast<C*>(p_.rstd)[place] = statistics[0].rstd;
    const C *weight = places_.weight(place), *bias = places_.bias(place);
    const bool gate_last = !p_.gate_first;
    const auto finish = [&](auto streamed) {
      for_columns<C>(places_.size(), [&](int64_t col, auto part) {
        Vector<C> value = load<C>(x_hat[0] + col, part);
        if (weight) value *= load<C>(weight + col, part);
        if (bias) value += load<C>(bias + col, part);
        if (gate_last) {
          const Vector<C> g = load<C>(gate + col, part);
          value *= g * sigmoid<C>(g);
        }
        put<C>(z + col, value, part, streamed);
      });
    };
    if (streamed)
      finish(std::true_type{});
    else
      finish(std::false_type{});
  }

  const GatedForward& p_;
  Places<C> places_;
  Buffer<C> x_, gate_, x_hat_, z_;
};

template <class C>
class GatedDifferentiation {
 public:
  explicit GatedDifferentiation(const GatedBackward& p)
      : p_(p),
        places_(p),
        dz_(p.group_size),
        x_(p.group_size),
        gate_(p.group_size),
        dx_(p.group_size),
        dgate_(p.group_size),
        x_hat_(p.group_size),
        g_(p.group_size),
        silu_(p.group_size),
        x_dsilu_(p.group_size),
        dy_x_hat_(p.cols),
        dy_(p.cols) {
    sums_x_hat_ = p.dweight ? dy_x_hat_.zeros() : nullptr;
    sums_ = p.dbias ? dy_.zeros() : nullptr;
  }

  void run(int64_t task) {
    C* dweight = zeroed(p_.dweight, task);
    C* dbias = zeroed(p_.dbias, task);
    const int64_t last = p_.rows * (task + 1) / p_.tasks;
    for (int64_t row = p_.rows * task / p_.tasks; row < last;) {
      const int64_t end = min_of(last, row + rows_per_sum);
      run_places(row * p_.groups(), end * p_.groups());
      move(sums_x_hat_, dweight);
      move(sums_, dbias);
      row = end;
    }
  }

 private:
  // Sums over so many rows are added up in the compute type before they join longer ones.
  static constexpr int64_t rows_per_sum = 128;

  C* zeroed(void* partials, int64_t task) {
    if (partials == nullptr) return nullptr;
    C* row = static_cast<C*>(partials) + task * p_.cols;
    return static_cast<C*>(memset(row, 0, p_.cols * sizeof(C)));
  }

  // Adds sums to longer ones, and starts them anew.
  void move(C* from, C* to) {
    if (from == nullptr) return;
    for_columns<C>(p_.cols, [&](int64_t col, auto part) {
      store<C>(to + col, load<C>(to + col, part) + load<C>(from + col, part), part);
      store<C>(from + col, Vector<C>{}, part);
    });
  }

  void run_places(int64_t place, int64_t last) {
    const DType dtype = p_.x.dtype;
    const int64_t size = places_.size();
    if (p_.gate_input.dtype == dtype && p_.dz.dtype == dtype)
      with_type(dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (computes<C, T>) {
          const auto at = [&](const Rows& rows) {
            return places_.of(rows, place).template as<T>();
          };
          const bool streamed =
              may_stream<C, T>(p_.dx, size) && may_stream<C, T>(p_.dgate_input, size);
          for (; place < last; ++place)
            run_place<T>(place, at(p_.dz), at(p_.x), at(p_.gate_input), at(p_.dx),
                         at(p_.dgate_input), streamed);
        }
      });
    for (; place < last; ++place) {
      const auto in = [&](const Rows& rows, Buffer<C>& copy) {
        return in_compute_type(places_.of(rows, place), size, copy);
      };
      C* dx = p_.dx.data ? dx_.get() : nullptr;
      C* dgate = p_.dgate_input.data ? dgate_.get() : nullptr;
      run_place<C>(place, in(p_.dz, dz_), in(p_.x, x_), in(p_.gate_input, gate_), dx, dgate, false);
      put_back(dx, places_.of(p_.dx, place));
      put_back(dgate, places_.of(p_.dgate_input, place));
    }
  }

  void put_back(const C* from, const Row& to) {
    if (from == nullptr) return;
    for_columns<C>(places_.size(), [&](int64_t col, auto part) {
      store_any<C>(to, col, load<C>(from + col, part), part);
    });
  }

  template <class T>
  void run_place(int64_t place, const T* dz, const T* x, const T* gate, T* dx, T* dgate,
                 bool streamed) {
    if (p_.gate_first && streamed)
      differentiate<T>(place, dz, x, gate, dx, dgate, std::true_type{}, std::true_type{});
    else if (p_.gate_first)
      differentiate<T>(place, dz, x, gate, dx, dgate, std::true_type{}, std::false_type{});
    else if (streamed)
      differentiate<T>(place, dz, x, gate, dx, dgate, std::false_type{}, std::true_type{});
    else
      differentiate<T>(place, dz, x, gate, dx, dgate, std::false_type{}, std::false_type{});
  }

  template <class T, class First, class Streamed>
  void differentiate(int64_t place, const T* dz, const T* x, const T* gate, T* dx, T* dgate, First,
                     Streamed streamed) {
    constexpr bool gate_first = First::value;
    const int64_t size = places_.size(), first_col = places_.col(place);
    const C *weight = places_.weight(place), *bias = places_.bias(place);
    const C mean = p_.mean ? static_cast<const C*>(p_.mean)[place] : C(0);
    const C rstd = static_cast<const C*>(p_.rstd)[place];
    C* sums_x_hat = sums_x_hat_ ? sums_x_hat_ + first_col : nullptr;
    C* sums_dy = sums_ ? sums_ + first_col : nullptr;
    C *x_hats = x_hat_.get(), *gs = g_.get();
    C *silus = gate_first ? silu_.get() : nullptr,
      *x_dsilus = gate_first ? x_dsilu_.get() : nullptr;
    const DType x_hat_dtype = p_.x_hat_dtype;
    double totals[2];
    sum_columns<C>(size, totals, [&](int64_t col, auto part, Vector<C>* sums) {
      const Vector<C> gate_value = load<C>(gate + col, part), input = load<C>(x + col, part);
      const Vector<C> factor = sigmoid<C>(gate_value), silu = gate_value * factor;
      const Vector<C> dsilu = multiply_add(silu, 1 - factor, factor);
      const Vector<C> x_hat = ((gate_first ? input * silu : input) - mean) * rstd;
      const Vector<C> value = load<C>(dz + col, part), dy = gate_first ? value : value * silu;
      const Vector<C> g = weight ? dy * load<C>(weight + col, part) : dy;
      sums[0] = multiply_add(g, x_hat, sums[0]);
      sums[1] += g;
      const Vector<C> affine_input = rounded<C>(x_hat, x_hat_dtype);
      if (sums_x_hat) {
        const Vector<C> sum = load<C>(sums_x_hat + col, part);
        store<C>(sums_x_hat + col, multiply_add(dy, affine_input, sum), part);
      }
      if (sums_dy) store<C>(sums_dy + col, load<C>(sums_dy + col, part) + dy, part);
      store<C>(x_hats + col, x_hat, part);
      store<C>(gs + col, g, part);
      if (gate_first) {
        store<C>(silus + col, silu, part);
        store<C>(x_dsilus + col, input * dsilu, part);
      } else if (dgate) {
        Vector<C> y = affine_input;
        if (weight) y *= load<C>(weight + col, part);
        if (bias) y += load<C>(bias + col, part);
        put<C>(dgate + col, value * y * dsilu, part, streamed);
      }
    });
    if (!dx && !(gate_first && dgate)) return;
    const Vector<C> c1 = Vector<C>{} + C(-totals[0] / size);
    const Vector<C> c2 = Vector<C>{} + (p_.rms ? C(0) : C(-totals[1] / size));
    for_columns<C>(size, [&](int64_t col, auto part) {
      const Vector<C> projection = multiply_add(load<C>(x_hats + col, part), c1, c2);
      Vector<C> du = (load<C>(gs + col, part) + projection) * rstd;
      if (gate_first) {
        if (dgate) put<C>(dgate + col, du * load<C>(x_dsilus + col, part), part, streamed);
        du *= load<C>(silus + col, part);
      }
      if (dx) put<C>(dx + col, du, part, streamed);
    });
  }

  const GatedBackward& p_;
  Places<C> places_;
  Buffer<C> dz_, x_, gate_, dx_, dgate_;  // of one place, where its types differ
  Buffer<C> x_hat_, g_, silu_, x_dsilu_;  // of one place, from the first pass over it
  Buffer<C> dy_x_hat_, dy_;
  C *sums_x_hat_, *sums_;  // over rows, of dy * x_hat and of dy; null where not wanted
};

void run_gated_forward(const GatedForward& p, int64_t first_place, int64_t last_place) {
  if (p.compute == DType::f64)
    GatedNormalization<double>(p).run(first_place, last_place);
  else
    GatedNormalization<float>(p).run(first_place, last_place);
  end_of_stream();
}

template <class C>
void gated_tasks(const GatedBackward& p, int64_t first, int64_t last) {
  GatedDifferentiation<C> differentiation(p);
  for (int64_t task = first; task < last; ++task) differentiation.run(task);
}

void run_gated_backward(const GatedBackward& p, int64_t first_task, int64_t last_task) {
  if (p.compute == DType::f64)
    gated_tasks<double>(p, first_task, last_task);
  else
    gated_tasks<float>(p, first_task, last_task);
  end_of_stream();
}

}  // namespace
