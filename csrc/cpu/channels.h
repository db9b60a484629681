// Norms over the channels of [B, C, S], where they lie: the positions of a channel are adjacent.
//
// A vector holds the same channel of lanes<C> positions, so the sums over the channels need no sum
// across lanes, and what becomes of a position depends on no other. A run of positions is walked
// twice: the second time it is found in cache.
#pragma once

#include "kernels.h"

namespace {

using fusednorm::cpu::Channels;
using fusednorm::cpu::ChannelsBackward;
using fusednorm::cpu::ChannelsForward;
using fusednorm::cpu::Planes;

// The most vectors of positions that are worked on together.
constexpr int widest_run = 4;

// A run of `count` positions from `position` on, in at most widest_run vectors. The last vector
// ends where the run does: it may share its first `shared` positions with the one before it.
template <class C>
struct Run {
  int64_t image, position, count;

  int vectors() const { return int((count + lanes<C> - 1) / lanes<C>); }
  int64_t offset(int v) const {
    const int64_t last = count > lanes<C> ? count - lanes<C> : 0;
    return v * lanes<C> < last ? v * lanes<C> : last;
  }
  int shared() const { return count > lanes<C> ? int(vectors() * lanes<C> - count) : 0; }
};

// Calls f(run, vectors, part) for the runs of a unit. No run is narrower than a vector unless the
// image is.
template <class C, class F>
ALWAYS_INLINE void for_runs(const Channels& p, int64_t unit, F&& f) {
  constexpr int64_t widest = widest_run * lanes<C>;
  const int64_t in_image = unit % p.units_per_image;
  const int64_t end = in_image + 1 == p.units_per_image
                          ? p.positions()
                          : (in_image + 1) * fusednorm::cpu::unit_positions;
  int64_t position = in_image * fusednorm::cpu::unit_positions;
  while (position < end) {
    const int64_t left = end - position;
    int64_t count = min_of(left, widest);
    if (left > widest && left < widest + lanes<C>) count = widest - lanes<C>;
    const Run<C> run{unit / p.units_per_image, position, count};
    switch (run.vectors()) {
      case 4: f(run, std::integral_constant<int, 4>{}, Whole{}); break;
      case 3: f(run, std::integral_constant<int, 3>{}, Whole{}); break;
      case 2: f(run, std::integral_constant<int, 2>{}, Whole{}); break;
      default:
        if (count == lanes<C>)
          f(run, std::integral_constant<int, 1>{}, Whole{});
        else
          f(run, std::integral_constant<int, 1>{}, Part{int(count)});
    }
    position += count;
  }
}

// Where the first channel of a run lies.
template <class T, class C>
ALWAYS_INLINE T* start_of(const Planes& planes, const Run<C>& run) {
  if (planes.data == nullptr) return nullptr;
  return static_cast<T*>(planes.data) + run.image * planes.batch_stride + run.position;
}

// Planes of which every element is of type T, or, where that is void, of the one that they name.
template <class C, class T>
struct Plane {
  T* data;
  int64_t channel_stride;

  Plane(const Planes& planes, const Run<C>& run)
      : data(start_of<T>(planes, run)), channel_stride(planes.channel_stride) {}

  template <class P>
  ALWAYS_INLINE Vector<C> load(int64_t channel, int64_t offset, P part) const {
    return ::load<C>(data + channel * channel_stride + offset, part);
  }
  template <class P, class S>
  ALWAYS_INLINE void store(int64_t channel, int64_t offset, Vector<C> value, P part, S past) const {
    put<C>(data + channel * channel_stride + offset, value, part, past);
  }

  // Whether whole vectors, which are not read again soon, can be stored past the cache.
  bool may_stream(const Planes& planes) const {
    return planes.beyond_cache && channel_stride % lanes<C> == 0 &&
           reinterpret_cast<uintptr_t>(data) % (lanes<C> * sizeof(T)) == 0;
  }
};

template <class C>
struct Plane<C, void> {
  Row row;
  int64_t channel_stride;

  Plane(const Planes& planes, const Run<C>& run) : channel_stride(planes.channel_stride) {
    const int64_t first = run.image * planes.batch_stride + run.position;
    row = {static_cast<char*>(planes.data) + first * bytes(planes.dtype), planes.dtype};
  }

  template <class P>
  ALWAYS_INLINE Vector<C> load(int64_t channel, int64_t offset, P part) const {
    return load_any<C>(row, channel * channel_stride + offset, part);
  }
  template <class P, class S>
  ALWAYS_INLINE void store(int64_t channel, int64_t offset, Vector<C> value, P part, S) const {
    store_any<C>(row, channel * channel_stride + offset, value, part);
  }
  bool may_stream(const Planes&) const { return false; }
};

// Calls f with whether the planes are stored past the cache, without a branch in its loops.
template <class Plane, class F>
ALWAYS_INLINE void with_streaming(const Plane& plane, const Planes& planes, F&& f) {
  if (plane.may_stream(planes))
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Calls f with a value of the type of both, or with nullptr where they differ or are not of C.
template <class C, class F>
ALWAYS_INLINE void with_one_type(DType a, DType b, F&& f) {
  if (a != b) return f(nullptr);
  with_type(a, [&](auto type) {
    if constexpr (computes<C, decltype(type)>) f(type);
  });
}
template <class T>
using element_of = std::conditional_t<std::is_same_v<T, std::nullptr_t>, void, T>;

// Sums over channels, K of them for each position of V vectors. Blocks of channels are added up in
// double, so that many channels lose no digits.
template <class C, int V, int K, class F>
ALWAYS_INLINE void sum_channels(int64_t channels, double (&totals)[K][V * lanes<C>], F&& f) {
  constexpr int64_t block = 64;
  for (auto& total : totals)
    for (double& one : total) one = 0.0;
  for (int64_t first = 0; first < channels; first += block) {
    Vector<C> sums[K][V] = {};
    const int64_t last = min_of(channels, first + block);
    for (int64_t channel = first; channel < last; ++channel) f(channel, sums);
    for (int k = 0; k < K; ++k) {
      C lane[V * lanes<C>];
      for (int v = 0; v < V; ++v) store<C>(lane + v * lanes<C>, sums[k][v]);
      for (int i = 0; i < V * lanes<C>; ++i) totals[k][i] += double(lane[i]);
    }
  }
}

// Writes about the mean of each position: that of a few channels.
template <class C, int V, class F>
ALWAYS_INLINE void near_means(int64_t channels, Vector<C> (&centre)[V], F&& load) {
  const int64_t pieces = min_of(channels, 4);
  for (Vector<C>& one : centre) one = Vector<C>{};
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int v = 0; v < V; ++v) centre[v] += load(channels / pieces * piece, v);
  for (Vector<C>& one : centre) one /= C(pieces);
}

template <class C>
class ChannelNormalization {
 public:
  explicit ChannelNormalization(const ChannelsForward& p)
      : p_(p), weights_(p.weight, p.cols), biases_(p.bias, p.cols) {
    weight_ = weights_.of(0);
    bias_ = biases_.of(0);
  }

  void run(int64_t first, int64_t last) {
    with_one_type<C>(p_.x.dtype, p_.z.dtype, [&](auto type) {
      using T = element_of<decltype(type)>;
      for (int64_t unit = first; unit < last; ++unit)
        for_runs<C>(p_, unit, [&](const Run<C>& run, auto vectors, auto part) {
          normalize<T, vectors>(run, part);
        });
    });
  }

 private:
  template <class T, int V, class P>
  void normalize(const Run<C>& run, P part) {
    const Plane<C, T> x(p_.x, run);
    const int64_t channels = p_.cols;
    const auto load_x = [&](int64_t channel, int v) {
      return x.load(channel, run.offset(v), part);
    };
    Vector<C> centre[V] = {};
    if (!p_.rms) near_means<C, V>(channels, centre, load_x);
    double totals[2][V * lanes<C>];
    const auto sum_centred = [&] {
      sum_channels<C, V>(channels, totals, [&](int64_t channel, auto& sums) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vector<C> centred = load_x(channel, v) - centre[v];
          sums[0][v] += centred;
          sums[1][v] = multiply_add(centred, centred, sums[1][v]);
        }
      });
    };
    sum_centred();
    if (recentre<V>(totals, centre)) sum_centred();
    Vector<C> rstd[V], offset[V];
    finish<V>(run, totals, centre, rstd, offset, part);
    const Plane<C, T> z(p_.z, run);
    with_streaming(z, p_.z, [&](auto past) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        const Vector<C> weight = Vector<C>{} + (weight_ ? weight_[channel] : C(1));
        const Vector<C> bias = Vector<C>{} + (bias_ ? bias_[channel] : C(0));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vector<C> x_hat = multiply_add(load_x(channel, v) - centre[v], rstd[v], offset[v]);
          z.store(channel, run.offset(v), multiply_add(x_hat, weight, bias), part, past);
        }
      }
    });
  }

  // Moves the centres with which digits would cancel to the means; returns whether there are any.
  // The others stay, so that no position depends on its neighbours.
  template <int V>
  bool recentre(const double (&totals)[2][V * lanes<C>], Vector<C> (&centre)[V]) const {
    if (p_.rms) return false;
    C shift[V * lanes<C>];
    int any = 0;
    for (int i = 0; i < V * lanes<C>; ++i) {
      const double correction = totals[0][i] / p_.cols, square = correction * correction;
      const bool keeps = square <= 0.25 * (totals[1][i] / p_.cols - square);
      shift[i] = keeps ? C(0) : C(correction);
      any |= !keeps;
    }
    if (any)
      for (int v = 0; v < V; ++v) centre[v] += load<C>(shift + v * lanes<C>);
    return any;
  }

  template <int V, class P>
  void finish(const Run<C>& run, const double (&totals)[2][V * lanes<C>],
              const Vector<C> (&centre)[V], Vector<C> (&rstd)[V], Vector<C> (&offset)[V], P part) {
    C inverses[V * lanes<C>], corrections[V * lanes<C>], offsets[V * lanes<C>];
    for (int i = 0; i < V * lanes<C>; ++i) {
      const double correction = p_.rms ? 0.0 : totals[0][i] / p_.cols;
      const double variance = totals[1][i] / p_.cols - correction * correction;
      const double inverse = 1.0 / __builtin_sqrt(variance + p_.eps);
      inverses[i] = C(inverse);
      corrections[i] = C(correction);
      offsets[i] = C(-correction * inverse);
    }
    const int64_t row = run.image * p_.positions() + run.position;
    for (int v = 0; v < V; ++v) {
      rstd[v] = load<C>(inverses + v * lanes<C>);
      offset[v] = load<C>(offsets + v * lanes<C>);
      const int64_t at = row + run.offset(v);
      if (p_.mean) {
        const Vector<C> mean = centre[v] + load<C>(corrections + v * lanes<C>);
        store<C>(static_cast<C*>(p_.mean) + at, mean, part);
      }
      if (p_.rstd) store<C>(static_cast<C*>(p_.rstd) + at, rstd[v], part);
    }
  }

  const ChannelsForward& p_;
  SampleVector<C> weights_, biases_;
  const C *weight_, *bias_;
};

template <class C>
class ChannelDifferentiation {
 public:
  explicit ChannelDifferentiation(const ChannelsBackward& p)
      : p_(p), weights_(p.weight, p.cols), dz_x_hat_(p.cols * lanes<C>), dz_(p.cols * lanes<C>) {
    weight_ = weights_.of(0);
  }

  void run(int64_t task) {
    sums_[0] = p_.dweight ? dz_x_hat_.zeros() : nullptr;
    sums_[1] = p_.dbias ? dz_.zeros() : nullptr;
    with_one_type<C>(p_.x.dtype, p_.dz.dtype, [&](auto type) {
      using T = element_of<decltype(type)>;
      const int64_t last = p_.units * (task + 1) / p_.tasks;
      for (int64_t unit = p_.units * task / p_.tasks; unit < last; ++unit)
        for_runs<C>(p_, unit, [&](const Run<C>& run, auto vectors, auto part) {
          differentiate<T, vectors>(run, part);
        });
    });
    add_up(sums_[0], p_.dweight, task);
    add_up(sums_[1], p_.dbias, task);
  }

 private:
  template <class T, int V, class P>
  void differentiate(const Run<C>& run, P part) {
    const Plane<C, T> x(p_.x, run), dz(p_.dz, run), dx(p_.dx, run);
    const int64_t row = run.image * p_.positions() + run.position;
    Vector<C> mean[V] = {}, rstd[V];
    for (int v = 0; v < V; ++v) {
      const int64_t at = row + run.offset(v);
      if (p_.mean) mean[v] = load<C>(static_cast<const C*>(p_.mean) + at, part);
      rstd[v] = load<C>(static_cast<const C*>(p_.rstd) + at, part);
    }
    const auto new_lanes = lanes_from(run.shared());
    double totals[2][V * lanes<C>];
    sum_channels<C, V>(p_.cols, totals, [&](int64_t channel, auto& sums) {
      const Vector<C> weight = Vector<C>{} + (weight_ ? weight_[channel] : C(1));
      Vector<C> dz_x_hat{}, dz_sum{};
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vector<C> centred = x.load(channel, run.offset(v), part) - mean[v];
        Vector<C> value = dz.load(channel, run.offset(v), part);
        const Vector<C> g = value * weight;
        sums[0][v] = multiply_add(g, centred, sums[0][v]);
        sums[1][v] += g;
        Vector<C> x_hat = centred * rstd[v];
        if (v == V - 1 && V > 1) {
          value = new_lanes ? value : Vector<C>{};
          x_hat = new_lanes ? x_hat : Vector<C>{};
        }
        dz_x_hat = multiply_add(value, x_hat, dz_x_hat);
        dz_sum += value;
      }
      add(sums_[0], channel, dz_x_hat);
      add(sums_[1], channel, dz_sum);
    });
    if (p_.dx.data == nullptr) return;
    Vector<C> c1[V], c2[V];
    for (int v = 0; v < V; ++v) {
      C means[2][lanes<C>];
      for (int k = 0; k < 2; ++k)
        for (int i = 0; i < lanes<C>; ++i) means[k][i] = C(-totals[k][v * lanes<C> + i] / p_.cols);
      c1[v] = load<C>(means[0]) * rstd[v];
      c2[v] = p_.rms ? Vector<C>{} : load<C>(means[1]);
    }
    with_streaming(dx, p_.dx, [&](auto past) {
      for (int64_t channel = 0; channel < p_.cols; ++channel) {
        const Vector<C> weight = Vector<C>{} + (weight_ ? weight_[channel] : C(1));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vector<C> x_hat = (x.load(channel, run.offset(v), part) - mean[v]) * rstd[v];
          const Vector<C> g = dz.load(channel, run.offset(v), part) * weight;
          const Vector<C> total = (g + multiply_add(x_hat, c1[v], c2[v])) * rstd[v];
          dx.store(channel, run.offset(v), total, part, past);
        }
      }
    });
  }

  // Returns which lanes are not below `first`.
  static auto lanes_from(int first) {
    Vector<C> lane;
    for (int i = 0; i < lanes<C>; ++i) lane[i] = C(i);
    return lane >= C(first);
  }

  // Adds to the sums of a channel, one for each lane.
  static void add(C* sums, int64_t channel, Vector<C> value) {
    if (sums == nullptr) return;
    C* const to = sums + channel * lanes<C>;
    store<C>(to, load<C>(to) + value);
  }

  void add_up(const C* sums, void* partials, int64_t task) const {
    if (partials == nullptr) return;
    C* const to = static_cast<C*>(partials) + task * p_.cols;
    for (int64_t channel = 0; channel < p_.cols; ++channel)
      to[channel] = add_lanes<C, lanes<C>>(load<C>(sums + channel * lanes<C>));
  }

  const ChannelsBackward& p_;
  SampleVector<C> weights_;
  Buffer<C> dz_x_hat_, dz_;
  const C* weight_;
  C* sums_[2] = {};
};

void run_channels_forward(const ChannelsForward& p, int64_t first_unit, int64_t last_unit) {
  if (p.compute == DType::f64)
    ChannelNormalization<double>(p).run(first_unit, last_unit);
  else
    ChannelNormalization<float>(p).run(first_unit, last_unit);
  end_of_stream();
}

template <class C>
void channel_tasks(const ChannelsBackward& p, int64_t first, int64_t last) {
  ChannelDifferentiation<C> differentiation(p);
  for (int64_t task = first; task < last; ++task) differentiation.run(task);
}

void run_channels_backward(const ChannelsBackward& p, int64_t first_task, int64_t last_task) {
  if (p.compute == DType::f64)
    channel_tasks<double>(p, first_task, last_task);
  else
    channel_tasks<float>(p, first_task, last_task);
  end_of_stream();
}

}  // namespace
