// The forward kernel and its launcher.
#include "layer_norm.h"
#include "rows.h"

namespace fusednorm::cuda {
namespace {

struct ForwardParameter : Forward {
  bool vectors;
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
DEVICE Moments merge(const Moments& own, int64_t cols, float* slots) {
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
    const Span span = span_of(cols, rank, blocks, false);
    const float distance = peer_load(slots, rank) - start + peer_load(slots + 1, rank);
    sum = multiply_add(float(span.end - span.begin), distance, sum);
  }
  const float mean = sum / float(cols);
  float m2 = 0.0f;
  for (int rank = 0; rank < blocks; ++rank) {
    const Span span = span_of(cols, rank, blocks, false);
    const float distance = peer_load(slots, rank) - start + peer_load(slots + 1, rank) - mean;
    m2 +=
        multiply_add(float(span.end - span.begin) * distance, distance, peer_load(slots + 2, rank));
  }
  return {start, mean, m2};
}

// T: rows, W: weight and bias. STREAM: h is not x, but formed of x, residual and dropout. SPLIT:
// the blocks of a cluster share a row.
template <int TIER, class T, class W, bool STREAM, bool SPLIT>
KERNEL(forward_tiers[TIER].block(), forward_blocks(forward_tiers[TIER], sizeof(T)))
layer_norm_fwd_kernel(PARAMETER(ForwardParameter) p) {
  if constexpr (SPLIT && !can_split) return;
  constexpr Tier tier = forward_tiers[TIER];
  constexpr int groups = tier.groups(), chunks = tier.elements / chunk;
  // Short rows: several for each group, so that a thread has 32 elements in flight.
  constexpr int rows_at_once = tier.threads <= 32 ? 32 / tier.elements : 1;
  constexpr int warps = Group<tier.threads>::warps;
  const Group<tier.threads> group;
  const int blocks = SPLIT ? cluster_size() : 1;
  const Span span = span_of(p.cols, SPLIT ? rank_in_cluster() : 0, blocks, p.vectors);
  const int64_t first = (block_index() / blocks * groups + group.index()) * rows_at_once;
  float* slots = shared<float>(0);
  int phase = 0;

  // A group beyond the last row reads nothing, computes with zeros and writes nothing.
  Chunk<T> h[rows_at_once][chunks];
#pragma unroll
  for (int r = 0; r < rows_at_once; ++r) {
    const Span present = first + r < p.rows ? span : Span{0, 0, p.vectors};
#pragma unroll
    for (int k = 0; k < chunks; ++k)
      h[r][k] = load_chunk<T, true>(row_of<T>(p.x, first + r), group.col(span, k), present);
    if constexpr (STREAM) {
#pragma unroll
      for (int k = 0; k < chunks; ++k) {
        const int col = group.col(span, k);
        float value[chunk];
        to_floats(h[r][k], value);
        if (p.dropout.seed && col < present.end) {
          float keep[chunk];
          keep_factors(p.dropout, first + r, col, keep);
#pragma unroll
          for (int i = 0; i < chunk; ++i) value[i] *= keep[i];
        }
        if (p.residual.data) {
          float residual[chunk];
          to_floats(load_chunk<T, true>(row_of<T>(p.residual, first + r), col, present), residual);
#pragma unroll
          for (int i = 0; i < chunk; ++i) value[i] += residual[i];
        }
        // Rounded as it is stored: the statistics are those of the h that the next layer sees.
        h[r][k] = from_floats<T>(value);
        if (p.h.data) store_chunk(row_of<T>(p.h, first + r), col, present, h[r][k]);
      }
    }
  }

  const float count = float(span.end - span.begin);
  float start[rows_at_once] = {};
  if (!p.rms) {
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
#pragma unroll
      for (int k = 0; k < chunks; ++k) {
        float value[chunk];
        to_floats(h[r][k], value);
#pragma unroll
        for (int i = 0; i < chunk; ++i) start[r] += value[i];
      }
    }
    add_up<tier.threads, false>(start, slots, phase);
#pragma unroll
    for (float& value : start) value = span.end > span.begin ? value / count : 0.0f;
  }
  // Of the distances from `start`: the sums are what rounding left in it, the squares the variance.
  float sums[2 * rows_at_once] = {};
#pragma unroll
  for (int r = 0; r < rows_at_once; ++r) {
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      const int left = span.end - group.col(span, k);
      float value[chunk];
      forget(h[r][k]);
      to_floats(h[r][k], value);
#pragma unroll
      for (int i = 0; i < chunk; ++i) {
        const float distance = i < left ? value[i] - start[r] : 0.0f;
        sums[2 * r] += distance;
        sums[2 * r + 1] = multiply_add(distance, distance, sums[2 * r + 1]);
      }
    }
  }
  add_up<tier.threads, false>(sums, slots, phase);

  float rstd[rows_at_once], offset[rows_at_once];
#pragma unroll
  for (int r = 0; r < rows_at_once; ++r) {
    Moments moments{start[r], 0.0f, sums[2 * r + 1]};
    if (!p.rms && span.end > span.begin) {
      moments.mean = sums[2 * r] / count;
      moments.m2 = multiply_add(-sums[2 * r], moments.mean, moments.m2);
    }
    if constexpr (SPLIT) moments = merge(moments, p.cols, slots + 4 * warps);
    start[r] = moments.start;
    rstd[r] = inverse_sqrt(moments.m2 / float(p.cols) + float(p.eps));
    offset[r] = -moments.mean * rstd[r];
    if (group.lane() == 0 && first + r < p.rows && (!SPLIT || rank_in_cluster() == 0)) {
      if (p.mean) store(static_cast<float*>(p.mean) + first + r, moments.start + moments.mean);
      if (p.rstd) store(static_cast<float*>(p.rstd) + first + r, rstd[r]);
    }
  }

#pragma unroll
  for (int k = 0; k < chunks; ++k) {
    const int col = group.col(span, k);
    float weight[chunk], bias[chunk];
    load_parameter<W>(p.weight, col, span, 1.0f, weight);
    load_parameter<W>(p.bias, col, span, 0.0f, bias);
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
      if (first + r >= p.rows) continue;
      float value[chunk];
      forget(h[r][k]);
      to_floats(h[r][k], value);
#pragma unroll
      for (int i = 0; i < chunk; ++i) {
        const float x_hat = multiply_add(value[i] - start[r], rstd[r], offset[r]);
        value[i] = multiply_add(x_hat, weight[i], bias[i]);
      }
      store_chunk(row_of<T>(p.z, first + r), col, span, from_floats<T>(value));
    }
  }
  if constexpr (SPLIT) sync_cluster();  // no block ends while another reads its shared memory
}

template <int TIER, class T, class W, bool STREAM>
const char* launch_tier(const ForwardParameter& p, int cluster, void* stream) {
  constexpr Tier tier = forward_tiers[TIER];
  constexpr int rows_at_once = tier.threads <= 32 ? 32 / tier.elements : 1;
  const int64_t groups = divide_up(p.rows, rows_at_once);
  Launch how{divide_up(groups, tier.groups()) * cluster, tier.block()};
  how.shared_bytes = (4 * Group<tier.threads>::warps + 3) * sizeof(float);
  how.cluster = cluster;
  if constexpr (TIER == first_shared_forward)
    if (cluster > 1) return launch(layer_norm_fwd_kernel<TIER, T, W, STREAM, true>, p, how, stream);
  return launch(layer_norm_fwd_kernel<TIER, T, W, STREAM, false>, p, how, stream);
}

}  // namespace

const char* layer_norm_fwd(const Forward& problem, void* stream) {
  Processors device;
  if (const char* error = processors(device)) return error;
  const Shape shape = forward_shape(problem.cols, device.have_clusters);
  if (shape.tier < 0) return too_long;
  const ForwardParameter p{
      problem, have_vectors(problem, {problem.x, problem.residual, problem.h, problem.z})};
  return with_types(p.x.dtype, parameter_dtype(p, p.x.dtype), [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    return with_tier<count_of_forward_tiers>(shape.tier, [&](auto tier) {
      constexpr int index = decltype(tier)::value;
      return p.h_dtype == DType::none ? launch_tier<index, T, W, false>(p, shape.cluster, stream)
                                      : launch_tier<index, T, W, true>(p, shape.cluster, stream);
    });
  });
}

}  // namespace fusednorm::cuda
