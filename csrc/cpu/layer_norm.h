// The CPU kernels as any program can call them.
#pragma once

#include <cstdint>

#include "../equation.h"

namespace fusednorm::cpu {

struct Backward : fusednorm::Backward {
  // Where present: [tasks, N] of C, the sums over the rows of a task.
  void* dweight = nullptr;
  void* dbias = nullptr;
  // Where present: [units, N] of C, the sums over the rows of a unit.
  void* dgate = nullptr;
  void* dscale = nullptr;
  void* dshift = nullptr;
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

// Adds up partial rows: out[i, :] is the sum of `count` consecutive rows of `partials`.
struct Fold {
  const void* partials = nullptr;  // [rows * count, N] of C
  int64_t cols = 0;
  int64_t count = 0;
  DType compute = DType::f32;
  void* out = nullptr;     // [rows, N], or [rows] of sums over the columns as well
  bool is_number = false;  // the latter
  DType dtype = DType::none;
};

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
};

// Returns the build in use: the widest that this processor runs, unless another one was asked for.
const Kernels& kernels();

// Puts the build of that name in use; returns false where this processor cannot run it, or there is
// none.
bool use_level(const char* level);

}  // namespace fusednorm::cpu
