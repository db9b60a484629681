// What the project's kernels may touch; a part of device.h.
#pragma once

#include "cuda/layer_norm.h"

namespace fusednorm {

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline cuda::Buffer buffer_of(const char* name, const Rows& rows, const Problem& p, bool written) {
  const int64_t size = bytes_of(rows.dtype);
  return {name, rows.data, p.rows, p.cols * size, rows.stride * size, written};
}

inline cuda::Buffer buffer_of(const char* name, const Term& term, const Problem& p) {
  const int64_t size = bytes_of(term.dtype), cols = term.is_number ? 1 : p.cols;
  const int64_t samples = term.stride ? p.rows / p.rows_per_sample : 1;
  return {name, term.data, samples, cols * size, term.stride * size, false};
}

inline cuda::Buffer buffer_of(const char* name, const void* data, int64_t bytes, bool written) {
  return {name, data, 1, bytes, bytes, written};
}

template <class F>
void for_each_input(const Problem& p, F& f) {
  f(buffer_of("gate", p.gate, p));
  f(buffer_of("weight", p.weight, p));
  f(buffer_of("bias", p.bias, p));
  f(buffer_of("scale", p.scale, p));
  f(buffer_of("seed", p.dropout.seed, sizeof(int64_t), false));
}

template <class F>
void for_each_buffer(const Forward& p, F&& f) {
  for_each_input(p, f);
  f(buffer_of("shift", p.shift, p));
  f(buffer_of("x", p.x, p, false));
  f(buffer_of("residual", p.residual, p, false));
  f(buffer_of("h", p.h, p, true));
  f(buffer_of("z", p.z, p, true));
  f(buffer_of("mean", p.mean, p.rows * bytes_of(p.compute), true));
  f(buffer_of("rstd", p.rstd, p.rows * bytes_of(p.compute), true));
}

namespace cuda {

template <class F>
void for_each_buffer(const Backward& p, F&& f) {
  for_each_input(p, f);
  f(buffer_of("dz", p.dz, p, false));
  f(buffer_of("dh", p.dh, p, false));
  f(buffer_of("h", p.h, p, false));
  f(buffer_of("x", p.x, p, false));
  f(buffer_of("mean", p.mean, p.rows * bytes_of(p.compute), false));
  f(buffer_of("rstd", p.rstd, p.rows * bytes_of(p.compute), false));
  f(buffer_of("dx", p.dx, p, true));
  f(buffer_of("dresidual", p.dresidual, p, true));
  const int64_t row = p.cols * int64_t(sizeof(float));
  f(Buffer{"partials", p.partials, p.partial_rows * 2, row, row, true});
}

template <class F>
void for_each_buffer(const Finalize& p, F&& f) {
  const int64_t row = p.cols * int64_t(sizeof(float));
  f(Buffer{"partials", p.partials, p.partial_rows * 2, row, row, false});
  f(buffer_of("dweight", p.dweight, p.cols * bytes_of(p.dtype), true));
  f(buffer_of("dbias", p.dbias, p.cols * bytes_of(p.dtype), true));
}

}  // namespace cuda
}  // namespace fusednorm
