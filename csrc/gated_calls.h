// As calls.h, for the gated norm; its arguments are those of the launchers in
// fusednorm/triton_kernels/gated.py.
#pragma once

#include "tensors.h"

namespace fusednorm {

struct GatedForwardArguments {
  PyObject *x, *gate_input, *weight, *bias;
  PyObject *normalized_shape, *group_size, *eps, *rms, *norm_before_gate, *out_dtype, *x_hat_dtype;
  PyObject* save_stats;
};

struct GatedBackwardArguments {
  PyObject *dz, *x, *gate_input, *mean, *rstd, *weight, *bias;
  PyObject *normalized_shape, *group_size, *norm_before_gate, *x_hat_dtype, *output_mask;
};

// Describes what both directions are given.
template <class Arguments>
void describe_gated(Gated& p, Layout& layout, const Arguments& a) {
  p.rows = p.rows_per_sample = layout.row_count();
  p.cols = layout.cols();
  p.group_size = integer(a.group_size);
  p.gate_first = !flag(a.norm_before_gate);
  p.x_hat_dtype = dtype(a.x_hat_dtype);
  p.x = layout.rows(a.x);
  p.gate_input = layout.rows(a.gate_input);
  p.weight = layout.vector(given(a.weight));
  p.bias = layout.vector(given(a.bias));
}

class GatedForwardCall {
 public:
  explicit GatedForwardCall(const GatedForwardArguments& a) : layout_(a.x, a.normalized_shape) {
    const bool is_double = dtype_of(a.x) == DType::f64 || dtype_of(a.gate_input) == DType::f64;
    p.compute = is_double ? DType::f64 : DType::f32;
    p.rms = flag(a.rms);
    p.eps = number(a.eps);
    if (flag(a.save_stats)) {
      const int64_t size = layout_.cols() == 0 ? 1 : integer(a.group_size);
      const long long places = layout_.row_count() * layout_.cols() / size;
      const Ref shape(Py_BuildValue("(L)", places));
      rstd = new_empty(a.x, shape, p.compute);
      if (!p.rms) mean = empty_like(rstd.get(), p.compute);
    }
    const DType out_dtype = dtype(a.out_dtype);
    z = empty_like(a.x, out_dtype);
    if (is_empty()) return;
    describe_gated(p, layout_, a);
    p.z = layout_.fresh(z, out_dtype);
    if (mean) p.mean = address(mean.get());
    if (rstd) p.rstd = address(rstd.get());
  }

  bool is_empty() const { return layout_.is_empty(); }

  GatedForward p;
  Ref z, mean, rstd;

 private:
  Layout layout_;
};

inline PyObject* outputs(const GatedForwardCall& call) {
  return pack(call.z, call.mean, call.rstd);
}

// B is the GatedBackward of a device.
template <class B>
class GatedBackwardCall {
 public:
  explicit GatedBackwardCall(const GatedBackwardArguments& a) : layout_(a.x, a.normalized_shape) {
    PyObject* const inputs[] = {a.x, a.gate_input, a.weight, a.bias};
    for (int i = 0; i < 4; ++i) {
      const bool wanted = flag(Ref(PySequence_GetItem(a.output_mask, i)).get());
      if (wanted && inputs[i] != Py_None) gradients[i] = empty_like(inputs[i], dtype_of(inputs[i]));
    }
    if (is_empty()) {
      for (const Ref& gradient : gradients)
        if (gradient) invoke(gradient.get(), names().zero.get());
      return;
    }
    describe_gated(p, layout_, a);
    p.rms = a.mean == Py_None;
    p.compute = dtype_of(a.rstd);
    p.dz = layout_.rows(a.dz);
    p.mean = address(a.mean);
    p.rstd = address(a.rstd);
    p.dx = layout_.fresh(gradients[0], p.x.dtype);
    p.dgate_input = layout_.fresh(gradients[1], p.gate_input.dtype);
  }

  bool is_empty() const { return layout_.is_empty(); }

  Term dweight() { return gradients[2] ? layout_.vector(gradients[2].get()) : Term{}; }
  Term dbias() { return gradients[3] ? layout_.vector(gradients[3].get()) : Term{}; }

  B p;
  Ref gradients[4];  // of x, gate_input, weight and bias

 private:
  Layout layout_;
};

template <class B>
PyObject* outputs(const GatedBackwardCall<B>& call) {
  const auto& [dx, dgate_input, dweight, dbias] = call.gradients;
  return pack(dx, dgate_input, dweight, dbias);
}

}  // namespace fusednorm
