// The CPU kernels as torch's own operators, boxed: no Python between torch.nn.functional and a
// kernel. What the kernels do not do is handed to Python, which has what was there before.
#include "operators.h"

#include <atomic>
#include <cfloat>

#include "cpu_launch.h"
#include "fallback.h"

namespace fusednorm {
namespace {

using boxed::Layout;
using boxed::Span;
using boxed::Stack;
using boxed::Tensor;

enum Operator { layer_norm_fwd, layer_norm_bwd, rms_norm_fwd, rms_norm_bwd, operator_count };

constexpr const char* operator_names[] = {"native_layer_norm", "native_layer_norm_backward",
                                          "_fused_rms_norm", "_fused_rms_norm_backward"};

// Calls that the kernels served.
std::atomic<int64_t> served[operator_count];

// What serves the others, called with an operator's arguments; set before it can be needed, and
// read under Python's lock.
PyObject* others[operator_count];

// Serves a call by `kernel`, which returns false before it has done anything where it cannot.
void serve(StableIValue* values, const char* kinds, Operator which, bool (*kernel)(Stack&)) {
  Stack stack(values, kinds);
  if (kernel(stack))
    served[which].fetch_add(1, std::memory_order_relaxed);
  else
    boxed::hand_on(stack, others[which]);
}

// ------------------------------------------------------------------------------------------------
// Statistics
//
// Torch promises the statistics of 16-bit rows with 16-bit parameters in their dtype, and gradients
// made from those are 3 to 5 times less exact. So what is returned is rounded as promised, and the
// float32 values lie behind it in the same storage, where the backward finds them. It takes them if
// they still round to what it was given, and what it was given otherwise: after torch's forward,
// from a copy.

// In bytes.
int64_t exact_offset(int64_t rows) { return (2 * rows + 63) / 64 * 64; }

struct Statistic {
  Tensor tensor;
  void* exact = nullptr;  // [M] of C
};

Statistic new_statistic(Span shape, int64_t rows, DType dtype) {
  if (!boxed::is_half(dtype)) {
    Tensor tensor = boxed::empty(shape, dtype);
    void* const data = boxed::address(tensor.get());
    return {std::move(tensor), data};
  }
  const int64_t elements = exact_offset(rows) / 2 + 2 * rows;
  const Tensor both = boxed::empty({&elements, 1}, dtype);
  AtenTensorHandle front;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      both.get(), shape.count, shape.data, boxed::contiguous_strides(shape).data, 0, &front));
  return {Tensor(front), static_cast<char*>(boxed::address(front)) + exact_offset(rows)};
}

void round(const void* exact, AtenTensorHandle to, int64_t rows) {
  const DType dtype = boxed::dtype_of(to);
  if (!boxed::is_half(dtype)) return;
  const cpu::Fold fold{exact, rows, 1, DType::f32, boxed::address(to), false, dtype};
  cpu::kernels().fold(fold, 0, 0, rows);
}

// Returns a statistic in C; null for a tensor that is none of these rows.
const void* exact_statistic(AtenTensorHandle given, DType compute, Layout& layout) {
  const int64_t rows = layout.row_count();
  const DType dtype = boxed::dtype_of(given);
  char* const data = static_cast<char*>(boxed::address(given));
  if (boxed::sizes(given).product() != rows || !boxed::is_contiguous(given)) return nullptr;
  if (dtype == compute) return data;
  if (!boxed::is_half(dtype) || compute != DType::f32) return nullptr;
  int64_t bytes, offset;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(given, &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(given, &offset));
  if (offset == 0 && bytes == exact_offset(rows) + 4 * rows) {
    const Tensor rounded = boxed::empty({&rows, 1}, dtype);
    round(data + exact_offset(rows), rounded.get(), rows);
    if (memcmp(data, boxed::address(rounded.get()), 2 * rows) == 0)
      return data + exact_offset(rows);
  }
  return boxed::address(layout.keep(boxed::contiguous(given, compute)));
}

// ------------------------------------------------------------------------------------------------
// Torch's operators

// What an operator is given: an input, the argument that is the normalized_shape, parameters.
struct Norm {
  AtenTensorHandle x;
  int shape;
  AtenTensorHandle weight, bias;
  int64_t dims = 0;
  DType dtype = DType::none;

  // Whether the kernels serve it; dims and dtype are set where they do.
  bool is_served(const Stack& stack) {
    if (x == nullptr || !boxed::is_on_cpu(x)) return false;
    const Span sizes = boxed::sizes(x);
    dtype = boxed::dtype_of(x);
    if (dtype == DType::none || sizes.count > boxed::max_dims || sizes.product() == 0 ||
        !stack.is_end_of(shape, sizes))
      return false;
    dims = stack.count(shape);
    if (weight && bias && boxed::dtype_of(weight) != boxed::dtype_of(bias)) return false;
    return is_parameter(weight) && is_parameter(bias);
  }

  // Torch's dtype of the statistics: that of the rows, but float32 beside float32 parameters.
  DType statistics() const {
    const AtenTensorHandle parameter = weight ? weight : bias;
    return parameter ? boxed::dtype_of(parameter) : dtype;
  }

  DType compute() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }

 private:
  bool is_parameter(AtenTensorHandle tensor) const {
    if (tensor == nullptr) return true;
    const DType own = boxed::dtype_of(tensor);
    return (own == dtype || (boxed::is_half(dtype) && own == DType::f32)) &&
           boxed::is_on_cpu(tensor) && boxed::sizes(tensor) == boxed::sizes(x).last(dims);
  }
};

void describe(Problem& p, const Norm& norm, Layout& layout, bool rms) {
  p.rows = p.rows_per_sample = layout.row_count();
  p.cols = layout.cols();
  p.rms = rms;
  p.compute = norm.compute();
  p.weight = layout.vector(norm.weight);
  p.bias = layout.vector(norm.bias);
}

// x's sizes with 1 in the place of each that is normalised.
boxed::Dims statistics_shape(const Norm& norm) {
  const Span sizes = boxed::sizes(norm.x);
  boxed::Dims shape;
  shape.count = sizes.count;
  for (int64_t i = 0; i < sizes.count; ++i)
    shape.data[i] = i < sizes.count - norm.dims ? sizes[i] : 1;
  return shape;
}

bool forward(Stack& stack, const Norm& norm, double eps, bool rms) {
  Layout layout(norm.x, norm.dims);
  const boxed::Dims stats = statistics_shape(norm);
  const DType dtype = rms ? norm.compute() : norm.statistics();
  Tensor z = boxed::empty(boxed::sizes(norm.x), norm.dtype);
  Statistic mean, rstd = new_statistic(stats, layout.row_count(), dtype);
  if (!rms) mean = new_statistic(stats, layout.row_count(), dtype);
  Forward p;
  describe(p, norm, layout, rms);
  p.eps = eps;
  p.x = layout.rows(norm.x);
  p.z = layout.fresh(z, norm.dtype);
  p.mean = mean.exact;
  p.rstd = rstd.exact;
  cpu::run(p);
  round(rstd.exact, rstd.tensor.get(), p.rows);
  if (rms) {
    Tensor results[] = {std::move(z), std::move(rstd.tensor)};
    stack.finish(results);
    return true;
  }
  round(mean.exact, mean.tensor.get(), p.rows);
  Tensor results[] = {std::move(z), std::move(mean.tensor), std::move(rstd.tensor)};
  stack.finish(results);
  return true;
}

// Results are the gradients of x, weight and bias, those that `wanted` names.
bool backward(Norm& norm, AtenTensorHandle dz, AtenTensorHandle mean, AtenTensorHandle rstd,
              bool rms, const bool (&wanted)[3], Tensor (&results)[3]) {
  if (dz == nullptr || rstd == nullptr || (!rms && mean == nullptr) || !boxed::is_on_cpu(dz) ||
      boxed::dtype_of(dz) != norm.dtype || !(boxed::sizes(dz) == boxed::sizes(norm.x)) ||
      (wanted[1] && !norm.weight) || (wanted[2] && !norm.bias))
    return false;
  Layout layout(norm.x, norm.dims);
  cpu::Backward p;
  describe(p, norm, layout, rms);
  p.rstd = exact_statistic(rstd, p.compute, layout);
  if (!rms) p.mean = exact_statistic(mean, p.compute, layout);
  if (p.rstd == nullptr || (!rms && p.mean == nullptr)) return false;
  const AtenTensorHandle like[] = {norm.x, norm.weight, norm.bias};
  for (int i = 0; i < 3; ++i)
    if (wanted[i]) results[i] = boxed::empty(boxed::sizes(like[i]), boxed::dtype_of(like[i]));
  p.dz = layout.rows(dz);
  p.h = layout.rows(norm.x);
  p.dx = layout.fresh(results[0], norm.dtype);
  cpu::Terms terms;
  terms.dweight = layout.vector(results[1].get());
  terms.dbias = layout.vector(results[2].get());
  cpu::run(p, terms);
  return true;
}

// native_layer_norm(input, normalized_shape, weight, bias, eps)
void native_layer_norm(StableIValue* values, uint64_t, uint64_t) {
  serve(values, "tsTTf", layer_norm_fwd, [](Stack& stack) {
    Norm norm{stack.tensor(0), 1, stack.tensor(2), stack.tensor(3)};
    return norm.is_served(stack) && forward(stack, norm, stack.get<double>(4), false);
  });
}

// native_layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, mask)
void native_layer_norm_backward(StableIValue* values, uint64_t, uint64_t) {
  serve(values, "ttsttTTm", layer_norm_bwd, [](Stack& stack) {
    Norm norm{stack.tensor(1), 2, stack.tensor(5), stack.tensor(6)};
    const bool wanted[] = {stack.item<bool>(7, 0), stack.item<bool>(7, 1), stack.item<bool>(7, 2)};
    Tensor results[3];
    if (!norm.is_served(stack) ||
        !backward(norm, stack.tensor(0), stack.tensor(3), stack.tensor(4), false, wanted, results))
      return false;
    stack.finish(results);
    return true;
  });
}

// Whether torch keeps the order of x's dimensions in memory for the result of an RMS norm.
bool is_channels_last(AtenTensorHandle x) {
  const Span size = boxed::sizes(x), stride = boxed::strides(x);
  if ((size.count != 4 && size.count != 5) || boxed::is_contiguous(x)) return false;
  int64_t least = 0;
  for (int64_t step = 0; step < size.count; ++step) {
    const int64_t i = step == 0 ? 1 : step == size.count - 1 ? 0 : size.count - step;
    if (stride[i] == 0 || stride[i] < least || (i == 0 && least == stride[1])) return false;
    least = stride[i] * size[i];
  }
  return true;
}

// _fused_rms_norm(input, normalized_shape, weight, eps)
void fused_rms_norm(StableIValue* values, uint64_t, uint64_t) {
  serve(values, "tsTF", rms_norm_fwd, [](Stack& stack) {
    Norm norm{stack.tensor(0), 1, stack.tensor(2), nullptr};
    if (!norm.is_served(stack) || is_channels_last(norm.x)) return false;
    const double least = norm.compute() == DType::f64 ? DBL_EPSILON : FLT_EPSILON;
    return forward(stack, norm, stack.has(3) ? stack.get<double>(3) : least, true);
  });
}

// _fused_rms_norm_backward(grad_out, input, normalized_shape, rstd, weight, mask)
void fused_rms_norm_backward(StableIValue* values, uint64_t, uint64_t) {
  serve(values, "ttstTm", rms_norm_bwd, [](Stack& stack) {
    Norm norm{stack.tensor(1), 2, stack.tensor(4), nullptr};
    const bool wanted[] = {stack.item<bool>(5, 0), stack.item<bool>(5, 1), false};
    Tensor results[3];
    if (!norm.is_served(stack) ||
        !backward(norm, stack.tensor(0), nullptr, stack.tensor(3), true, wanted, results))
      return false;
    Tensor both[] = {std::move(results[0]), std::move(results[1])};
    stack.finish(both);
    return true;
  });
}

// ------------------------------------------------------------------------------------------------
// Registration, under Python's lock

using torch::stable::detail::StableLibrary;

constexpr void (*boxed_kernels[])(StableIValue*, uint64_t, uint64_t) = {
    native_layer_norm, native_layer_norm_backward, fused_rms_norm, fused_rms_norm_backward};

std::unique_ptr<StableLibrary> new_library() {
  return std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", "CPU", __FILE__,
                                         __LINE__);
}

std::unique_ptr<StableLibrary> registered, kept;

// register_operators(*others)
PyObject* register_operators(PyObject*, PyObject* const* functions, Py_ssize_t count) {
  return call([&]() -> PyObject* {
    if (count != operator_count) throw std::runtime_error("register_operators: four functions");
    for (int i = 0; i < operator_count; ++i) {
      Py_INCREF(functions[i]);
      Py_XDECREF(std::exchange(others[i], functions[i]));
    }
    boxed::exchange();
    if (!kept) {
      // Torch has no kernel of this on the CPU, and the graphs of norms outlive disable().
      auto library = new_library();
      library->impl(operator_names[rms_norm_bwd], boxed_kernels[rms_norm_bwd]);
      kept = std::move(library);
    }
    auto library = new_library();
    for (Operator which : {layer_norm_fwd, layer_norm_bwd, rms_norm_fwd})
      library->impl(operator_names[which], boxed_kernels[which]);
    registered = std::move(library);
    return shared(Py_None).release();
  });
}

PyObject* unregister_operators(PyObject*, PyObject*) {
  registered.reset();
  Py_RETURN_NONE;
}

PyObject* operator_calls(PyObject*, PyObject*) {
  return Py_BuildValue("{sLsLsLsL}", operator_names[0], served[0].load(), operator_names[1],
                       served[1].load(), operator_names[2], served[2].load(), operator_names[3],
                       served[3].load());
}

}  // namespace

PyMethodDef operator_methods[] = {
    {"register_operators", fast(register_operators), METH_FASTCALL,
     "register_operators(*others): put the kernels below torch's four operators on the CPU; the\n"
     "functions serve what they cannot."},
    {"unregister_operators", unregister_operators, METH_NOARGS, "Take them out again."},
    {"operator_calls", operator_calls, METH_NOARGS,
     "The number of calls of each operator that the kernels served so far."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
