// The calls that the extension's launchers get from Python, and what they return there.
#pragma once

#include "calls.h"
#include "gated_calls.h"
#include "tensors.h"

namespace fusednorm {

template <class L = Layout>
ForwardArguments<L> read_forward(PyObject* const* arguments, Py_ssize_t count) {
  struct Objects {
    PyObject *x, *residual, *gate, *weight, *bias, *scale, *shift, *seed;
    PyObject *normalized_shape, *eps, *rms, *dropout_p, *out_dtype, *h_dtype, *x_hat_dtype;
    PyObject *save_stats, *store_h;
  };
  const auto a = named<Objects>(arguments, count);
  return {given(a.x),         given(a.residual), given(a.gate),        given(a.weight),
          given(a.bias),      given(a.scale),    given(a.shift),       given(a.seed),
          a.normalized_shape, number(a.eps),     flag(a.rms),          number(a.dropout_p),
          dtype(a.out_dtype), dtype(a.h_dtype),  dtype(a.x_hat_dtype), flag(a.save_stats),
          flag(a.store_h)};
}

template <class L = Layout>
BackwardArguments<L> read_backward(PyObject* const* arguments, Py_ssize_t count) {
  struct Objects {
    PyObject *dz, *dh, *x, *h, *mean, *rstd, *gate, *weight, *bias, *scale, *shift, *seed;
    PyObject *normalized_shape, *dropout_p, *x_dtype, *residual_dtype, *x_hat_dtype, *output_mask;
  };
  const auto a = named<Objects>(arguments, count);
  BackwardArguments<L> read{given(a.dz),          given(a.dh),
                            given(a.x),           given(a.h),
                            given(a.mean),        given(a.rstd),
                            given(a.gate),        given(a.weight),
                            given(a.bias),        given(a.scale),
                            given(a.shift),       given(a.seed),
                            a.normalized_shape,   number(a.dropout_p),
                            dtype(a.x_dtype),     dtype(a.residual_dtype),
                            dtype(a.x_hat_dtype), {}};
  for (int i = 0; i < 7; ++i)
    read.wanted[i] = flag(Ref(PySequence_GetItem(a.output_mask, i)).get());
  return read;
}

template <class L>
PyObject* outputs(const ForwardCall<L>& call) {
  return pack(call.z, call.h, call.mean, call.rstd);
}

template <class B, class L>
PyObject* outputs(const BackwardCall<B, L>& call) {
  const auto& [dx, dresidual, dgate, dweight, dbias, dscale, dshift] = call.gradients;
  return pack(dx, dresidual, dgate, dweight, dbias, dscale, dshift);
}

inline GatedForwardArguments<Layout> read_gated_forward(PyObject* const* arguments,
                                                        Py_ssize_t count) {
  struct Objects {
    PyObject *x, *gate_input, *weight, *bias;
    PyObject *normalized_shape, *group_size, *eps, *rms, *norm_before_gate, *out_dtype;
    PyObject *x_hat_dtype, *save_stats;
  };
  const auto a = named<Objects>(arguments, count);
  return {given(a.x),         given(a.gate_input),  given(a.weight),
          given(a.bias),      a.normalized_shape,   integer(a.group_size),
          number(a.eps),      flag(a.rms),          flag(a.norm_before_gate),
          dtype(a.out_dtype), dtype(a.x_hat_dtype), flag(a.save_stats)};
}

inline GatedBackwardArguments<Layout> read_gated_backward(PyObject* const* arguments,
                                                          Py_ssize_t count) {
  struct Objects {
    PyObject *dz, *x, *gate_input, *mean, *rstd, *weight, *bias;
    PyObject *normalized_shape, *group_size, *norm_before_gate, *x_hat_dtype, *output_mask;
  };
  const auto a = named<Objects>(arguments, count);
  GatedBackwardArguments<Layout> read{given(a.dz),           given(a.x),
                                      given(a.gate_input),   given(a.mean),
                                      given(a.rstd),         given(a.weight),
                                      given(a.bias),         a.normalized_shape,
                                      integer(a.group_size), flag(a.norm_before_gate),
                                      dtype(a.x_hat_dtype),  {}};
  for (int i = 0; i < 4; ++i)
    read.wanted[i] = flag(Ref(PySequence_GetItem(a.output_mask, i)).get());
  return read;
}

inline PyObject* outputs(const GatedForwardCall<Layout>& call) {
  return pack(call.z, call.mean, call.rstd);
}

template <class B>
PyObject* outputs(const GatedBackwardCall<B, Layout>& call) {
  const auto& [dx, dgate_input, dweight, dbias] = call.gradients;
  return pack(dx, dgate_input, dweight, dbias);
}

}  // namespace fusednorm
