// What a boxed kernel does not do is handed to Python, under Python's lock.
#pragma once

#include <stdexcept>
#include <string>

#include "boxed.h"
#include "tensors.h"

namespace fusednorm::boxed {

class WithGil {
 public:
  WithGil() : state_(PyGILState_Ensure()) {}
  ~WithGil() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

// The text of the exception that is set; it is cleared.
inline std::string message() {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  PyObject* const text = value ? PyObject_Str(value) : nullptr;
  PyObject* const bytes = text ? PyUnicode_AsUTF8String(text) : nullptr;
  const std::string result = bytes ? PyBytes_AsString(bytes) : "an error without a message";
  for (PyObject* object : {bytes, text, type, value, traceback}) Py_XDECREF(object);
  PyErr_Clear();
  return result;
}

// Returns what f does under Python's lock, or throws what it raises.
template <class F>
auto locked(const F& f) {
  const WithGil locked;
  try {
    return f();
  } catch (const Raised&) {
    throw std::runtime_error(message());
  }
}

// How torch's Python and the stable ABI exchange tensors.
struct Exchange {
  Ref module{PyImport_ImportModule("torch._C._aoti")};
  Ref wrap = member(module, "alloc_tensors_by_stealing_from_void_ptrs");
  Ref unwrap = member(module, "unsafe_alloc_void_ptr_from_tensor");
};

inline const Exchange& exchange() {
  static const Exchange& exchange = *new Exchange;  // as names()
  return exchange;
}

template <class Item>
Ref list(int64_t count, Item&& item) {
  Ref list(PyList_New(count));
  for (int64_t i = 0; i < count; ++i) PyList_SetItem(list.get(), i, item(i).release());
  return list;
}

inline Ref wrap(Tensor tensor) {
  Ref capsule(PyCapsule_New(tensor.get(), nullptr, nullptr));
  const Ref one = list(1, [&](int64_t) { return std::move(capsule); });
  const Ref wrapped(PyObject_CallFunctionObjArgs(exchange().wrap.get(), one.get(), nullptr));
  tensor.release();
  return Ref(PySequence_GetItem(wrapped.get(), 0));
}

inline Tensor unwrap(PyObject* tensor) {
  if (tensor == Py_None) return nullptr;
  const Ref capsule(PyObject_CallFunctionObjArgs(exchange().unwrap.get(), tensor, nullptr));
  void* const handle = PyCapsule_GetPointer(capsule.get(), nullptr);
  if (handle == nullptr) throw Raised{};
  return Tensor(static_cast<AtenTensorHandle>(handle));
}

// Takes an argument from the stack to Python.
inline Ref to_python(Stack& stack, int i) {
  if (!stack.has(i)) return shared(Py_None);
  switch (stack.kinds()[i] | 0x20) {
    case 't': return stack.tensor(i) ? wrap(stack.take(i)) : shared(Py_None);
    case 's':
      return list(stack.count(i),
                  [&](int64_t k) { return Ref(PyLong_FromLongLong(stack.item<int64_t>(i, k))); });
    case 'm':
      return list(stack.count(i),
                  [&](int64_t k) { return Ref(PyBool_FromLong(stack.item<bool>(i, k))); });
    case 'i': return Ref(PyLong_FromLongLong(stack.get<int64_t>(i)));
    case 'b': return Ref(PyBool_FromLong(stack.get<bool>(i)));
    case 'd': return shared(names().dtypes[int(stack.dtype(i))].get());
    default: return Ref(PyFloat_FromDouble(stack.get<double>(i)));
  }
}

// Lets Python serve the call. Torch makes a RuntimeError of every error that comes out of an
// extension; its text is the one that was raised.
inline void hand_on(Stack& stack, PyObject* function) {
  locked([&] {
    const int count = int(strlen(stack.kinds()));
    const Ref arguments(PyTuple_New(count));
    for (int i = 0; i < count; ++i)
      PyTuple_SetItem(arguments.get(), i, to_python(stack, i).release());
    const Ref results(PyObject_CallObject(function, arguments.get()));
    std::vector<Tensor> tensors;
    for (Py_ssize_t i = 0; i < PyTuple_Size(results.get()); ++i)
      tensors.push_back(unwrap(PyTuple_GetItem(results.get(), i)));
    stack.finish(tensors);
  });
}

}  // namespace fusednorm::boxed
