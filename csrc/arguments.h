// What the extension's functions take from Python: tensors as their addresses, laid out and
// allocated there. Python's limited API alone is used.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cmath>
#include <exception>

#include "equation.h"

namespace fusednorm {

// The arguments of a call, one after the other.
class Arguments {
 public:
  explicit Arguments(PyObject* const* first) : next_(first) {}

  int64_t integer() { return PyLong_AsLongLong(*next_++); }
  double number() { return PyFloat_AsDouble(*next_++); }
  void* address() { return PyLong_AsVoidPtr(*next_++); }
  DType dtype() { return DType(integer()); }

  // None, or a tuple of the tensor, its address, its stride, its dtype.
  Rows rows() {
    PyObject* tuple = *next_++;
    if (tuple == Py_None) return {};
    Arguments fields(tuple, 1, 3);
    return {fields.address(), fields.integer(), fields.dtype()};
  }

  // None, or a tuple of the tensor, its address, its stride, its dtype, whether it is one number.
  Term term() {
    PyObject* tuple = *next_++;
    if (tuple == Py_None) return {};
    Arguments fields(tuple, 1, 4);
    Term term;
    term.data = fields.address();
    term.stride = fields.integer();
    term.dtype = fields.dtype();
    term.is_number = fields.integer();
    return term;
  }

  void problem(Problem& p) {
    p.rows = integer();
    p.cols = integer();
    p.rows_per_sample = integer();
    p.compute = dtype();
    p.x_hat_dtype = dtype();
    p.rms = integer();
    p.dropout.seed = static_cast<const int64_t*>(address());
    const double rate = number();
    p.dropout.drop_below = uint32_t(std::min(std::nearbyint(rate * 4294967296.0), 4294967295.0));
    p.dropout.inverse_keep = 1.0 / (1.0 - rate);
    p.gate = term();
    p.weight = term();
    p.bias = term();
    p.scale = term();
  }

  void forward(Forward& p) {
    problem(p);
    p.eps = number();
    p.shift = term();
    p.x = rows();
    p.residual = rows();
    p.h_dtype = dtype();
    p.h = rows();
    p.z = rows();
    p.mean = address();
    p.rstd = address();
  }

  void backward(Backward& p) {
    problem(p);
    p.dz = rows();
    p.dh = rows();
    p.h = rows();
    p.x = rows();
    p.mean = address();
    p.rstd = address();
    p.dx = rows();
    p.dresidual = rows();
  }

 private:
  Arguments(PyObject* tuple, int first, int count) : next_(fields_) {
    for (int i = 0; i < count; ++i) fields_[i] = PyTuple_GetItem(tuple, first + i);
  }

  PyObject* const* next_;
  PyObject* fields_[4];
};

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// Runs f, which reads its arguments and then computes; returns what Python is to get.
template <class F>
PyObject* call(const F& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  if (PyErr_Occurred()) return nullptr;
  Py_INCREF(Py_None);
  return Py_None;
}

inline PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fusednorm
