// The arguments of the equation as kernels on every device take them: pointers, sizes and strides,
// no torch.
//
//     h = residual + gate * dropout(x)    x_hat = (h - mean) * rstd    y = x_hat * weight + bias
//     z = y * (1 + scale) + shift
//
// triton_kernels/README.md derives the statistics and the gradients. Statistics and sums are in the
// compute type C: double where x or h is double, float otherwise.
#pragma once

#include <cstdint>

namespace fusednorm {

enum class DType : int32_t { none, f16, bf16, f32, f64 };

// After every so many rows the next one lies that many elements further on.
struct Jump {
  int64_t every = 0;  // 0 where there is none
  int64_t by = 0;
};

// [M, N] with adjacent columns and rows `stride` elements apart, but for the jumps, of which those
// that are there come first; absent where data is null. An output has no jumps.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::none;
  bool beyond_cache = false;  // an output too large to be found in cache by who reads it
  Jump jumps[2] = {};

  // Where a row begins, in elements.
  int64_t offset(int64_t row) const {
    int64_t elements = row * stride;
    for (const Jump& jump : jumps) {
      if (jump.every == 0) break;
      elements += row / jump.every * jump.by;
    }
    return elements;
  }
};

// A vector [N], or one number that stands for N equal ones, for each sample of consecutive rows;
// samples are `stride` elements apart, 0 where one serves all rows. Absent where data is null.
struct Term {
  const void* data = nullptr;
  int64_t stride = 0;
  bool is_number = false;
  DType dtype = DType::none;
};

// Element (row, column) of x is dropped if word column % 4 of Philox 4x32-10 with counter
// (column / 4, row) and key `seed` is below `drop_below`, and divided by 1 - p otherwise.
struct Dropout {
  const int64_t* seed = nullptr;  // null without dropout
  uint32_t drop_below = 0;
  double inverse_keep = 1.0;  // 1 / (1 - p)
};

struct Problem {
  int64_t rows = 0;             // M
  int64_t cols = 0;             // N
  int64_t rows_per_sample = 0;  // M where no term differs between samples
  bool rms = false;             // whether the mean is taken as 0
  DType compute = DType::f32;
  DType x_hat_dtype = DType::none;  // what x_hat is rounded to before the affine part
  Dropout dropout;
  Term gate, weight, bias, scale;
};

struct Forward : Problem {
  double eps = 0.0;
  Term shift;
  Rows x, residual;
  DType h_dtype = DType::none;  // what h is rounded to; none where h is x
  Rows h;                       // written where present
  Rows z;
  void* mean = nullptr;  // [M] of C, or null
  void* rstd = nullptr;  // [M] of C, or null
};

struct Backward : Problem {
  Rows dz, dh;                 // at least one of them
  Rows h;                      // what the forward normalised
  Rows x;                      // needed for dgate only
  const void* mean = nullptr;  // [M] of C; null for RMS
  const void* rstd = nullptr;  // [M] of C
  Rows dx, dresidual;          // written where present
};

// The gated norm: z = y * silu(gate), or y of x * silu(gate) where the gate comes first. Each group
// of `group_size` columns has statistics of its own, [M * groups] in all.
struct Gated : Problem {
  int64_t group_size = 0;  // a divisor of N
  bool gate_first = false;
  Rows x, gate_input;

  int64_t groups() const { return cols / group_size; }
};

struct GatedForward : Gated {
  double eps = 0.0;
  Rows z;
  void* mean = nullptr;  // of C, or null
  void* rstd = nullptr;  // of C, or null
};

struct GatedBackward : Gated {
  Rows dz;
  const void* mean = nullptr;  // of C; null for RMS
  const void* rstd = nullptr;  // of C
  Rows dx, dgate_input;        // written where present
};

}  // namespace fusednorm
