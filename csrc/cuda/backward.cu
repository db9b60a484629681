// The backward kernel, the kernel that adds up its partial rows, and their launchers.
#include <algorithm>

#include "layer_norm.h"
#include "rows.h"

namespace fusednorm::cuda {
namespace {

struct BackwardParameter : Backward {
  bool vectors;
  int stages;           // rows of a group that are read ahead
  int rows_of_a_group;  // consecutive ones
};

// What a row is read from: dz, h and, where the gradient of h comes in too, dh.
constexpr int streams_of(bool stream) { return stream ? 3 : 2; }

// A thread's own places in shared memory for the rows that are read ahead. It reads nothing but
// what it copied, so that no barrier is needed.
template <int TIER, class T, bool STREAM>
class Ring {
 public:
  static constexpr Tier tier = backward_tiers[TIER];
  static constexpr int block = tier.block();
  static constexpr int chunks = tier.elements / chunk;
  static constexpr int streams = streams_of(STREAM);
  static constexpr int words = Chunk<T>::size;
  static constexpr int stage_bytes = block * chunks * streams * chunk * int(sizeof(T));

  DEVICE Words* place(int stage, int stream, int k, int word) const {
    const int index = ((stage * streams + stream) * chunks + k) * words + word;
    return shared<Words>(0) + index * block + thread_index();
  }

  DEVICE Chunk<T> read(int stage, int stream, int k) const {
    Chunk<T> value;
#pragma unroll
    for (int i = 0; i < words; ++i) value.at[i] = shared_load(place(stage, stream, k, i));
    return value;
  }

  // Starts to copy a row; what is beyond the span, or absent, becomes 0.
  DEVICE void copy(int stage, int stream, const Rows& rows, int64_t row, const Span& span,
                   const Group<tier.threads>& group) const {
    const T* from = row_of<T>(rows, row);
    const int end = rows.data ? span.end : 0;
#pragma unroll
    for (int k = 0; k < chunks; ++k) {
      const int col = group.col(span, k);
      if (span.vectors) {
#pragma unroll
        for (int i = 0; i < words; ++i) {
          const int at = col + i * Chunk<T>::per_words;
          if (at < end)
            copy_async(place(stage, stream, k, i), reinterpret_cast<const Words*>(from + at));
          else
            shared_store(place(stage, stream, k, i), Words{});
        }
      } else {
        const Chunk<T> value = load_chunk<T, true>(from, col, {span.begin, end, false});
#pragma unroll
        for (int i = 0; i < words; ++i) shared_store(place(stage, stream, k, i), value.at[i]);
      }
    }
  }
};

// Waits for the row at hand where `stages` rows are on their way.
DEVICE void wait_for_stage(int stages) {
  if (stages == 1)
    wait_for_copies<0>();
  else if (stages == 2)
    wait_for_copies<1>();
  else if (stages == 3)
    wait_for_copies<2>();
  else
    wait_for_copies<max_stages - 1>();
}

// Writes one partial row for the cluster: the sums of its groups, over the blocks that have the
// same columns. Each block adds up a share of the columns.
template <int TIER, bool SPLIT>
DEVICE void write_partials(const float (&dz_x_hat)[backward_tiers[TIER].elements],
                           const float (&dz)[backward_tiers[TIER].elements],
                           const BackwardParameter& p, const Span& span,
                           const Group<backward_tiers[TIER].threads>& group) {
  constexpr Tier tier = backward_tiers[TIER];
  constexpr int width = tier.cols(), groups = tier.groups(), block = tier.block();
  const int blocks = cluster_size();
  float* sums = shared<float>(0);  // [groups, 2, width], in the place of the ring and the slots
  if constexpr (SPLIT)
    sync_cluster();
  else
    sync_block();
#pragma unroll
  for (int k = 0; k < tier.elements / chunk; ++k) {
    const int at = group.index() * 2 * width + (k * tier.threads + group.lane()) * chunk;
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      shared_store(sums + at + i, dz_x_hat[k * chunk + i]);
      shared_store(sums + at + width + i, dz[k * chunk + i]);
    }
  }
  const int sharers = SPLIT ? 1 : blocks, share = SPLIT ? 0 : rank_in_cluster();
  if (sharers > 1)
    sync_cluster();
  else
    sync_block();
  const int cols = span.end - span.begin;
  float* to = p.partials + block_index() / blocks * 2 * p.cols + span.begin;
  for (int i = share * block + thread_index(); i < 2 * cols; i += sharers * block) {
    const int which = i / cols, col = i % cols;
    float sum = 0.0f;
    for (int rank = 0; rank < sharers; ++rank) {
      for (int g = 0; g < groups; ++g) {
        const float* from = sums + (g * 2 + which) * width + col;
        sum += sharers > 1 ? peer_load(from, rank) : shared_load(from);
      }
    }
    store(to + which * p.cols + col, sum);
  }
  if (sharers > 1) sync_cluster();  // no block ends while another reads its shared memory
}

// T: rows, W: weight. STREAM: dh comes in, or dropout or dresidual are there. SPLIT: the blocks of
// a cluster share a row.
template <int TIER, class T, class W, bool STREAM, bool SPLIT>
KERNEL(backward_tiers[TIER].block(), backward_blocks(backward_tiers[TIER]))
layer_norm_bwd_kernel(PARAMETER(BackwardParameter) p) {
  if constexpr (SPLIT && !can_split) return;
  constexpr Tier tier = backward_tiers[TIER];
  using Ring = Ring<TIER, T, STREAM>;
  constexpr int groups = tier.groups(), chunks = Ring::chunks;
  // Where registers are left over, the weight stays in them.
  constexpr bool keeps_weight = tier.elements <= 16;
  const Group<tier.threads> group;
  const Ring ring;
  const int blocks = SPLIT ? cluster_size() : 1;
  const Span span = span_of(p.cols, SPLIT ? rank_in_cluster() : 0, blocks, p.vectors);
  const int64_t index = block_index() / blocks * groups + group.index();
  const int64_t first = index * p.rows_of_a_group;
  const int64_t last = first + p.rows_of_a_group < p.rows ? first + p.rows_of_a_group : p.rows;
  float* slots = shared<float>(p.stages * Ring::stage_bytes);
  int phase = 0;

  const auto read_ahead = [&](int64_t row, int stage) {
    if (row < last) {
      ring.copy(stage, 0, p.dz, row, span, group);
      ring.copy(stage, 1, p.h, row, span, group);
      if constexpr (STREAM) ring.copy(stage, 2, p.dh, row, span, group);
    }
    commit_copies();
  };
  for (int stage = 0; stage < p.stages; ++stage) read_ahead(first + stage, stage);

  Chunk<W> kept_weight[keeps_weight ? chunks : 1];
  if constexpr (keeps_weight) {
    if (p.weight.data) {
#pragma unroll
      for (int k = 0; k < chunks; ++k)
        kept_weight[k] =
            load_chunk<W, false>(static_cast<const W*>(p.weight.data), group.col(span, k), span);
    }
  }
  const auto weight_of = [&](int k, float (&weight)[chunk]) {
    if constexpr (keeps_weight) {
      if (p.weight.data) {
        to_floats(kept_weight[k], weight);
        return;
      }
    }
    load_parameter<W>(p.weight, group.col(span, k), span, 1.0f, weight);
  };

  float dz_x_hat[tier.elements] = {}, dz_sum[tier.elements] = {};
  int stage = 0;
  // All groups of a block go through the loop as often: they meet at its barriers and shuffles.
  int64_t row = first;
  for (int left = p.rows_of_a_group; left > 0; --left, ++row) {
    const bool present = row < last;
    // Adjacent rows: most find these in the first cache.
    const float mean = present && p.mean ? load(static_cast<const float*>(p.mean) + row) : 0.0f;
    const float rstd = present ? load(static_cast<const float*>(p.rstd) + row) : 0.0f;
    wait_for_stage(p.stages);

    float sums[2] = {};
    if (present && p.dz.data) {
#pragma unroll
      for (int k = 0; k < chunks; ++k) {
        if constexpr (!keeps_weight) in_order();
        float dz[chunk], h[chunk], weight[chunk];
        to_floats(ring.read(stage, 0, k), dz);
        to_floats(ring.read(stage, 1, k), h);
        weight_of(k, weight);
#pragma unroll
        for (int i = 0; i < chunk; ++i) {
          const float x_hat = (h[i] - mean) * rstd, g = dz[i] * weight[i];
          sums[0] = multiply_add(g, x_hat, sums[0]);
          sums[1] += g;
          dz_x_hat[k * chunk + i] = multiply_add(dz[i], x_hat, dz_x_hat[k * chunk + i]);
          dz_sum[k * chunk + i] += dz[i];
        }
      }
    }
    add_up<tier.threads, SPLIT>(sums, slots, phase);

    if (present && (p.dx.data || p.dresidual.data)) {
      const float c1 = sums[0] / float(p.cols), c2 = p.rms ? 0.0f : sums[1] / float(p.cols);
#pragma unroll
      for (int k = 0; k < chunks; ++k) {
        if constexpr (!keeps_weight) in_order();
        const int col = group.col(span, k);
        float dz[chunk], h[chunk], weight[chunk], total[chunk] = {};
        if (p.dz.data) {
          to_floats(ring.read(stage, 0, k), dz);
          to_floats(ring.read(stage, 1, k), h);
          weight_of(k, weight);
#pragma unroll
          for (int i = 0; i < chunk; ++i) {
            const float x_hat = (h[i] - mean) * rstd;
            total[i] = (dz[i] * weight[i] - multiply_add(x_hat, c1, c2)) * rstd;
          }
        }
        if constexpr (STREAM) {
          if constexpr (!keeps_weight) in_order();
          float dh[chunk];
          to_floats(ring.read(stage, 2, k), dh);
#pragma unroll
          for (int i = 0; i < chunk; ++i) total[i] += dh[i];
          if (p.dresidual.data)
            store_chunk(row_of<T>(p.dresidual, row), col, span, from_floats<T>(total));
          if (p.dropout.seed && p.dx.data && col < span.end) {
            float keep[chunk];
            keep_factors(p.dropout, row, col, keep);
#pragma unroll
            for (int i = 0; i < chunk; ++i) total[i] *= keep[i];
          }
        }
        if (p.dx.data) store_chunk(row_of<T>(p.dx, row), col, span, from_floats<T>(total));
      }
    }
    read_ahead(row + p.stages, stage);
    if (++stage == p.stages) stage = 0;
  }
  launch_dependents();
  wait_for_copies<0>();
  if (p.partials)
    write_partials<TIER, SPLIT>(dz_x_hat, dz_sum, p, span, group);
  else if constexpr (SPLIT)
    sync_cluster();  // no block ends while another reads its shared memory
}

// A warp takes 32 columns, one a thread; the warps of a block share the partial rows.
constexpr int finalize_warps = 32;

template <class W>
KERNEL(finalize_warps * 32, 1)
layer_norm_bwd_finalize_kernel(PARAMETER(Finalize) p) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int64_t col = block_index() * 32 + lane;
  const bool inside = col < p.cols;
  float* slots = shared<float>(0);  // [2, warps, 32]
  wait_for_previous_kernel();
  float sums[2] = {};
  if (inside) {
#pragma unroll 4
    for (int64_t row = warp; row < p.partial_rows; row += finalize_warps) {
      const float* from = p.partials + row * 2 * p.cols + col;
      if (p.dweight) sums[0] += load_partial(from);
      if (p.dbias) sums[1] += load_partial(from + p.cols);
    }
  }
#pragma unroll
  for (int which = 0; which < 2; ++which)
    shared_store(slots + (which * finalize_warps + warp) * 32 + lane, sums[which]);
  sync_block();
  void* const out = warp == 0 ? p.dweight : p.dbias;
  if (warp < 2 && inside && out) {
    float sum = 0.0f;
    for (int other = 0; other < finalize_warps; ++other)
      sum += shared_load(slots + (warp * finalize_warps + other) * 32 + lane);
    if constexpr (sizeof(W) == 4)
      store(static_cast<float*>(out) + col, sum);
    else
      store(static_cast<uint16_t*>(out) + col, uint16_t(pack<W>(sum, 0.0f)));
  }
}

// How a problem is shared out.
struct Plan {
  int64_t clusters = 0;  // and partial rows
  int rows_of_a_group = 0;
  int stages = 0;
  int cluster = 1;
  bool split = false;  // the blocks of a cluster share a row, rather than adding up their sums
  int shared_bytes = 0;
};

// The shared memory of a block whose ring has so many stages: the ring and the slots of its
// reductions, and then, in their place, its column sums.
template <int TIER, class T, bool STREAM>
constexpr int shared_bytes_of(int stages) {
  constexpr Tier tier = backward_tiers[TIER];
  constexpr int slots = 4 * Group<tier.threads>::warps * sizeof(float);
  constexpr int partials = tier.groups() * 2 * tier.cols() * int(sizeof(float));
  return std::max(stages * Ring<TIER, T, STREAM>::stage_bytes + slots, partials);
}

template <int TIER, class T, bool STREAM>
Plan plan_of(int64_t rows, int cluster, bool folds, const Processors& device) {
  constexpr Tier tier = backward_tiers[TIER];
  Plan plan;
  plan.split = cluster > 1;
  plan.cluster = plan.split ? cluster : folds && device.have_clusters ? fold : 1;
  const auto has_room = [&](int blocks, int stages) {  // 1 KB of each block is CUDA's
    return shared_bytes_of<TIER, T, STREAM>(stages) <= device.shared_bytes / blocks - 1024;
  };
  // With 100 KB (8.6, 8.9, 12.x) a processor has registers for more blocks than it has room for.
  int blocks = backward_blocks(tier);
  while (blocks > 1 && !has_room(blocks, 1)) --blocks;
  plan.stages = 1;
  while (plan.stages < max_stages && has_room(blocks, plan.stages + 1)) ++plan.stages;
  plan.shared_bytes = shared_bytes_of<TIER, T, STREAM>(plan.stages);
  const int64_t groups = tier.groups() * (plan.split ? 1 : plan.cluster);  // of a cluster
  const int64_t resident = int64_t(device.count) * blocks / plan.cluster;
  const int64_t wanted = divide_up(rows, rows_per_group * groups);
  const int64_t clusters = std::max<int64_t>(std::min(wanted, resident), 1);
  plan.rows_of_a_group = int(divide_up(rows, clusters * groups));
  plan.clusters = divide_up(rows, plan.rows_of_a_group * groups);
  return plan;
}

// The last tier that the device has room for, whatever the dtype and the terms.
int last_tier(const Processors& device) {
  constexpr int last = count_of_backward_tiers - 1;
  constexpr int needed = shared_bytes_of<last, float, true>(1);
  return device.have_clusters && needed <= device.shared_bytes - 1024 ? last
                                                                      : first_shared_backward;
}

// Calls f(tier, T, W, STREAM, plan), all but the last as types.
template <class F>
const char* with_plan(int64_t rows, int64_t cols, DType dtype, DType parameters, bool with_stream,
                      bool folds, F&& f) {
  Processors device;
  if (const char* error = processors(device)) return error;
  const Shape shape = backward_shape(cols, device.have_clusters);
  if (shape.tier < 0 || shape.tier > last_tier(device)) return too_long;
  return with_types(dtype, parameters, [&](auto t, auto w) {
    return with_tier<count_of_backward_tiers>(shape.tier, [&](auto tier) {
      const auto call = [&](auto stream) {
        return f(tier, t, w, stream,
                 plan_of<decltype(tier)::value, decltype(t), decltype(stream)::value>(
                     rows, shape.cluster, folds, device));
      };
      return with_stream ? call(std::true_type()) : call(std::false_type());
    });
  });
}

}  // namespace

const char* widest_rows(int64_t& forward, int64_t& backward) {
  Processors device;
  if (const char* error = processors(device)) return error;
  const int cluster = device.have_clusters ? max_cluster : 1;
  forward = int64_t(forward_tiers[first_shared_forward].cols()) * cluster;
  backward = int64_t(backward_tiers[last_tier(device)].cols()) * cluster;
  return nullptr;
}

const char* count_partial_rows(int64_t rows, int64_t cols, DType dtype, bool with_stream,
                               int64_t& count) {
  const auto take = [&](auto, auto, auto, auto, const Plan& plan) -> const char* {
    count = plan.clusters;
    return nullptr;
  };
  return with_plan(rows, cols, dtype, dtype, with_stream, true, take);
}

const char* layer_norm_bwd(const Backward& problem, void* stream) {
  const bool vectors =
      have_vectors(problem, {problem.dz, problem.dh, problem.h, problem.dx, problem.dresidual});
  const auto run = [&](auto tier, auto t, auto w, auto streams, const Plan& plan) {
    using T = decltype(t);
    using W = decltype(w);
    constexpr int index = decltype(tier)::value;
    constexpr bool with_stream = decltype(streams)::value;
    const BackwardParameter p{problem, vectors, plan.stages, plan.rows_of_a_group};
    const Launch how{plan.clusters * plan.cluster, backward_tiers[index].block(), plan.shared_bytes,
                     plan.cluster};
    if constexpr (index >= first_shared_backward)
      if (plan.split)
        return launch(layer_norm_bwd_kernel<index, T, W, with_stream, true>, p, how, stream);
    if constexpr (index <= first_shared_backward)
      return launch(layer_norm_bwd_kernel<index, T, W, with_stream, false>, p, how, stream);
    else
      return static_cast<const char*>(nullptr);  // such a tier is always split
  };
  return with_plan(problem.rows, problem.cols, problem.h.dtype,
                   parameter_dtype(problem, problem.h.dtype), has_stream(problem),
                   problem.partials != nullptr, run);
}

const char* layer_norm_bwd_finalize(const Finalize& p, void* stream) {
  Processors device;
  if (const char* error = processors(device)) return error;
  Launch how{divide_up(p.cols, 32), finalize_warps * 32};
  how.shared_bytes = 2 * finalize_warps * 32 * sizeof(float);
  how.dependent = device.have_clusters;
  return with_types(p.dtype, p.dtype, [&](auto, auto w) {
    return launch(layer_norm_bwd_finalize_kernel<decltype(w)>, p, how, stream);
  });
}

}  // namespace fusednorm::cuda
