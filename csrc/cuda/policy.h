// Launch policy: how many threads share a row, for each number of columns. No GPU has measured it.
#pragma once

#include <cstdint>

namespace fusednorm::cuda {

constexpr int chunk = 8;  // adjacent elements that one thread holds

// `threads` threads hold up to `elements` elements each, of a row, or of what a block of a cluster
// has of it. N and the dtype alone choose, so that the bits of a row do not depend on other rows.
struct Tier {
  int threads;
  int elements;

  constexpr int cols() const { return threads * elements; }
  constexpr int block() const { return threads < 128 ? 128 : threads; }
  constexpr int groups() const { return block() / threads; }  // rows of a block at a time
};

// Rows of a warp or less need no barrier. From 128 threads on, 16 elements leave the forward room
// for many rows on a processor, and the backward for two float32 sums of each column.
constexpr Tier forward_tiers[] = {{8, 8},    {16, 8},   {32, 8},   {32, 16}, {32, 32},
                                  {128, 16}, {256, 16}, {256, 32}, {512, 32}};
constexpr Tier backward_tiers[] = {{8, 8},    {16, 8},   {32, 8},   {32, 16}, {32, 32},
                                   {128, 16}, {256, 16}, {512, 16}, {512, 32}};
constexpr int count_of_forward_tiers = sizeof(forward_tiers) / sizeof(Tier);
constexpr int count_of_backward_tiers = sizeof(backward_tiers) / sizeof(Tier);

constexpr int max_cluster = 8;  // what every device with clusters can schedule

// Blocks that share one processor's 65536 registers. The forward needs 64 a thread for 32 elements
// of 16 bits and 80 for 32 of float32; the backward 128 and, where it may have them, more for the
// sums of 32 columns.
constexpr int forward_blocks(Tier tier, int element_bytes) {
  const int threads = element_bytes == 4 ? 768 : 1024;
  return tier.block() < threads ? threads / tier.block() : 1;
}
constexpr int backward_blocks(Tier tier) {
  const int threads = tier.elements == 32 ? 384 : 512;
  return tier.block() < threads ? threads / tier.block() : 1;
}

struct Shape {
  int tier = -1;    // index of the tier; -1 where the row is too long
  int cluster = 1;  // blocks that share a row
};

// The narrowest tier that holds a row in one block, up to `first_shared`; beyond it, the smallest
// cluster of the narrowest tier from that one on.
template <int COUNT>
constexpr Shape shape_of(const Tier (&tiers)[COUNT], int first_shared, int64_t cols,
                         bool have_clusters) {
  for (int i = 0; i <= first_shared; ++i)
    if (cols <= tiers[i].cols()) return {i, 1};
  if (!have_clusters) return {};
  for (int i = first_shared; i < COUNT; ++i)
    for (int cluster = 2; cluster <= max_cluster; cluster *= 2)
      if (cols <= int64_t(tiers[i].cols()) * cluster) return {i, cluster};
  return {};
}

// A row of up to 16384 columns is read by one block in the forward, of up to 8192 in the backward:
// 1024 threads have no registers for 32 elements each.
constexpr int first_shared_forward = 8, first_shared_backward = 7;

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
