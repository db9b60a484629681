// The CUDA kernels as fusednorm/cuda.py calls them: read the arguments, launch.
#include "cuda_ops.h"

#include "arguments.h"
#include "cuda/layer_norm.h"

namespace fusednorm {
namespace {

void set_error(const char* error) {
  if (error) PyErr_Format(PyExc_RuntimeError, "fusednorm: %s", error);
}

PyObject* forward(PyObject*, PyObject* const* first, Py_ssize_t) {
  return call([&] {
    Arguments arguments(first);
    Forward p;
    arguments.forward(p);
    void* const stream = arguments.address();
    if (!PyErr_Occurred()) set_error(cuda::layer_norm_fwd(p, stream));
  });
}

PyObject* backward(PyObject*, PyObject* const* first, Py_ssize_t) {
  return call([&] {
    Arguments arguments(first);
    cuda::Backward p;
    arguments.backward(p);
    const Term dweight = arguments.term(), dbias = arguments.term();
    p.partials = static_cast<float*>(arguments.address());
    p.partial_rows = arguments.integer();
    void* const stream = arguments.address();
    if (PyErr_Occurred()) return;
    const char* error = cuda::layer_norm_bwd(p, stream);
    if (p.partials && !error) {
      const Term& either = dweight.data ? dweight : dbias;
      const cuda::Finalize finalize{p.partials,
                                    p.partial_rows,
                                    p.cols,
                                    const_cast<void*>(dweight.data),
                                    const_cast<void*>(dbias.data),
                                    either.dtype};
      error = cuda::layer_norm_bwd_finalize(finalize, stream);
    }
    set_error(error);
  });
}

PyObject* partial_rows(PyObject*, PyObject* const* first, Py_ssize_t) {
  Arguments arguments(first);
  const int64_t rows = arguments.integer(), cols = arguments.integer();
  const DType dtype = arguments.dtype();
  const bool stream = arguments.integer();
  if (PyErr_Occurred()) return nullptr;
  int64_t count = 0;
  set_error(cuda::count_partial_rows(rows, cols, dtype, stream, count));
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(count);
}

PyObject* widest(PyObject*, PyObject*) {
  int64_t forward = 0, backward = 0;
  set_error(cuda::widest_rows(forward, backward));
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(std::min(forward, backward));
}

}  // namespace

PyMethodDef cuda_methods[] = {
    {"cuda_forward", fast(forward), METH_FASTCALL, "Launch the forward; see fusednorm/cuda.py."},
    {"cuda_backward", fast(backward), METH_FASTCALL, "Launch the backward; see fusednorm/cuda.py."},
    {"cuda_partial_rows", fast(partial_rows), METH_FASTCALL,
     "cuda_partial_rows(rows, cols, dtype, stream): the partial sums that the backward writes."},
    {"cuda_widest_rows", widest, METH_NOARGS,
     "The columns that the kernels can normalise together on the device in use."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
