// The cheap part of validation: whether a call is one that needs no other part.
#include "eager.h"

#include "tensors.h"

namespace fusednorm {
namespace {

// What tells a plain tensor in a plain call from others, looked up once. fusednorm/observers.py
// says who looks at operators; this is its twin.
struct Eager {
  Ref c{PyImport_ImportModule("torch._C")};
  Ref forward_ad{PyImport_ImportModule("torch.autograd.forward_ad")};
  Ref tensor = member(names().torch, "Tensor");
  Ref parameter = member(member(names().torch, "nn"), "Parameter");
  Ref strided = member(names().torch, "strided");
  Ref included = member(c, "_dispatch_tls_local_include_set");
  Ref bits = interned("raw_repr");
  Ref is_wrapped = member(member(c, "_functorch"), "is_functorch_wrapped_tensor");
  Ref level = interned("_current_level"), is_cpu = interned("is_cpu"),
      is_nested = interned("is_nested"), layout = interned("layout");
  uint64_t usual =
      bits_of(member(Ref(PyImport_ImportModule("fusednorm.observers")), "USUAL").get());

  static uint64_t bits_of(PyObject* integer) {
    const uint64_t value = PyLong_AsUnsignedLongLong(integer);
    if (PyErr_Occurred()) throw Raised{};
    return value;
  }
};

const Eager& eager() {
  static const Eager& eager = *new Eager;  // as names()
  return eager;
}

template <class... Objects>
Ref result(const Ref& function, Objects*... arguments) {
  constexpr PyObject* end = nullptr;
  return Ref(PyObject_CallFunctionObjArgs(function.get(), arguments..., end));
}

bool has(PyObject* object, const Ref& attribute) {
  return flag(fusednorm::attribute(object, attribute.get()).get());
}

bool equal(PyObject* a, PyObject* b) {
  const int result = PyObject_RichCompareBool(a, b, Py_EQ);
  if (result < 0) throw Raised{};
  return result != 0;
}

bool somebody_looks() {
  const Eager& e = eager();
  const Ref bits = invoke(result(e.included).get(), e.bits.get());
  return (Eager::bits_of(bits.get()) & ~e.usual) != 0 ||
         integer(attribute(e.forward_ad.get(), e.level.get()).get()) >= 0;
}

bool is_plain_tensor(PyObject* tensor) {
  const Eager& e = eager();
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return (type == e.tensor.get() || type == e.parameter.get()) &&
         attribute(tensor, e.layout.get()).get() == e.strided.get() && !has(tensor, e.is_nested) &&
         !flag(result(e.is_wrapped, tensor).get());
}

// Whether `tensor` is where `other` is; `on_cpu` says whether that is the CPU, of which there is
// one, and whose tensors are asked nothing more.
bool is_beside(PyObject* tensor, PyObject* other, bool on_cpu) {
  if (has(tensor, eager().is_cpu) != on_cpu) return false;
  PyObject* const device = names().device.get();
  return on_cpu || equal(attribute(tensor, device).get(), attribute(other, device).get());
}

bool has_dtype(PyObject* tensor) {
  DType dtype;
  return is_dtype(attribute(tensor, names().dtype.get()).get(), dtype);
}

// Whether `shape` is a tuple of ints, and the last dimensions of `sizes`.
bool ends_with(PyObject* sizes, PyObject* shape) {
  if (!PyTuple_CheckExact(shape)) return false;
  const Py_ssize_t count = PyTuple_Size(shape), leading = PyTuple_Size(sizes) - count;
  if (count == 0 || leading < 0) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const size = PyTuple_GetItem(shape, i);
    if (!PyLong_CheckExact(size) || !equal(size, PyTuple_GetItem(sizes, leading + i))) return false;
  }
  return true;
}

struct PlainArguments {
  PyObject *normalized_shape, *input, *residual, *weight, *bias;
};

bool has_shape(PyObject* tensor, PyObject* shape) {
  return tensor == Py_None || equal(attribute(tensor, names().shape.get()).get(), shape);
}

bool accepted(const PlainArguments& a) {
  if (somebody_looks() || !is_plain_tensor(a.input) || !has_dtype(a.input)) return false;
  const bool on_cpu = has(a.input, eager().is_cpu);
  for (PyObject* tensor : {a.residual, a.weight, a.bias})
    if (tensor != Py_None &&
        !(is_plain_tensor(tensor) && has_dtype(tensor) && is_beside(tensor, a.input, on_cpu)))
      return false;
  const Ref sizes = attribute(a.input, names().shape.get());
  return ends_with(sizes.get(), a.normalized_shape) && has_shape(a.residual, sizes.get()) &&
         has_shape(a.weight, a.normalized_shape) && has_shape(a.bias, a.normalized_shape) &&
         (a.residual == Py_None || dtype_of(a.residual) == dtype_of(a.input));
}

PyObject* is_plain(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] { return PyBool_FromLong(accepted(named<PlainArguments>(arguments, count))); });
}

}  // namespace

PyMethodDef eager_methods[] = {
    {"is_plain", fast(is_plain), METH_FASTCALL,
     "is_plain(normalized_shape, input, residual, weight, bias): whether all are valid, plain\n"
     "tensors on one device, the residual of the input's dtype, and nobody looks at operators."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
