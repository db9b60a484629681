// What the extension's functions take from Python and return: torch's tensors, described for the
// kernels and allocated, by the methods that Python has for it. Its limited API alone is used.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "equation.h"

namespace fusednorm {

// A Python exception is set.
struct Raised {};

// A reference to an object, or to none.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {
    if (owned == nullptr) throw Raised{};
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

inline Ref shared(PyObject* object) {
  Py_INCREF(object);
  return Ref(object);
}

inline Ref attribute(PyObject* object, PyObject* name) {
  return Ref(PyObject_GetAttr(object, name));
}

template <class... Objects>
Ref invoke(PyObject* object, PyObject* method, Objects*... arguments) {
  constexpr PyObject* end = nullptr;
  return Ref(PyObject_CallMethodObjArgs(object, method, arguments..., end));
}

inline int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw Raised{};
  return value;
}

inline double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw Raised{};
  return value;
}

inline bool flag(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw Raised{};
  return value != 0;
}

inline int64_t item(PyObject* tuple, Py_ssize_t i) {
  PyObject* const value = PyTuple_GetItem(tuple, i);
  if (value == nullptr) throw Raised{};
  return integer(value);
}

inline Ref member(const Ref& object, const char* name) {
  return Ref(PyObject_GetAttrString(object.get(), name));
}

inline Ref interned(const char* text) { return Ref(PyUnicode_InternFromString(text)); }

// What of torch is used, looked up once.
struct Names {
  Ref torch{PyImport_ImportModule("torch")};
  Ref empty_like = member(torch, "empty_like");
  // By DType: the dtype, and the keywords for a tensor, or a contiguous one, of it.
  Ref dtypes[5] = {shared(Py_None), member(torch, "float16"), member(torch, "bfloat16"),
                   member(torch, "float32"), member(torch, "float64")};
  Ref of[5], contiguous_of[5];
  Ref data_ptr = interned("data_ptr"), dtype = interned("dtype"), shape = interned("shape"),
      stride = interned("stride"), numel = interned("numel"), reshape = interned("reshape"),
      is_contiguous = interned("is_contiguous"), contiguous = interned("contiguous"),
      new_empty = interned("new_empty"), zero = interned("zero_");

  Names() {
    const Ref format = member(torch, "contiguous_format");
    for (int i = 1; i < 5; ++i) {
      PyObject* const dtype = dtypes[i].get();
      of[i] = Ref(Py_BuildValue("{sO}", "dtype", dtype));
      contiguous_of[i] =
          Ref(Py_BuildValue("{sOsO}", "dtype", dtype, "memory_format", format.get()));
    }
  }
};

inline const Names& names() {
  // Never deleted: Python ends before statics do. No Python code runs here, so the lock of the
  // interpreter is held throughout.
  static const Names& names = *new Names;
  return names;
}

// Whether it is None or a dtype that the kernels have; `dtype` is set where it is.
inline bool is_dtype(PyObject* object, DType& dtype) {
  for (int i = 0; i < 5; ++i)
    if (names().dtypes[i].get() == object) {
      dtype = DType(i);
      return true;
    }
  return false;
}

inline DType dtype(PyObject* object) {
  DType dtype;
  if (is_dtype(object, dtype)) return dtype;
  PyErr_SetString(PyExc_TypeError, "fusednorm: a dtype that the kernels do not have");
  throw Raised{};
}

inline DType dtype_of(PyObject* tensor) {
  // A dtype outlives every tensor.
  return dtype(attribute(tensor, names().dtype.get()).get());
}

inline void* address(PyObject* tensor) {
  if (tensor == Py_None) return nullptr;
  return PyLong_AsVoidPtr(invoke(tensor, names().data_ptr.get()).get());
}

inline bool is_contiguous(PyObject* tensor) {
  return flag(invoke(tensor, names().is_contiguous.get()).get());
}

inline int64_t size(PyObject* tensor, int dim) {
  return item(attribute(tensor, names().shape.get()).get(), dim);
}

inline int64_t stride(PyObject* tensor, int dim) {
  return item(invoke(tensor, names().stride.get()).get(), dim);
}

// Allocates a contiguous tensor of the shape of another.
inline Ref empty_like(PyObject* tensor, DType dtype) {
  PyObject* const function = names().empty_like.get();
  if (dtype_of(tensor) == dtype && is_contiguous(tensor)) {
    constexpr PyObject* end = nullptr;
    return Ref(PyObject_CallFunctionObjArgs(function, tensor, end));
  }
  const Ref arguments(PyTuple_Pack(1, tensor));
  return Ref(PyObject_Call(function, arguments.get(), names().contiguous_of[int(dtype)].get()));
}

// Allocates a tensor on the device of another; `shape` is a tuple.
inline Ref new_empty(PyObject* tensor, const Ref& shape, DType dtype) {
  const Ref method = attribute(tensor, names().new_empty.get());
  const Ref arguments(PyTuple_Pack(1, shape.get()));
  return Ref(PyObject_Call(method.get(), arguments.get(), names().of[int(dtype)].get()));
}

// Describes the tensors of a call to the kernels. What it has to copy lives as long as it does.
class Layout {
 public:
  // Rows of the shape `normalized_shape`, a tuple, that `tensor` consists of.
  Layout(PyObject* tensor, PyObject* normalized_shape) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(normalized_shape); ++i)
      cols_ *= item(normalized_shape, i);
    const int64_t elements = integer(invoke(tensor, names().numel.get()).get());
    if (cols_ > 0) {
      rows_ = elements / cols_;
      return;
    }
    const Ref shape = attribute(tensor, names().shape.get());
    const Py_ssize_t leading = PyTuple_Size(shape.get()) - PyTuple_Size(normalized_shape);
    rows_ = 1;
    for (Py_ssize_t i = 0; i < leading; ++i) rows_ *= item(shape.get(), i);
  }

  int64_t row_count() const { return rows_; }
  int64_t cols() const { return cols_; }
  bool is_empty() const { return rows_ == 0 || cols_ == 0; }

  // M rows of N columns, copied where they are not evenly spaced or their columns not adjacent.
  Rows rows(PyObject* tensor) {
    if (tensor == Py_None) return {};
    int64_t distance = cols_;
    if (!is_contiguous(tensor)) {
      const Ref shape(
          Py_BuildValue("LL", static_cast<long long>(rows_), static_cast<long long>(cols_)));
      tensor = keep(invoke(tensor, names().reshape.get(), shape.get()));
      if (cols_ > 1 && stride(tensor, 1) != 1) tensor = contiguous(tensor);
      distance = stride(tensor, 0);
    }
    return {address(tensor), distance, dtype_of(tensor)};
  }

  // Rows that have just been allocated, or none.
  Rows fresh(const Ref& tensor, DType dtype) const {
    if (!tensor) return {};
    return {address(tensor.get()), cols_, dtype};
  }

  // A weight or a bias.
  Term vector(PyObject* tensor) {
    if (tensor == Py_None) return {};
    if (!is_contiguous(tensor)) tensor = contiguous(tensor);
    return {address(tensor), 0, false, dtype_of(tensor)};
  }

  // A gate, scale or shift, [1 or S, N or 1].
  Term term(PyObject* tensor) {
    if (tensor == Py_None) return {};
    const bool is_number = size(tensor, 1) < cols_;
    if (!is_number && cols_ > 1 && stride(tensor, 1) != 1) tensor = contiguous(tensor);
    const int64_t distance = size(tensor, 0) == 1 ? 0 : stride(tensor, 0);
    return {address(tensor), distance, is_number, dtype_of(tensor)};
  }

 private:
  PyObject* keep(Ref copy) {
    kept_.push_back(std::move(copy));
    return kept_.back().get();
  }

  PyObject* contiguous(PyObject* tensor) { return keep(invoke(tensor, names().contiguous.get())); }

  int64_t rows_ = 0, cols_ = 1;
  std::vector<Ref> kept_;
};

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

// Gives arguments their names, if there are as many as names.
template <class Arguments>
Arguments named(PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t expected = sizeof(Arguments) / sizeof(PyObject*);
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "fusednorm: expected %zd arguments, got %zd", expected, count);
    throw Raised{};
  }
  Arguments named;
  std::memcpy(&named, arguments, sizeof named);
  return named;
}

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

// A tuple of results, None in the place of each that there is none of.
template <class... Results>
PyObject* pack(const Results&... results) {
  return PyTuple_Pack(sizeof...(results), (results ? results.get() : Py_None)...);
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

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// Returns what f does, or raises what it throws.
template <class F>
PyObject* call(const F& f) {
  try {
    return f();
  } catch (const Raised&) {
    return nullptr;
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "fusednorm: %s", error.what());
  }
}

inline PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fusednorm
