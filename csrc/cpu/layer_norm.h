// The CPU kernels as any program can call them.
#pragma once

#include <cstdint>

#include "../equation.h"

namespace fusednorm::cpu {

// Adds up partial rows: out[i, :] is the sum of `count` consecutive rows of `partials`.
struct Fold {
  const void* partials = nullptr;  // [rows * count, N] of C
  int64_t cols = 0;
  int64_t count = 0;
  DType compute = DType::f32;
  void* out = nullptr;     // [rows, N], or [rows] of sums over the columns as well
  bool is_number = false;  // the latter
  DType dtype = DType::none;

  explicit operator bool() const { return out != nullptr; }
};

struct Backward : fusednorm::Backward {
  // Where present: [tasks, N] of C, the sums over the rows of a task.
  void* dweight = nullptr;
  void* dbias = nullptr;
  // Where present: of the sums over the rows of each unit. Without `partials` a unit is a whole
  // sample, whose sums the backward turns into the gradient itself.
  Fold dgate, dscale, dshift;
  int64_t units_per_sample = 1;  // a unit is a run of consecutive rows of one sample
  int64_t units = 1;
  int64_t tasks = 1;  // a task is a run of consecutive units
};

struct GatedBackward : fusednorm::GatedBackward {
  // Where present: [tasks, N] of C, the sums over the rows of a task.
  void* dweight = nullptr;
  void* dbias = nullptr;
  int64_t tasks = 1;  // a task is a run of consecutive rows
};

// [B, C, S] with adjacent positions and batches and channels that far apart; absent where data is
// null.
struct Planes {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t channel_stride = 0;
  DType dtype = DType::none;
  bool beyond_cache = false;  // as that of Rows
};

// Norms over the channels: the rows are the B * S positions, those of an image one after the other,
// and the columns the C channels of a position.
struct Channels : Problem {
  int64_t positions() const { return rows_per_sample; }  // S

  int64_t units = 0;  // a unit is a run of positions of one image
  int64_t units_per_image = 0;
};

struct ChannelsForward : Channels {
  double eps = 0.0;
  Planes x, z;
  void* mean = nullptr;  // [B, S] of C, or null
  void* rstd = nullptr;  // [B, S] of C, or null
};

struct ChannelsBackward : Channels {
  Planes dz, x;
  const void* mean = nullptr;  // [B, S] of C; null for RMS
  const void* rstd = nullptr;  // [B, S] of C
  Planes dx;                   // written where present
  void* dweight = nullptr;     // where present: [tasks, C], the sums over the positions of a task
  void* dbias = nullptr;
  int64_t tasks = 1;  // a task is a run of consecutive units
};

// The positions of a unit; its image's last one takes what is left over as well.
constexpr int64_t unit_positions = 64;

// One build of the kernels, for one instruction set. All of them may run in several threads at once
// on disjoint ranges, and give the same bits however the work is shared out among calls.
struct Kernels {
  const char* level;
  void (*forward)(const Forward&, int64_t first_row, int64_t last_row);
  void (*backward)(const Backward&, int64_t first_task, int64_t last_task);
  void (*fold)(const Fold&, int64_t row, int64_t first_col, int64_t last_col);
  // A place is one group of one row.
  void (*gated_forward)(const GatedForward&, int64_t first_place, int64_t last_place);
  void (*gated_backward)(const GatedBackward&, int64_t first_task, int64_t last_task);
  void (*channels_forward)(const ChannelsForward&, int64_t first_unit, int64_t last_unit);
  void (*channels_backward)(const ChannelsBackward&, int64_t first_task, int64_t last_task);
};

// Returns the build in use: the widest that this processor runs, unless another one was asked for.
const Kernels& kernels();

// Puts the build of that name in use; returns false where this processor cannot run it, or there is
// none.
bool use_level(const char* level);

}  // namespace fusednorm::cpu
