// torch's tensors as Python sees them: what they say of themselves and how they are allocated, and
// their description as the rows and terms of the kernels.
#pragma once

#include <vector>

#include "objects.h"
#include "spacing.h"

namespace fusednorm {

// What of torch is used, looked up once.
struct Names {
  Ref torch{PyImport_ImportModule("torch")};
  Ref empty_like = member(torch, "empty_like"), empty_strided = member(torch, "empty_strided");
  // By DType: the dtype, and the keywords for a contiguous tensor of it.
  Ref dtypes[5] = {shared(Py_None), member(torch, "float16"), member(torch, "bfloat16"),
                   member(torch, "float32"), member(torch, "float64")};
  Ref contiguous_of[5];
  Ref data_ptr = interned("data_ptr"), dtype = interned("dtype"), shape = interned("shape"),
      stride = interned("stride"), numel = interned("numel"), reshape = interned("reshape"),
      is_contiguous = interned("is_contiguous"), contiguous = interned("contiguous"),
      zero = interned("zero_"), device = interned("device");

  Names() {
    const Ref format = member(torch, "contiguous_format");
    for (int i = 1; i < 5; ++i) {
      PyObject* const dtype = dtypes[i].get();
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
  if (tensor == nullptr || tensor == Py_None) return nullptr;
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

inline std::vector<int64_t> integers(const Ref& tuple) {
  std::vector<int64_t> result(PyTuple_Size(tuple.get()));
  for (size_t i = 0; i < result.size(); ++i) result[i] = item(tuple.get(), Py_ssize_t(i));
  return result;
}

inline std::vector<int64_t> sizes(PyObject* tensor) {
  return integers(attribute(tensor, names().shape.get()));
}

inline std::vector<int64_t> strides(PyObject* tensor) {
  return integers(invoke(tensor, names().stride.get()));
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

// Allocates so many elements on the device of another tensor, whose own new_empty takes longer.
inline Ref new_vector(PyObject* like, int64_t elements, DType dtype) {
  const Ref device = attribute(like, names().device.get());
  const Ref arguments(Py_BuildValue("((L)(i))", static_cast<long long>(elements), 1));
  const Ref keywords(
      Py_BuildValue("{sOsO}", "dtype", names().dtypes[int(dtype)].get(), "device", device.get()));
  return Ref(PyObject_Call(names().empty_strided.get(), arguments.get(), keywords.get()));
}

// Python's tensors as a call to the kernels has them. What it has to copy lives as long as it does.
class Layout {
 public:
  using Tensor = PyObject*;
  using Owned = Ref;
  using Shape = PyObject*;  // a tuple

  static void* address(Tensor tensor) { return fusednorm::address(tensor); }
  static DType dtype_of(Tensor tensor) { return fusednorm::dtype_of(tensor); }
  static int64_t size(Tensor tensor, int dim) { return fusednorm::size(tensor, dim); }
  static void zero(Tensor tensor) { invoke(tensor, names().zero.get()); }
  static Owned empty_like(Tensor tensor, DType dtype) {
    return fusednorm::empty_like(tensor, dtype);
  }
  static Owned new_vector(Tensor like, int64_t elements, DType dtype) {
    return fusednorm::new_vector(like, elements, dtype);
  }

  // Rows of the shape `normalized_shape`, a tuple, that `tensor` consists of.
  Layout(PyObject* tensor, PyObject* normalized_shape)
      : normalized_dims_(PyTuple_Size(normalized_shape)) {
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

  // M rows of N columns, copied where they cannot be described as they lie.
  Rows rows(PyObject* tensor) {
    if (tensor == nullptr) return {};
    Rows found{nullptr, cols_, dtype_of(tensor)};
    if (!is_contiguous(tensor)) {
      const auto size = sizes(tensor), stride = strides(tensor);
      const int64_t dims = size.size();
      if (!find_spacing(size.data(), stride.data(), dims, dims - normalized_dims_, found)) {
        tensor = contiguous(tensor);
        found = {nullptr, cols_, found.dtype};
      }
    }
    found.data = address(tensor);
    return found;
  }

  // Rows that have just been allocated, or none.
  Rows fresh(const Ref& tensor, DType dtype) const {
    if (!tensor) return {};
    return {address(tensor.get()), cols_, dtype};
  }

  // A weight or a bias.
  Term vector(PyObject* tensor) {
    if (tensor == nullptr) return {};
    if (!is_contiguous(tensor)) tensor = contiguous(tensor);
    return {address(tensor), 0, false, dtype_of(tensor)};
  }

  // A gate, scale or shift, [1 or S, N or 1].
  Term term(PyObject* tensor) {
    if (tensor == nullptr) return {};
    const bool is_number = size(tensor, 1) < cols_;
    if (!is_number && cols_ > 1 && stride(tensor, 1) != 1) tensor = contiguous(tensor);
    const int64_t distance = size(tensor, 0) == 1 ? 0 : stride(tensor, 0);
    return {address(tensor), distance, is_number, dtype_of(tensor)};
  }

 protected:
  PyObject* contiguous(PyObject* tensor) { return keep(invoke(tensor, names().contiguous.get())); }

 private:
  PyObject* keep(Ref copy) {
    kept_.push_back(std::move(copy));
    return kept_.back().get();
  }

  int64_t normalized_dims_, rows_ = 0, cols_ = 1;
  std::vector<Ref> kept_;
};

}  // namespace fusednorm
