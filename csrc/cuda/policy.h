// Launch policy: how many threads share a row, for each number of columns. No GPU has measured it.
#pragma once

#include <cstdint>

namespace fusednorm::cuda {

// Up to 32 threads share a row of up to threads * elements columns, and a block has several such
// rows. Beyond, a row has a block, or the part of it that a block of a cluster has: of as many
// warps as hold it, `threads` at most. N and the dtype alone choose, so that the bits of a row do
// not depend on other rows.
struct Tier {
  int threads;
  int elements;  // of a thread, at most

  constexpr int cols() const { return threads * elements; }
  constexpr int groups() const { return threads <= 32 ? 128 / threads : 1; }  // rows of a block
  constexpr int most_threads() const { return threads * groups(); }
  constexpr int warps() const { return (threads + 31) / 32; }
  // The threads of a block that has so many columns of a row.
  constexpr int block(int64_t width) const {
    const int needed = int(width + elements - 1) / elements;
    return threads <= 32 ? most_threads() : (needed + 31) / 32 * 32;
  }
};

// Rows of a warp or less need no barrier. 32 elements a thread pay for the sums over a row, 16
// leave the backward room for two float32 sums of each column.
constexpr Tier forward_tiers[] = {{8, 8},   {8, 16},   {8, 32},  {16, 32},
                                  {32, 32}, {512, 32}, {512, 32}};
constexpr Tier backward_tiers[] = {{8, 8}, {8, 16}, {16, 16}, {32, 16}, {512, 16}, {512, 16}};
// The last ones are for rows that the blocks of a cluster share.
constexpr int first_shared_forward = 6, first_shared_backward = 5;
constexpr int count_of_forward_tiers = sizeof(forward_tiers) / sizeof(Tier);
constexpr int count_of_backward_tiers = sizeof(backward_tiers) / sizeof(Tier);

// The elements of a thread that every row of a tier has: half of them, since the tier before holds
// shorter rows; what the blocks of a cluster have differs by less than that.
template <int COUNT>
constexpr int certain(const Tier (&tiers)[COUNT], int index) {
  return index == 0 ? 0 : tiers[index].elements / 2;
}

// Rows that a thread of the forward has at a time, so that it has 32 elements in flight.
constexpr int rows_at_once(Tier tier) { return tier.threads <= 32 ? 32 / tier.elements : 1; }

constexpr int max_cluster = 8;  // what every device with clusters can schedule

// Blocks that share one processor's 65536 registers. The forward has 64 a thread for 16 bits where
// a block is a row, 80 where it has several rows that are read from one tensor, and up to 128
// elsewhere; the backward 128.
constexpr int forward_blocks(Tier tier, int element_bytes, bool stream) {
  if (tier.most_threads() == 128) return stream ? 4 : 6;
  return element_bytes == 2 && !stream ? 2 : 1;
}
constexpr int backward_blocks(int threads) { return 512 / threads; }

struct Shape {
  int tier = -1;    // index of the tier; -1 where the row is too long
  int cluster = 1;  // blocks that share a row
};

// The narrowest tier that holds a row, and the smallest cluster of it.
template <int COUNT>
constexpr Shape shape_of(const Tier (&tiers)[COUNT], int first_shared, int64_t cols,
                         bool have_clusters) {
  for (int i = 0; i < first_shared; ++i)
    if (cols <= tiers[i].cols()) return {i, 1};
  if (!have_clusters) return {};
  for (int i = first_shared; i < COUNT; ++i)
    for (int cluster = 2; cluster <= max_cluster; cluster *= 2)
      if (cols <= int64_t(tiers[i].cols()) * cluster) return {i, cluster};
  return {};
}

constexpr Shape forward_shape(int64_t cols, bool have_clusters) {
  return shape_of(forward_tiers, first_shared_forward, cols, have_clusters);
}
constexpr Shape backward_shape(int64_t cols, bool have_clusters) {
  return shape_of(backward_tiers, first_shared_backward, cols, have_clusters);
}

// Clusters of this many blocks add up their column sums before they write them: that much fewer
// partial rows, for one barrier a kernel.
constexpr int fold = 4;
// Rows that are worth a partial row of column sums.
constexpr int64_t rows_per_group = 4;
// Rows that are read ahead, the one at hand among them, where shared memory has room for them.
constexpr int max_stages = 4;

}  // namespace fusednorm::cuda
