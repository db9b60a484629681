// The calls that the extension's launchers get from Python: the arguments by name, the problem that
// the kernels solve, the results.
#pragma once

#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace fusednorm {

// The arguments of the launchers in fusednorm/triton_kernels/forward.py and backward.py, by name.
struct ForwardArguments {
  PyObject *x, *residual, *gate, *weight, *bias, *scale, *shift, *seed;
  PyObject *normalized_shape, *eps, *rms, *dropout_p, *out_dtype, *h_dtype, *x_hat_dtype;
  PyObject *save_stats, *store_h;
};

struct BackwardArguments {
  PyObject *dz, *dh, *x, *h, *mean, *rstd, *gate, *weight, *bias, *scale, *shift, *seed;
  PyObject *normalized_shape, *dropout_p, *x_dtype, *residual_dtype, *x_hat_dtype, *output_mask;
};

// Describes what both directions are given.
template <class Arguments>
void describe(Problem& p, Layout& layout, const Arguments& a) {
  PyObject *const gate = a.gate, *const scale = a.scale, *const shift = a.shift;
  const double dropout_p = number(a.dropout_p);
  p.rows = layout.row_count();
  p.cols = layout.cols();
  int64_t samples = 1;
  for (PyObject* term : {gate, scale, shift})
    if (term != Py_None) samples = std::max(samples, size(term, 0));
  p.rows_per_sample = p.rows / samples;
  p.x_hat_dtype = dtype(a.x_hat_dtype);
  p.dropout.seed = static_cast<const int64_t*>(address(a.seed));
  p.dropout.drop_below = uint32_t(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
  p.dropout.inverse_keep = 1.0 / (1.0 - dropout_p);
  p.gate = layout.term(gate);
  p.weight = layout.vector(a.weight);
  p.bias = layout.vector(a.bias);
  p.scale = layout.term(scale);
}

// A forward: its arguments are those of the launchers in fusednorm/triton_kernels/forward.py.
class ForwardCall {
 public:
  explicit ForwardCall(const ForwardArguments& a) : layout_(a.x, a.normalized_shape) {
    PyObject* const x = a.x;
    const DType out_dtype = dtype(a.out_dtype);
    p.h_dtype = dtype(a.h_dtype);
    p.rms = flag(a.rms);
    p.eps = number(a.eps);
    p.compute = dtype_of(x) == DType::f64 || p.h_dtype == DType::f64 ? DType::f64 : DType::f32;
    if (p.h_dtype != DType::none && flag(a.store_h)) h_ = empty_like(x, p.h_dtype);
    if (flag(a.save_stats)) {
      const Ref shape(Py_BuildValue("(L)", static_cast<long long>(layout_.row_count())));
      rstd_ = new_empty(x, shape, p.compute);
      if (!p.rms) mean_ = empty_like(rstd_.get(), p.compute);
    }
    z_ = empty_like(x, out_dtype);
    if (is_empty()) return;
    describe(p, layout_, a);
    p.shift = layout_.term(a.shift);
    p.x = layout_.rows(x);
    p.residual = layout_.rows(a.residual);
    p.z = layout_.fresh(z_, out_dtype);
    p.h = layout_.fresh(h_, p.h_dtype);
    if (mean_) p.mean = address(mean_.get());
    if (rstd_) p.rstd = address(rstd_.get());
  }

  bool is_empty() const { return layout_.is_empty(); }
  PyObject* outputs() const { return pack(z_, h_, mean_, rstd_); }

  Forward p;

 private:
  Layout layout_;
  Ref z_, h_, mean_, rstd_;
};

// A backward: its arguments are those of the launchers in fusednorm/triton_kernels/backward.py.
// B is the Backward of a device.
template <class B>
class BackwardCall {
 public:
  explicit BackwardCall(const BackwardArguments& a) : layout_(a.h, a.normalized_shape) {
    allocate(a);
    if (is_empty()) {
      zero();
      return;
    }
    describe(p, layout_, a);
    p.rms = a.mean == Py_None;
    p.compute = dtype_of(a.rstd);
    p.dz = layout_.rows(a.dz);
    p.dh = layout_.rows(a.dh);
    p.h = layout_.rows(a.h);
    p.mean = address(a.mean);
    p.rstd = address(a.rstd);
    p.dx = layout_.fresh(gradients_[0], dtype(a.x_dtype));
    p.dresidual = layout_.fresh(gradients_[1], dtype(a.residual_dtype));
    if (gradients_[2]) p.x = layout_.rows(a.x);
  }

  bool is_empty() const { return layout_.is_empty(); }

  Term dgate() { return gradients_[2] ? layout_.term(gradients_[2].get()) : Term{}; }
  Term dweight() { return gradients_[3] ? layout_.vector(gradients_[3].get()) : Term{}; }
  Term dbias() { return gradients_[4] ? layout_.vector(gradients_[4].get()) : Term{}; }
  Term dscale() { return gradients_[5] ? layout_.term(gradients_[5].get()) : Term{}; }
  Term dshift() { return gradients_[6] ? layout_.term(gradients_[6].get()) : Term{}; }

  PyObject* outputs() const {
    const auto& [dx, dresidual, dgate, dweight, dbias, dscale, dshift] = gradients_;
    return pack(dx, dresidual, dgate, dweight, dbias, dscale, dshift);
  }

  B p;

 private:
  // Without a gradient of z there is none but those of x, residual and gate.
  void allocate(const BackwardArguments& a) {
    const auto wanted = [&](int i) {
      return flag(Ref(PySequence_GetItem(a.output_mask, i)).get());
    };
    PyObject* const streams[] = {a.x_dtype, a.residual_dtype};
    for (int i = 0; i < 2; ++i)
      if (wanted(i)) gradients_[i] = empty_like(a.h, dtype(streams[i]));
    PyObject* const parameters[] = {a.gate, a.weight, a.bias, a.scale, a.shift};
    for (int i = 0; i < (a.dz != Py_None ? 5 : 1); ++i)
      if (parameters[i] != Py_None && wanted(2 + i))
        gradients_[2 + i] = empty_like(parameters[i], dtype_of(parameters[i]));
  }

  void zero() {
    for (const Ref& gradient : gradients_)
      if (gradient) invoke(gradient.get(), names().zero.get());
  }

  Layout layout_;
  Ref gradients_[7];  // of x, residual, gate, weight, bias, scale and shift
};

}  // namespace fusednorm
