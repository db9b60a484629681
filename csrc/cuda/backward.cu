// The backward kernel, the kernel that adds up its partial rows, and their launchers.
#include <algorithm>

#include "layer_norm.h"
#include "rows.h"

namespace fusednorm::cuda {
namespace {

struct BackwardParameter : Backward {
  bool vectors;
  int width;            // columns of a block
  int streams;          // what a row is read from: dz, h and, where there is more than dx, dh
  int stages;           // rows of a group that are read ahead
  int rows_of_a_group;  // consecutive ones
  float inverse_cols;
  Parameter scaled;
};

// The shared memory in which a block adds up two sums of a row, ahead of its ring.
constexpr int slots_bytes(Tier tier) { return 4 * tier.warps() * int(sizeof(float)); }

// A thread's own places in shared memory for the rows that are read ahead, of which it has the one
// at hand. It reads nothing but what it copied, so that no barrier is needed. The places of a warp
// are adjacent.
template <class T, int CHUNKS>
class Ring {
 public:
  static constexpr int stage_bytes(int threads, int streams) {
    return threads * streams * CHUNKS * int(sizeof(Words));
  }

  DEVICE Ring(Words* places, int stages, int streams)
      : places_(places),
        stage_(stage_bytes(block_threads(), streams) / int(sizeof(Words))),
        end_(stages * stage_) {
    const unsigned thread = thread_index();
    first_ = at_ = thread / 32 * (32 * streams * CHUNKS) + thread % 32;
  }

  DEVICE void read(int stream, int k, float (&to)[chunk<T>]) const {
    to_floats<T>(shared_load(place(stream, k)), to);
  }
  DEVICE void next() {
    at_ += stage_;
    if (at_ >= end_) at_ = first_;
  }

  // Starts to copy a chunk that ends after `left` elements; what is beyond becomes 0.
  template <bool VECTORS>
  DEVICE void copy(int stream, int k, const T* from, int left) const {
    if constexpr (VECTORS)
      copy_async(place(stream, k), reinterpret_cast<const Words*>(from), left > 0);
    else
      shared_store(place(stream, k), load_chunk<T, false>(from, left));
  }

 private:
  DEVICE Words* place(int stream, int k) const {
    return places_ + at_ + (stream * CHUNKS + k) * 32;
  }

  Words* places_;
  int stage_, end_, first_, at_;  // in words
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
template <int TIER, class T, class Group>
DEVICE void write_partials(const float (&dz_x_hat)[backward_tiers[TIER].elements],
                           const float (&dz)[backward_tiers[TIER].elements],
                           const BackwardParameter& p, const Group& group) {
  constexpr Tier tier = backward_tiers[TIER];
  constexpr bool split = TIER >= first_shared_backward;
  const int width = group.threads() * tier.elements, block = block_threads();
  float* sums = shared<float>(0);  // [groups, 2, width], in the place of the ring and the slots
  if constexpr (split)
    sync_cluster();
  else
    sync_block();
#pragma unroll
  for (int k = 0; k < tier.elements / chunk<T>; ++k) {
    const int at = group.index() * 2 * width + group.col(k) - group.span.begin;
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) {
      shared_store(sums + at + i, dz_x_hat[k * chunk<T> + i]);
      shared_store(sums + at + width + i, dz[k * chunk<T> + i]);
    }
  }
  const int sharers = split ? 1 : cluster_size(), share = split ? 0 : rank_in_cluster();
  if (sharers > 1)
    sync_cluster();
  else
    sync_block();
  const int cols = group.span.end - group.span.begin;
  float* to = p.partials + cluster_index() * 2 * p.cols + group.span.begin;
  for (int i = share * block + thread_index(); i < 2 * cols; i += sharers * block) {
    const int which = i >= cols, col = i - which * cols;
    float sum = 0.0f;
    for (int rank = 0; rank < sharers; ++rank) {
      for (int g = 0; g < tier.groups(); ++g) {
        const float* from = sums + (g * 2 + which) * width + col;
        sum += sharers > 1 ? peer_load(from, rank) : shared_load(from);
      }
    }
    store(to + which * p.cols + col, sum);
  }
  if (sharers > 1) sync_cluster();  // no block ends while another reads its shared memory
}

template <int TIER, class T, bool VECTORS>
DEVICE void differentiate(const BackwardParameter& p) {
  constexpr Tier tier = backward_tiers[TIER];
  constexpr bool split = TIER >= first_shared_backward;
  constexpr int size = chunk<T>, chunks = tier.elements / size;
  const int rank = split ? rank_in_cluster() : 0;
  const Span span = split ? span_of(int(p.cols), rank, p.width) : Span{0, int(p.cols)};
  const Group<tier.threads, certain(backward_tiers, TIER), T> group{span};
  const int64_t index = (split ? cluster_index() : block_index()) * tier.groups() + group.index();
  const int64_t first = index * p.rows_of_a_group;
  const int64_t ahead = p.rows - first;
  // Rows of this group; the copies of those beyond are zeros.
  const int rows = int(ahead < p.rows_of_a_group ? ahead : p.rows_of_a_group);
  const bool normalises = p.dz.data != nullptr, streams = p.streams == 3;
  float* slots = shared<float>(0);
  Ring<T, chunks> ring(shared<Words>(slots_bytes(tier)), p.stages, p.streams);
  int phase = 0;

  const auto chunk_of = [&](const Rows& all, int row) {
    return row_of<T>(all, first + row) + group.col(0);
  };
  const T *dz_from = settled(chunk_of(p.dz, 0)), *h_from = settled(chunk_of(p.h, 0));
  T* dx_to = settled(chunk_of(p.dx, 0));
  const auto read_ahead = [&](int row) {
    const bool there = row < rows;
#pragma unroll(VECTORS ? chunks : 1)
    for (int k = 0; k < chunks && !group.ends_before(k); ++k) {
      const int left = there && normalises ? group.left(k) : 0;
      ring.template copy<VECTORS>(0, k, dz_from + k * group.step(), left);
      ring.template copy<VECTORS>(1, k, h_from + k * group.step(), left);
    }
    dz_from += p.dz.stride;
    h_from += p.h.stride;
    if (streams) {
#pragma unroll(VECTORS ? chunks : 1)
      for (int k = 0; k < chunks && !group.ends_before(k); ++k)
        ring.template copy<VECTORS>(2, k, chunk_of(p.dh, row) + k * group.step(),
                                    there && p.dh.data ? group.left(k) : 0);
    }
    commit_copies();
  };
  for (int stage = 0; stage < p.stages; ++stage) {
    read_ahead(stage);
    ring.next();
  }

  // Registers keep the weight, and x_hat and g = dz * weight from the sums of a row to its dx.
  float weight[chunks][size], x_hat[chunks][size] = {}, g[chunks][size] = {};
#pragma unroll
  for (int k = 0; k < chunks; ++k)
    load_parameter<T, VECTORS>(p.scaled, group.col(k), group.left(k), 1.0f, weight[k]);
  float dz_x_hat[tier.elements] = {}, dz_sum[tier.elements] = {};
  // All groups of a block go through the loop as often: they meet at its barriers and shuffles.
  for (int row = 0; row < p.rows_of_a_group; ++row) {
    // Adjacent rows: most find these in the first cache.
    const bool there = row < rows && normalises;
    const float mean =
        there && p.mean ? load(static_cast<const float*>(p.mean) + first + row) : 0.0f;
    const float rstd = there ? load(static_cast<const float*>(p.rstd) + first + row) : 0.0f;
    wait_for_stage(p.stages);

    float sums[2] = {};
#pragma unroll
    for (int k = 0; k < chunks && !group.ends_before(k); ++k) {
      float dz[size], h[size];
      ring.read(0, k, dz);
      ring.read(1, k, h);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        x_hat[k][i] = (h[i] - mean) * rstd;
        g[k][i] = dz[i] * weight[k][i];
        sums[0] = multiply_add(g[k][i], x_hat[k][i], sums[0]);
        sums[1] += g[k][i];
        dz_x_hat[k * size + i] = multiply_add(dz[i], x_hat[k][i], dz_x_hat[k * size + i]);
        dz_sum[k * size + i] += dz[i];
      }
    }
    add_up<tier.threads, split>(sums, slots, phase);

    const float cols = float(p.cols), c1 = divide(sums[0], cols, p.inverse_cols);
    const float c2 = p.rms ? 0.0f : divide(sums[1], cols, p.inverse_cols);
    if (p.dx.data || p.dresidual.data) {
#pragma unroll
      for (int k = 0; k < chunks && !group.ends_before(k); ++k) {
        float total[size];
#pragma unroll
        for (int i = 0; i < size; ++i)
          total[i] = (g[k][i] - multiply_add(x_hat[k][i], c1, c2)) * rstd;
        const int left = row < rows ? group.left(k) : 0;
        if (streams) {
          float dh[size];
          ring.read(2, k, dh);
#pragma unroll
          for (int i = 0; i < size; ++i) total[i] += dh[i];
          if (p.dresidual.data)
            store_chunk<T, VECTORS>(chunk_of(p.dresidual, row) + k * group.step(), left,
                                    from_floats<T>(total));
          if (p.dropout.seed && p.dx.data && left > 0) {
            float keep[size];
            keep_factors(p.dropout, first + row, group.col(k), keep);
#pragma unroll
            for (int i = 0; i < size; ++i) total[i] *= keep[i];
          }
        }
        if (p.dx.data)
          store_chunk<T, VECTORS>(dx_to + k * group.step(), left, from_floats<T>(total));
      }
    }
    dx_to += p.dx.stride;
    read_ahead(row + p.stages);
    ring.next();
  }
  launch_dependents();
  wait_for_copies<0>();
  if (p.partials)
    write_partials<TIER, T>(dz_x_hat, dz_sum, p, group);
  else if constexpr (split)
    sync_cluster();  // no block ends while another reads its shared memory
}

// T: rows. A block has as many threads as its part of a row needs.
template <int TIER, class T>
KERNEL(backward_tiers[TIER].most_threads(), backward_blocks(backward_tiers[TIER].most_threads()))
layer_norm_bwd_kernel(PARAMETER(BackwardParameter) p) {
  if constexpr (TIER >= first_shared_backward && !can_split) return;
  if (p.vectors)
    differentiate<TIER, T, true>(p);
  else
    differentiate<TIER, T, false>(p);
}

// A warp takes 32 columns, one a thread; the warps of a block share the partial rows.
constexpr int finalize_warps = 32;

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
    if (p.dtype == DType::f32)
      store(static_cast<float*>(out) + col, sum);
    else
      store(
          static_cast<uint16_t*>(out) + col,
          uint16_t(p.dtype == DType::bf16 ? pack<BFloat16>(sum, 0.0f) : pack<Float16>(sum, 0.0f)));
  }
}

// The shared memory of a block whose ring has so many stages of 16-byte chunks: the slots of its
// reductions and the ring, and then, in their place, its column sums.
int shared_bytes_of(Tier tier, int threads, int element_bytes, int streams, int stages) {
  const int elements = threads * tier.elements;
  const int row = elements * element_bytes * streams, sums = elements * 2 * int(sizeof(float));
  return std::max(slots_bytes(tier) + stages * row, sums);
}

// Calls f(kernel) with the kernel of a tier for rows of a dtype.
template <class F>
const char* with_kernel(int tier, DType rows, F&& f) {
  return with_type(rows, [&](auto t) {
    return with_tier<count_of_backward_tiers>(tier, [&](auto index) {
      return f(layer_norm_bwd_kernel<decltype(index)::value, decltype(t)>);
    });
  });
}

int width_of_block(const Backward& p, int cluster) {
  return p.h.dtype == DType::f32 ? width_of<float>(p.cols, cluster)
                                 : width_of<BFloat16>(p.cols, cluster);
}

}  // namespace

const char* widest_row(int64_t& cols) {
  Processors device;
  if (const char* error = processors(device)) return error;
  const int64_t last = backward_tiers[count_of_backward_tiers - 1].cols();
  cols = device.have_clusters ? last * max_cluster : last;
  return nullptr;
}

const char* share_out(const Backward& p, bool wants_sums, Shares& found) {
  Processors device;
  if (const char* error = processors(device)) return error;
  const Shape shape = backward_shape(p.cols, device.have_clusters);
  if (shape.tier < 0) return too_long;
  const Tier tier = backward_tiers[shape.tier];
  const bool split = shape.cluster > 1;
  found.tier = shape.tier;
  found.cluster = split ? shape.cluster : wants_sums && device.have_clusters ? fold : 1;
  found.threads = tier.block(width_of_block(p, shape.cluster));
  found.streams = has_stream(p) ? 3 : 2;

  const int element_bytes = p.h.dtype == DType::f32 ? 4 : 2;
  const auto bytes = [&](int stages) {
    return shared_bytes_of(tier, found.threads, element_bytes, found.streams, stages);
  };
  const auto has_room = [&](int blocks, int stages) {  // 1 KB of each block is CUDA's
    return bytes(stages) <= device.shared_bytes / blocks - 1024;
  };
  // With 100 KB (8.6, 8.9, 12.x) a processor has registers for more blocks than it has room for.
  int blocks = backward_blocks(found.threads);
  while (blocks > 1 && !has_room(blocks, 1)) --blocks;
  found.stages = 1;
  while (found.stages < max_stages && has_room(blocks, found.stages + 1)) ++found.stages;
  found.shared_bytes = bytes(found.stages);

  // A cluster runs within a group of processors, so that some of these may be left over: as many
  // clusters as run at a time share the rows.
  int resident = 0;
  const Launch how{found.cluster, found.threads, found.shared_bytes, found.cluster};
  const auto ask = [&](auto kernel) { return resident_clusters(kernel, how, resident); };
  if (const char* error = with_kernel(shape.tier, p.h.dtype, ask)) return error;
  const int64_t groups = tier.groups() * (split ? 1 : found.cluster);  // of a cluster
  const int64_t wanted = divide_up(p.rows, rows_per_group * groups);
  const int64_t clusters = std::max<int64_t>(std::min<int64_t>(wanted, resident), 1);
  found.rows_of_a_group = int(divide_up(p.rows, clusters * groups));
  found.clusters = divide_up(p.rows, found.rows_of_a_group * groups);
  return nullptr;
}

const char* layer_norm_bwd(const Backward& problem, const Shares& shares, void* stream) {
  const BackwardParameter p{
      problem,
      have_vectors(problem, {problem.dz, problem.dh, problem.h, problem.dx, problem.dresidual}),
      width_of_block(problem, shares.tier < first_shared_backward ? 1 : shares.cluster),
      shares.streams,
      shares.stages,
      shares.rows_of_a_group,
      1.0f / float(problem.cols),
      {problem.weight, problem.h.dtype}};
  const Launch how{shares.clusters * shares.cluster, shares.threads, shares.shared_bytes,
                   shares.cluster};
  return with_kernel(shares.tier, problem.h.dtype,
                     [&](auto kernel) { return launch(kernel, p, how, stream); });
}

const char* layer_norm_bwd_finalize(const Finalize& p, void* stream) {
  Processors device;
  if (const char* error = processors(device)) return error;
  Launch how{divide_up(p.cols, 32), finalize_warps * 32};
  how.shared_bytes = 2 * finalize_warps * 32 * sizeof(float);
  how.dependent = device.have_clusters;
  return launch(layer_norm_bwd_finalize_kernel, p, how, stream);
}

}  // namespace fusednorm::cuda
