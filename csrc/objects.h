// Python's objects in C++, by the limited API alone: references, numbers, arguments, exceptions.
#pragma once

#include <Python.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <utility>

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

// An argument, or null for None.
inline PyObject* given(PyObject* object) { return object == Py_None ? nullptr : object; }

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

// A tuple of results, None in the place of each that there is none of.
template <class... Results>
PyObject* pack(const Results&... results) {
  return PyTuple_Pack(sizeof...(results), (results ? results.get() : Py_None)...);
}

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
