// The forward kernel and its launcher.
#include "layer_norm.h"
#include "rows.h"

namespace fusednorm::cuda {
namespace {

struct ForwardParameter : Forward {
  bool vectors;
  int width;  // columns of a block
  float inverse_cols;
  float epsilon;
  Parameter scaled, shifted;
};

// Where the columns of a block lie: their mean is start + mean, the squares of their distances from
// it add up to m2.
struct Moments {
  float start, mean, m2;
};

// The moments of the whole row from those of the blocks of a cluster (Chan, Golub and LeVeque,
// *Updating formulae and a pairwise algorithm for computing sample variances*, 1979), in one
// exchange. Distances are taken from the start of the first block, so that a large mean cancels
// before anything is rounded.
DEVICE Moments merge(const Moments& own, const ForwardParameter& p, float* slots) {
  const int blocks = cluster_size();
  if (thread_index() == 0) {
    shared_store(slots + 0, own.start);
    shared_store(slots + 1, own.mean);
    shared_store(slots + 2, own.m2);
  }
  sync_cluster();
  const float start = peer_load(slots, 0);
  float sum = 0.0f;
  for (int rank = 0; rank < blocks; ++rank) {
    const Span span = span_of(int(p.cols), rank, p.width);
    const float distance = peer_load(slots, rank) - start + peer_load(slots + 1, rank);
    sum = multiply_add(float(span.end - span.begin), distance, sum);
  }
  const float mean = divide(sum, float(p.cols), p.inverse_cols);
  float m2 = 0.0f;
  for (int rank = 0; rank < blocks; ++rank) {
    const Span span = span_of(int(p.cols), rank, p.width);
    const float distance = peer_load(slots, rank) - start + peer_load(slots + 1, rank) - mean;
    m2 +=
        multiply_add(float(span.end - span.begin) * distance, distance, peer_load(slots + 2, rank));
  }
  return {start, mean, m2};
}

// Forms h of a chunk of x, residual and dropout. `stored` is null where it is not to be stored.
template <class T, bool VECTORS>
DEVICE void form_h(const ForwardParameter& p, int64_t row, int col, int left, const T* residual,
                   T* stored, float (&h)[chunk<T>]) {
  if (p.dropout.seed && left > 0) {
    float keep[chunk<T>];
    keep_factors(p.dropout, row, col, keep);
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) h[i] *= keep[i];
  }
  if (p.residual.data) {
    float added[chunk<T>];
    to_floats<T>(load_chunk<T, VECTORS>(residual, left), added);
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) h[i] += added[i];
  }
  const Words rounded = from_floats<T>(h);
  if (p.h.data && stored) store_chunk<T, VECTORS>(stored, left, rounded);
  to_floats<T>(rounded, h);  // the statistics are those of the h that the next layer sees
}

template <int TIER, class T, bool STREAM, bool VECTORS>
DEVICE void normalise(const ForwardParameter& p) {
  constexpr Tier tier = forward_tiers[TIER];
  constexpr int size = chunk<T>, chunks = tier.elements / size, rows = rows_at_once(tier);
  // What the mean's own rounding leaves of 16 bits is below theirs.
  constexpr bool corrects = sizeof(T) == 4;
  constexpr int terms = corrects ? 2 : 1;
  constexpr bool split = TIER >= first_shared_forward;
  const int rank = split ? rank_in_cluster() : 0;
  const Span span = split ? span_of(int(p.cols), rank, p.width) : Span{0, int(p.cols)};
  const Group<tier.threads, certain(forward_tiers, TIER), T> group{span};
  const int64_t block = split ? cluster_index() : block_index();
  const int64_t first = (block * tier.groups() + group.index()) * rows;
  const int64_t ahead = tier.groups() * rows > 1 ? p.rows - first : 1;
  const int present = int(ahead < rows ? ahead : rows);
  float* slots = shared<float>(0);
  int phase = 0;

  // A group beyond the last row computes that one again and writes nothing.
  float h[rows][chunks][size] = {};
  int64_t row = first + (present < 1 ? present - 1 : 0);
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (r > 0 && r < present) ++row;
    const T* x = settled(row_of<T>(p.x, row) + group.col(0));
#pragma unroll
    for (int k = 0; k < chunks && !group.ends_before(k); ++k)
      to_floats<T>(load_chunk<T, VECTORS>(x + k * group.step(), group.left(k)), h[r][k]);
    if constexpr (STREAM) {
      const T* residual = settled(row_of<T>(p.residual, row) + group.col(0));
      T* const stored = settled(row_of<T>(p.h, row) + group.col(0));
#pragma unroll
      for (int k = 0; k < chunks && !group.ends_before(k); ++k)
        form_h<T, VECTORS>(p, row, group.col(k), group.left(k), residual + k * group.step(),
                           r < present ? stored + k * group.step() : nullptr, h[r][k]);
    }
  }

  const float count = float(span.end - span.begin);
  const float inverse = split ? reciprocal(count) : p.inverse_cols;
  float start[rows] = {};
  if (!p.rms) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int k = 0; k < chunks && !group.ends_before(k); ++k) {
#pragma unroll
        for (const float value : h[r][k]) start[r] += value;
      }
    }
    add_up<tier.threads, false>(start, slots, phase);
#pragma unroll
    for (float& value : start) value = divide(value, count, inverse);
  }
  // Of the distances from `start`: the squares are the variance, the sums what rounding left in it.
  float sums[terms * rows] = {};
#pragma unroll
  for (int r = 0; r < rows; ++r) {
#pragma unroll
    for (int k = 0; k < chunks && !group.ends_before(k); ++k) {
      const float from = !VECTORS || group.left(k) > 0 ? start[r] : 0.0f;
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const float distance = VECTORS || i < group.left(k) ? h[r][k][i] - from : 0.0f;
        sums[terms * r] = multiply_add(distance, distance, sums[terms * r]);
        if constexpr (corrects) sums[terms * r + 1] += distance;
      }
    }
  }
  add_up<tier.threads, false>(sums, slots, phase);

  float rstd[rows], offset[rows] = {};
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    Moments moments{start[r], 0.0f, sums[terms * r]};
    if (corrects && !p.rms) {
      const float residue = sums[terms * r + terms - 1];
      moments.mean = residue * inverse;
      moments.m2 = multiply_add(-residue, moments.mean, moments.m2);
    }
    if constexpr (split) moments = merge(moments, p, slots + 2 * terms * tier.warps());
    start[r] = moments.start;
    rstd[r] = inverse_sqrt(multiply_add(moments.m2, p.inverse_cols, p.epsilon));
    if (corrects || split) offset[r] = -moments.mean * rstd[r];
    if (group.lane() == 0 && r < present && rank == 0) {
      if (p.mean) store(static_cast<float*>(p.mean) + first + r, moments.start + moments.mean);
      if (p.rstd) store(static_cast<float*>(p.rstd) + first + r, rstd[r]);
    }
  }

  T* z[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) z[r] = settled(row_of<T>(p.z, first + r) + group.col(0));
#pragma unroll
  for (int k = 0; k < chunks && !group.ends_before(k); ++k) {
    float weight[size], bias[size];
    load_parameter<T, VECTORS>(p.scaled, group.col(k), group.left(k), 1.0f, weight);
    load_parameter<T, VECTORS>(p.shifted, group.col(k), group.left(k), 0.0f, bias);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float value[size];
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const float x_hat = multiply_add(h[r][k][i] - start[r], rstd[r], offset[r]);
        value[i] = multiply_add(x_hat, weight[i], bias[i]);
      }
      store_chunk<T, VECTORS>(z[r] + k * group.step(), r < present ? group.left(k) : 0,
                              from_floats<T>(value));
    }
  }
  if constexpr (split) sync_cluster();  // no block ends while another reads its shared memory
}

// T: rows. STREAM: h is not x, but formed of x, residual and dropout. A block has as many threads
// as its part of a row needs.
template <int TIER, class T, bool STREAM>
KERNEL(forward_tiers[TIER].most_threads(), forward_blocks(forward_tiers[TIER], sizeof(T), STREAM))
layer_norm_fwd_kernel(PARAMETER(ForwardParameter) p) {
  if constexpr (TIER >= first_shared_forward && !can_split) return;
  if (p.vectors)
    normalise<TIER, T, STREAM, true>(p);
  else
    normalise<TIER, T, STREAM, false>(p);
}

}  // namespace

const char* layer_norm_fwd(const Forward& problem, void* stream) {
  Processors device;
  if (const char* error = processors(device)) return error;
  const Shape shape = forward_shape(problem.cols, device.have_clusters);
  if (shape.tier < 0) return too_long;
  ForwardParameter p{problem,
                     have_vectors(problem, {problem.x, problem.residual, problem.h, problem.z}),
                     0,
                     1.0f / float(problem.cols),
                     float(problem.eps),
                     {problem.weight, problem.x.dtype},
                     {problem.bias, problem.x.dtype}};
  const Tier tier = forward_tiers[shape.tier];
  Launch how;
  how.cluster = shape.cluster;
  how.blocks = divide_up(p.rows, rows_at_once(tier) * tier.groups()) * shape.cluster;
  how.shared_bytes = (4 * tier.warps() + 3) * sizeof(float);
  return with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    p.width = width_of<T>(p.cols, shape.cluster);
    how.threads = tier.block(p.width);
    return with_tier<count_of_forward_tiers>(shape.tier, [&](auto index) {
      constexpr int tier = decltype(index)::value;
      return p.h_dtype == DType::none
                 ? launch(layer_norm_fwd_kernel<tier, T, false>, p, how, stream)
                 : launch(layer_norm_fwd_kernel<tier, T, true>, p, how, stream);
    });
  });
}

}  // namespace fusednorm::cuda
