// The CPU kernels as functions of Python.
#include "cpu_ops.h"

#include "channel_calls.h"
#include "cpu_launch.h"
#include "python_calls.h"

namespace fusednorm {
namespace {

PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    ForwardCall<Layout> forward(read_forward(arguments, count));
    if (!forward.is_empty()) {
      const WithoutGil unlocked;
      cpu::run(forward.p);
    }
    return outputs(forward);
  });
}

PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    BackwardCall<cpu::Backward, Layout> backward(read_backward(arguments, count));
    if (!backward.is_empty()) {
      const cpu::Terms terms{backward.dgate(), backward.dweight(), backward.dbias(),
                             backward.dscale(), backward.dshift()};
      const WithoutGil unlocked;
      cpu::run(backward.p, terms);
    }
    return outputs(backward);
  });
}

PyObject* gated_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    GatedForwardCall<Layout> forward(read_gated_forward(arguments, count));
    if (!forward.is_empty()) {
      const WithoutGil unlocked;
      cpu::run(forward.p);
    }
    return outputs(forward);
  });
}

PyObject* gated_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    GatedBackwardCall<cpu::GatedBackward, Layout> backward(read_gated_backward(arguments, count));
    if (!backward.is_empty()) {
      const Term dweight = backward.dweight(), dbias = backward.dbias();
      const WithoutGil unlocked;
      cpu::run(backward.p, dweight, dbias);
    }
    return outputs(backward);
  });
}

PyObject* channels_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    ChannelsForwardCall forward(named<ChannelsForwardArguments>(arguments, count));
    if (!forward.is_empty()) {
      const WithoutGil unlocked;
      cpu::run(forward.p);
    }
    return forward.outputs();
  });
}

PyObject* channels_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    ChannelsBackwardCall backward(named<ChannelsBackwardArguments>(arguments, count));
    if (!backward.is_empty()) {
      const WithoutGil unlocked;
      cpu::run(backward.p, backward.terms);
    }
    return backward.outputs();
  });
}

PyObject* level(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "|s", &name)) return nullptr;
  if (name && !cpu::use_level(name))
    return PyErr_Format(PyExc_ValueError, "level: this processor cannot run '%s'", name);
  return PyUnicode_FromString(cpu::kernels().level);
}

}  // namespace

PyMethodDef cpu_methods[] = {
    {"forward", fast(forward), METH_FASTCALL,
     "Compute the equation; see fusednorm/triton_kernels/forward.py."},
    {"backward", fast(backward), METH_FASTCALL,
     "Differentiate it; see fusednorm/triton_kernels/backward.py."},
    {"gated_forward", fast(gated_forward), METH_FASTCALL,
     "Compute the gated norm; see fusednorm/triton_kernels/gated.py."},
    {"gated_backward", fast(gated_backward), METH_FASTCALL,
     "Differentiate it; see fusednorm/triton_kernels/gated.py."},
    {"channels_forward", fast(channels_forward), METH_FASTCALL,
     "Normalise over dimension 1; see fusednorm/triton_kernels/channels.py."},
    {"channels_backward", fast(channels_backward), METH_FASTCALL,
     "Differentiate it; see fusednorm/triton_kernels/channels.py."},
    {"level", level, METH_VARARGS,
     "level(name=None): use the kernels for an instruction set, avx512_bf16, avx512, avx2 or\n"
     "portable; return the name of those in use."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
