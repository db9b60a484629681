// The launchers of the CUDA kernels, for fusednorm/cuda.py, which checks and chooses the device.
#include "cuda_ops.h"

#include <stdexcept>

#include "cuda/layer_norm.h"
#include "python_calls.h"

namespace fusednorm {
namespace {

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

// The kernels know no jumps: rows that have some are copied.
struct EvenRows : Layout {
  using Layout::Layout;

  Rows rows(PyObject* tensor) {
    const Rows found = Layout::rows(tensor);
    return found.jumps[0].every == 0 ? found : Layout::rows(contiguous(tensor));
  }
};

using Backward = BackwardCall<cuda::Backward, EvenRows>;

// The arguments end with the address of the stream.
PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    const ForwardCall<EvenRows> forward(read_forward<EvenRows>(arguments, count - 1));
    void* const stream = PyLong_AsVoidPtr(arguments[count - 1]);
    if (!forward.is_empty()) check(cuda::layer_norm_fwd(forward.p, stream));
    return outputs(forward);
  });
}

void launch(Backward& backward, PyObject* h, void* stream) {
  cuda::Backward& p = backward.p;
  const Term dweight = backward.dweight(), dbias = backward.dbias();
  const Term& either = dweight.data ? dweight : dbias;
  cuda::Shares shares;
  check(cuda::share_out(p, either.data != nullptr, shares));
  if (either.data == nullptr) return check(cuda::layer_norm_bwd(p, shares, stream));

  p.partial_rows = shares.clusters;
  const Ref partials = new_vector(h, p.partial_rows * 2 * p.cols, DType::f32);
  p.partials = static_cast<float*>(address(partials.get()));
  check(cuda::layer_norm_bwd(p, shares, stream));
  const cuda::Finalize finalize{p.partials,
                                p.partial_rows,
                                p.cols,
                                const_cast<void*>(dweight.data),
                                const_cast<void*>(dbias.data),
                                either.dtype};
  check(cuda::layer_norm_bwd_finalize(finalize, stream));
}

PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    Backward backward(read_backward<EvenRows>(arguments, count - 1));
    void* const stream = PyLong_AsVoidPtr(arguments[count - 1]);
    if (!backward.is_empty()) launch(backward, arguments[3], stream);
    return outputs(backward);
  });
}

PyObject* widest(PyObject*, PyObject*) {
  return call([&] {
    int64_t cols = 0;
    check(cuda::widest_row(cols));
    return PyLong_FromLongLong(cols);
  });
}

}  // namespace

PyMethodDef cuda_methods[] = {
    {"cuda_forward", fast(forward), METH_FASTCALL, "Launch the forward; see fusednorm/cuda.py."},
    {"cuda_backward", fast(backward), METH_FASTCALL, "Launch the backward; see fusednorm/cuda.py."},
    {"cuda_widest_rows", widest, METH_NOARGS,
     "The columns that the kernels can normalise together on the device in use."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
