// The CUDA kernels as any program can call them.
//
// All rows of a call have one dtype, float16, bfloat16 or float32; weight and bias have that one or
// float32, both the same; gate, scale, shift and an intermediate rounding of x_hat are not there.
// `stream` is a cudaStream_t of the device in use.
// Functions that can fail return what is wrong, or null.
#pragma once

#include <cstdint>

#include "../equation.h"

namespace fusednorm::cuda {

// How many columns can be normalised together on the device in use.
const char* widest_row(int64_t& cols);

const char* layer_norm_fwd(const Forward& p, void* stream);

struct Backward : fusednorm::Backward {
  // [partial_rows, 2, N]: the sums of dz * x_hat and of dz over the rows of a cluster; null where
  // neither is wanted.
  float* partials = nullptr;
  int64_t partial_rows = 0;
};

// Whether more comes in than dz, or more goes out than dx.
inline bool has_stream(const fusednorm::Backward& p) {
  return p.dh.data || p.dresidual.data || p.dropout.seed;
}

// How a backward is shared out on the device in use.
struct Shares {
  int64_t clusters = 0;  // and partial rows
  int cluster = 1;       // its blocks; they share a row or add up their sums
  int threads = 0;       // of a block
  int rows_of_a_group = 0;
  int tier = 0;
  int streams = 2;
  int stages = 0;
  int shared_bytes = 0;
};

const char* share_out(const Backward& p, bool wants_sums, Shares& found);
const char* layer_norm_bwd(const Backward& p, const Shares& shares, void* stream);

// dweight and dbias are the sums of the partial rows; null where not wanted.
struct Finalize {
  const float* partials = nullptr;
  int64_t partial_rows = 0;
  int64_t cols = 0;
  void* dweight = nullptr;
  void* dbias = nullptr;
  DType dtype = DType::none;
};

// Runs after layer_norm_bwd in the same stream.
const char* layer_norm_bwd_finalize(const Finalize& p, void* stream);

}  // namespace fusednorm::cuda
