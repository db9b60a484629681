// Kernels for test_simt.py: each has a fault planted, and a twin without it. A block handles a row.
#include <device.h>

#include <string>

namespace planted {

using namespace fusednorm::cuda;

constexpr int rows = 4, cols = 64, stride = 68;  // of floats

struct Matrices {
  const float* in;
  float* out;
};

template <class F>
void for_each_buffer(const Matrices& p, F&& f) {
  f(Buffer{"in", p.in, rows, cols * 4, stride * 4, false});
  f(Buffer{"gap", p.in + cols, 3, 8, 0, false});  // half a vector, expanded to three rows
  f(Buffer{"out", p.out, rows, cols * 4, stride * 4, true});
}

DEVICE const float* in(const Matrices& p, int col) { return p.in + block_index() * stride + col; }
DEVICE float* out(const Matrices& p, int col) { return p.out + block_index() * stride + col; }
DEVICE const Words* words(const float* at) { return reinterpret_cast<const Words*>(at); }
DEVICE Words* words(float* at) { return reinterpret_cast<Words*>(at); }
// A float of shared memory.
DEVICE float* place(int index) { return shared<float>(0) + index; }

// A kernel with a FAULT, or without it.
#define PLANTED(name)   \
  template <bool FAULT> \
  KERNEL(64, 1)         \
  name(PARAMETER(Matrices) p)

// Each thread writes one number to shared memory; then the row is reversed.
DEVICE void write_own(const Matrices& p) {
  shared_store(place(thread_index()), load(in(p, thread_index())));
}
DEVICE void store_reversed(const Matrices& p) {
  store(out(p, thread_index()), shared_load(place(cols - 1 - thread_index())));
}

// Global memory. The twins copy.

PLANTED(load_past_row) {
  const int i = thread_index();
  store(out(p, i), load(in(p, FAULT ? i + 1 : i)));
}

PLANTED(load_before_buffer) {
  const int i = thread_index();
  store(out(p, i), load(in(p, FAULT && block_index() == 0 && i == 0 ? -1 : i)));
}

PLANTED(load_from_nowhere) {
  const int i = thread_index();
  store(out(p, i), load(FAULT ? static_cast<const float*>(nullptr) : in(p, i)));
}

PLANTED(load_vector_past_row) {
  const int i = thread_index() * 4;
  if (i < cols) store(words(out(p, i)), load(words(in(p, FAULT ? i + 4 : i))));
}

PLANTED(load_vector_across_end) {
  const int i = thread_index();
  store(out(p, i), load(in(p, i)));
  if (FAULT)
    load(words(p.in + cols));
  else
    load(p.in + cols + 1);
}

PLANTED(load_output) {
  const int i = thread_index();
  store(out(p, i), load(FAULT ? out(p, i) : in(p, i)));
}

PLANTED(store_past_row) {
  const int i = thread_index();
  store(out(p, FAULT ? i + 1 : i), load(in(p, i)));
}

PLANTED(store_to_input) {
  const int i = thread_index();
  store(FAULT ? const_cast<float*>(in(p, i)) : out(p, i), load(in(p, i)));
}

PLANTED(store_twice) {
  const int i = thread_index();
  store(out(p, FAULT ? i / 2 : i), load(in(p, i)));
}

PLANTED(store_in_two_blocks) {
  const int i = thread_index();
  store(FAULT ? p.out + i : out(p, i), load(in(p, i)));
}

PLANTED(load_misaligned) {
  const int i = thread_index() * 4;
  if (i < cols) store(words(out(p, i)), load(words(in(p, FAULT ? i + 1 : i))));
}

PLANTED(load_once_misaligned) {
  const int i = thread_index() * 4;
  if (i < cols) store(words(out(p, i)), load_once(words(in(p, FAULT ? i + 2 : i))));
}

PLANTED(store_misaligned) {
  const int i = thread_index() * 4;
  if (i < cols) store(words(out(p, FAULT ? i + 1 : i)), load(words(in(p, i))));
}

PLANTED(load_partial_too_soon) {
  const int i = thread_index();
  if (!FAULT) wait_for_previous_kernel();
  store(out(p, i), load_partial(in(p, i)));
}

// Collectives. The twins reverse each row.

DEVICE float reversed_by_shuffles(const Matrices& p) {
  return shuffle_xor(load(in(p, thread_index() ^ 32)), 31);
}

PLANTED(shuffle_not_reached) {
  if (FAULT && thread_index() == 5) return;
  store(out(p, thread_index()), reversed_by_shuffles(p));
}

PLANTED(shuffle_beyond_warp) {
  const int i = thread_index();
  store(out(p, i), FAULT ? shuffle_xor(load(in(p, i)), 63) : reversed_by_shuffles(p));
}

PLANTED(warp_waits_in_two_places) {
  if (FAULT && thread_index() == 0) sync_block();
  const float value = reversed_by_shuffles(p);
  if (!FAULT || thread_index() > 0) sync_block();
  store(out(p, thread_index()), value);
}

PLANTED(block_barrier_not_reached) {
  const int i = thread_index();
  write_own(p);
  if (FAULT && i >= 32) return;
  sync_block();
  store_reversed(p);
}

PLANTED(cluster_barrier_not_reached) {
  write_own(p);
  if (FAULT && rank_in_cluster() == 1) return;
  sync_cluster();
  store_reversed(p);
}

PLANTED(warps_at_two_barriers) {
  const int i = thread_index();
  write_own(p);
  if (FAULT && i < 32)
    sync_cluster();
  else
    sync_block();
  store_reversed(p);
}

// Shared memory. The twins reverse each row.

PLANTED(shared_past_end) {
  const int i = thread_index();
  shared_store(place(FAULT ? i + 1 : i), load(in(p, i)));
  sync_block();
  store_reversed(p);
}

PLANTED(shared_before_start) {
  const int i = thread_index();
  write_own(p);
  sync_block();
  store(out(p, i), shared_load(place(cols - (FAULT ? 2 : 1) - i)));
}

PLANTED(shared_misaligned) {
  const int i = thread_index();
  if (i < cols / 4) shared_store(words(place(i * 4 + (FAULT ? 1 : 0))), load(words(in(p, i * 4))));
  sync_block();
  store_reversed(p);
}

PLANTED(shared_unwritten) {
  const int i = thread_index();
  if (!FAULT || i != 40) write_own(p);
  sync_block();
  store_reversed(p);
}

PLANTED(read_after_write) {
  const int i = thread_index();
  shared_store(place(i ^ 31), load(in(p, i ^ 32)));
  if (FAULT)
    shuffle_xor(0.0f, 1);  // the whole warp has written, but that orders nothing
  else
    sync_block();
  store(out(p, i), shared_load(place(i)));
}

PLANTED(write_after_read) {
  const int i = thread_index();
  write_own(p);
  sync_block();
  const float value = shared_load(place(cols - 1 - i));
  if (!FAULT) sync_block();
  shared_store(place(i), value);
  store(out(p, i), shared_load(place(i)));
}

PLANTED(write_after_two_reads) {
  const int i = thread_index();
  shared_store(place(i), load(in(p, cols - 1 - i)));
  sync_block();
  const float value = shared_load(place(i)) + 0.0f * shared_load(place(0));
  if (!FAULT) sync_block();
  if (i == 0) shared_store(place(0), value);
  store(out(p, i), value);
}

PLANTED(two_writes) {
  const int i = thread_index();
  shared_store(place(FAULT ? i / 2 : i), load(in(p, i)));
  sync_block();
  store_reversed(p);
}

// Two threads may write to one word, but not to the same half of it.
PLANTED(write_over_half_a_word) {
  const int i = thread_index();
  uint16_t* const halves = shared<uint16_t>(0);
  const uint32_t bits = as_bits(load(in(p, i)));  // none in the lower half
  if (FAULT && i % 2 == 0)
    shared_store(shared<uint32_t>(0) + i / 2, bits);
  else
    shared_store(halves + i, uint16_t(bits >> 16));
  sync_block();
  store(out(p, i), as_float(uint32_t(shared_load(halves + cols - 1 - i)) << 16));
}

// Asynchronous copies. The twins reverse each row, or copy.

// Copies 4 floats in each thread that has some.
DEVICE void start_copies(const Matrices& p) {
  const int i = thread_index() * 4;
  if (i < cols) copy_async(words(place(i)), words(in(p, i)), true);
}

PLANTED(copy_from_misaligned) {
  const int i = thread_index() * 4;
  if (i < cols) copy_async(words(place(i)), words(in(p, FAULT ? i + 1 : i)), true);
  commit_copies();
  wait_for_copies<0>();
  sync_block();
  store_reversed(p);
}

PLANTED(copy_to_misaligned) {
  const int i = thread_index() * 4;
  if (i < cols) copy_async(words(place(FAULT ? i + 2 : i)), words(in(p, i)), true);
  commit_copies();
  wait_for_copies<0>();
  sync_block();
  store_reversed(p);
}

PLANTED(copy_past_row) {
  const int i = thread_index() * 4;
  if (i < cols) copy_async(words(place(i)), words(in(p, FAULT ? i + 4 : i)), true);
  commit_copies();
  wait_for_copies<0>();
  sync_block();
  store_reversed(p);
}

PLANTED(copy_not_waited_for) {
  start_copies(p);
  commit_copies();
  if (!FAULT) wait_for_copies<0>();
  sync_block();
  store_reversed(p);
}

PLANTED(copy_not_committed) {
  start_copies(p);
  if (!FAULT) commit_copies();
  wait_for_copies<0>();
  sync_block();
  store_reversed(p);
}

PLANTED(copy_of_another_thread) {
  start_copies(p);
  commit_copies();
  wait_for_copies<0>();
  if (FAULT)
    shuffle_xor(0.0f, 1);
  else
    sync_block();
  store_reversed(p);
}

// The blocks of odd index leave copies behind, which must not arrive in those that come after.
PLANTED(copy_of_another_block) {
  const int i = thread_index();
  if (block_index() % 2 == 0) {
    if (!FAULT) write_own(p);
    wait_for_copies<0>();
    sync_block();
    store_reversed(p);
  } else {
    start_copies(p);
    commit_copies();
    store(out(p, i), load(in(p, cols - 1 - i)));
  }
}

PLANTED(store_under_copy) {
  start_copies(p);
  commit_copies();
  if (!FAULT) wait_for_copies<0>();
  const int i = thread_index() * 4;
  if (i < cols) {
    const float first = load(in(p, i));
    shared_store(place(i), first);
  }
  if (FAULT) wait_for_copies<0>();
  sync_block();
  store_reversed(p);
}

PLANTED(copy_over_read) {
  const int i = thread_index();
  write_own(p);
  sync_block();
  const float value = shared_load(place(cols - 1 - i));
  if (!FAULT) sync_block();
  start_copies(p);
  commit_copies();
  wait_for_copies<0>();
  store(out(p, i), value);
}

// One block copies all rows through a ring of three stages, each thread its own places.
PLANTED(ring_waits_for_too_few) {
  const int col = thread_index() * 4;
  if (col >= cols) return;
  constexpr int stages = 3;
  const auto stage = [&](int row) { return words(place(row % stages * cols + col)); };
  const auto read_ahead = [&](int row) {
    if (row < rows) copy_async(stage(row), words(p.in + row * stride + col), true);
    commit_copies();
  };
  for (int row = 0; row < stages; ++row) read_ahead(row);
  for (int row = 0; row < rows; ++row) {
    wait_for_copies<FAULT ? stages : stages - 1>();
    store(words(p.out + row * stride + col), shared_load(stage(row)));
    read_ahead(row + stages);
  }
}

// Clusters of two blocks. The twins swap the rows of a cluster.

DEVICE int other() { return 1 - rank_in_cluster(); }
DEVICE void store_others(const Matrices& p) {
  store(out(p, thread_index()), peer_load(place(thread_index()), other()));
}

PLANTED(peer_outside) {
  const int i = thread_index();
  write_own(p);
  sync_cluster();
  store(out(p, i), peer_load(place(i), FAULT ? other() + 1 : other()));
  sync_cluster();
}

PLANTED(peer_past_end) {
  const int i = thread_index();
  write_own(p);
  sync_cluster();
  store(out(p, i), peer_load(place(FAULT ? i + 1 : i), other()));
  sync_cluster();
}

PLANTED(peer_unwritten) {
  if (!FAULT || rank_in_cluster() == 0) write_own(p);
  sync_cluster();
  store_others(p);
  sync_cluster();
}

PLANTED(peer_after_block_barrier) {
  write_own(p);
  sync_cluster();
  write_own(p);
  if (FAULT)
    sync_block();
  else
    sync_cluster();
  store_others(p);
  sync_cluster();
}

PLANTED(write_after_peer) {
  const int i = thread_index();
  write_own(p);
  sync_cluster();
  const float value = peer_load(place(i), other());
  if (FAULT)
    sync_block();
  else
    sync_cluster();
  shared_store(place(i), value);
  store(out(p, i), shared_load(place(i)));
}

PLANTED(peer_has_ended) {
  write_own(p);
  sync_cluster();
  if (FAULT && rank_in_cluster() == 0) return;
  sync_block();
  store_others(p);
  sync_cluster();
}

PLANTED(peer_may_have_ended) {
  write_own(p);
  sync_cluster();
  store_others(p);
  if (!FAULT) sync_cluster();
}

struct Case {
  const char* name;
  void (*planted)(Matrices);
  void (*twin)(Matrices);
  Launch how;
};

constexpr int row_bytes = cols * 4;
constexpr Launch global = {rows, cols}, block = {rows, cols, row_bytes};
constexpr Launch ring = {1, cols, 3 * row_bytes}, dependent = {rows, cols, 0, 1, true};
constexpr Launch cluster = {rows, cols, row_bytes, 2};

#define CASE(name, how) {#name, name<true>, name<false>, how}
constexpr Case cases[] = {
    CASE(load_past_row, global),
    CASE(load_before_buffer, global),
    CASE(load_from_nowhere, global),
    CASE(load_vector_past_row, global),
    CASE(load_vector_across_end, global),
    CASE(load_output, global),
    CASE(store_past_row, global),
    CASE(store_to_input, global),
    CASE(store_twice, global),
    CASE(store_in_two_blocks, global),
    CASE(load_misaligned, global),
    CASE(load_once_misaligned, global),
    CASE(store_misaligned, global),
    CASE(load_partial_too_soon, dependent),
    CASE(shuffle_not_reached, global),
    CASE(shuffle_beyond_warp, global),
    CASE(warp_waits_in_two_places, global),
    CASE(block_barrier_not_reached, block),
    CASE(cluster_barrier_not_reached, cluster),
    CASE(warps_at_two_barriers, block),
    CASE(shared_past_end, block),
    CASE(shared_before_start, block),
    CASE(shared_misaligned, block),
    CASE(shared_unwritten, block),
    CASE(read_after_write, block),
    CASE(write_after_read, block),
    CASE(write_after_two_reads, block),
    CASE(two_writes, block),
    CASE(write_over_half_a_word, block),
    CASE(copy_from_misaligned, block),
    CASE(copy_to_misaligned, block),
    CASE(copy_past_row, block),
    CASE(copy_not_waited_for, block),
    CASE(copy_not_committed, block),
    CASE(copy_of_another_thread, block),
    CASE(copy_of_another_block, block),
    CASE(store_under_copy, block),
    CASE(copy_over_read, block),
    CASE(ring_waits_for_too_few, ring),
    CASE(peer_outside, cluster),
    CASE(peer_past_end, cluster),
    CASE(peer_unwritten, cluster),
    CASE(peer_after_block_barrier, cluster),
    CASE(write_after_peer, cluster),
    CASE(peer_has_ended, cluster),
    CASE(peer_may_have_ended, cluster),
};

// Sums over a cluster, as the project's kernels form them, and a shuffle by every mask.

struct Vectors {
  const float* in;  // one number for each thread of the grid
  float* out;
  int64_t length;
  int mask;
};

template <class F>
void for_each_buffer(const Vectors& p, F&& f) {
  f(Buffer{"in", p.in, 1, p.length * 4, 0, false});
  f(Buffer{"out", p.out, 1, p.length * 4, 0, true});
}

DEVICE int64_t index_in_grid(int threads) { return block_index() * threads + thread_index(); }

KERNEL(64, 1)
shuffle(PARAMETER(Vectors) p) {
  const int64_t i = index_in_grid(64);
  store(p.out + i, shuffle_xor(load(p.in + i), p.mask));
}

DEVICE float sum_of_warp(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

KERNEL(1024, 1)
cluster_sum(PARAMETER(Vectors) p) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int64_t i = index_in_grid(1024);
  const float of_warp = sum_of_warp(load(p.in + i));
  if (lane == 0) shared_store(place(warp), of_warp);
  sync_cluster();
  float of_lane = 0.0f;
  for (int rank = 0; rank < cluster_size(); ++rank) of_lane += peer_load(place(lane), rank);
  store(p.out + i, sum_of_warp(of_lane));
  sync_cluster();
}

// Reads shared memory past the stand-in.
KERNEL(64, 1)
fresh_shared(PARAMETER(Vectors) p) { store(p.out + index_in_grid(64), *place(thread_index())); }

}  // namespace planted

extern "C" {

// Returns what is wrong, or null. The launches of one case are alike but for the fault.
const char* run_case(const char* name, bool fault, const float* in, float* out) {
  using namespace planted;
  for (const Case& one : cases)
    if (one.name == std::string(name))
      return launch(fault ? one.planted : one.twin, Matrices{in, out}, one.how, nullptr);
  return "there is no such case";
}

int count_of_cases() { return std::size(planted::cases); }

const char* run_copy(int64_t blocks, int threads, int shared_bytes, int cluster, bool dependent,
                     const float* in, float* out) {
  using namespace planted;
  return launch(load_past_row<false>, Matrices{in, out},
                {blocks, threads, shared_bytes, cluster, dependent}, nullptr);
}

const char* run_shuffle(const float* in, float* out, int64_t length, int mask) {
  using namespace planted;
  return launch(shuffle, Vectors{in, out, length, mask}, {length / 64, 64}, nullptr);
}

const char* run_cluster_sum(const float* in, float* out, int64_t length, int cluster) {
  using namespace planted;
  return launch(cluster_sum, Vectors{in, out, length, 0}, {length / 1024, 1024, 128, cluster},
                nullptr);
}

const char* run_fresh_shared(float* out) {
  using namespace planted;
  return launch(fresh_shared, Vectors{nullptr, out, 64, 0}, {1, 64, 256}, nullptr);
}

void find_processors(int* count, int* shared_bytes, bool* have_clusters) {
  fusednorm::cuda::Processors found;
  fusednorm::cuda::processors(found);
  *count = found.count;
  *shared_bytes = found.shared_bytes;
  *have_clusters = found.have_clusters;
}

// Pairs of 16-bit elements as words, and back.
void unpack_words(bool bfloat, const uint32_t* words, float* values, int count) {
  using namespace fusednorm::cuda;
  for (int i = 0; i < count; ++i) {
    if (bfloat)
      unpack<BFloat16>(words[i], values[2 * i], values[2 * i + 1]);
    else
      unpack<Float16>(words[i], values[2 * i], values[2 * i + 1]);
  }
}
void pack_words(bool bfloat, const float* values, uint32_t* words, int count) {
  using namespace fusednorm::cuda;
  for (int i = 0; i < count; ++i)
    words[i] = bfloat ? pack<BFloat16>(values[2 * i], values[2 * i + 1])
                      : pack<Float16>(values[2 * i], values[2 * i + 1]);
}

}  // extern "C"
