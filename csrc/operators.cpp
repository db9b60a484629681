// Our kernels as torch's own operators, boxed: no Python between torch.nn.functional and a kernel
// of the CPU, nor a launch that is repeated. What they do not do is handed to Python, which has
// what was there before.
#include "operators.h"

#include <atomic>
#include <cfloat>

#include "cpu_launch.h"
#include "fallback.h"
#include "triton_launch.h"

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

// Serves a call by `kernel`, which returns false before it has done anything where it cannot, and
// then by the function of Python's for that operator.
void serve(StableIValue* values, const char* kinds, Operator which, bool (*kernel)(Stack&),
           PyObject* const* others) {
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

void round(const void* exact, void* to, DType dtype, int64_t rows) {
  const cpu::Fold fold{exact, rows, 1, DType::f32, to, false, dtype};
  cpu::kernels().fold(fold, 0, 0, rows);
}

void round(const Statistic& statistic, int64_t rows) {
  const DType dtype = boxed::dtype_of(statistic.tensor.get());
  if (boxed::is_half(dtype))
    round(statistic.exact, boxed::address(statistic.tensor.get()), dtype, rows);
}

// Whether `rows` numbers round to what was given.
bool rounds_to(const char* given, const char* exact, DType dtype, int64_t rows) {
  constexpr int64_t step = 256;
  uint16_t rounded[step];
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row);
    round(exact + 4 * row, rounded, dtype, count);
    if (memcmp(given + 2 * row, rounded, 2 * count) != 0) return false;
  }
  return true;
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
  if (offset == 0 && bytes == exact_offset(rows) + 4 * rows &&
      rounds_to(data, data + exact_offset(rows), dtype, rows))
    return data + exact_offset(rows);
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
    if (x == nullptr) return false;
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
           boxed::device_of(tensor) == boxed::device_of(x) &&
           boxed::sizes(tensor) == boxed::sizes(x).last(dims);
  }
};

struct Gradient;

// What serves a kind of device; false where Python is to serve the call. `others` are Python's,
// called with an operator's arguments; set before they can be needed, and read under its lock.
struct OnCpu {
  static bool forward(Stack&, const Norm&, double eps, bool rms);
  static bool backward(const Norm&, const Gradient&, Tensor (&results)[3]);
  inline static PyObject* others[operator_count];
};

struct ByPlans {
  static bool forward(Stack&, const Norm&, double eps, bool rms);
  static bool backward(const Norm&, const Gradient&, Tensor (&results)[3]);
  inline static PyObject* others[operator_count];
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

bool OnCpu::forward(Stack& stack, const Norm& norm, double eps, bool rms) {
  if (!boxed::is_on_cpu(norm.x)) return false;
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
  round(rstd, p.rows);
  if (rms) {
    Tensor results[] = {std::move(z), std::move(rstd.tensor)};
    stack.finish(results);
    return true;
  }
  round(mean, p.rows);
  Tensor results[] = {std::move(z), std::move(mean.tensor), std::move(rstd.tensor)};
  stack.finish(results);
  return true;
}

// A backward: what it is given beside the norm.
struct Gradient {
  AtenTensorHandle dz, mean, rstd;
  bool rms;
  bool wanted[3];  // of x, weight and bias

  bool fits(const Norm& norm) const {
    return dz && rstd && (rms || mean) && boxed::device_of(dz) == boxed::device_of(norm.x) &&
           boxed::dtype_of(dz) == norm.dtype && boxed::sizes(dz) == boxed::sizes(norm.x) &&
           !(wanted[1] && !norm.weight) && !(wanted[2] && !norm.bias);
  }
};

bool OnCpu::backward(const Norm& norm, const Gradient& g, Tensor (&results)[3]) {
  if (!boxed::is_on_cpu(norm.x)) return false;
  Layout layout(norm.x, norm.dims);
  cpu::Backward p;
  describe(p, norm, layout, g.rms);
  p.rstd = exact_statistic(g.rstd, p.compute, layout);
  if (!g.rms) p.mean = exact_statistic(g.mean, p.compute, layout);
  if (p.rstd == nullptr || (!g.rms && p.mean == nullptr)) return false;
  const AtenTensorHandle like[] = {norm.x, norm.weight, norm.bias};
  for (int i = 0; i < 3; ++i)
    if (g.wanted[i]) results[i] = boxed::empty(boxed::sizes(like[i]), boxed::dtype_of(like[i]));
  p.dz = layout.rows(g.dz);
  p.h = layout.rows(norm.x);
  p.dx = layout.fresh(results[0], norm.dtype);
  cpu::Terms terms;
  terms.dweight = layout.vector(results[1].get());
  terms.dbias = layout.vector(results[2].get());
  cpu::run(p, terms);
  return true;
}

// A statistic [M] in the shape that torch gives it, of the same memory.
Tensor in_shape(const Tensor& statistic, Span shape) {
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      statistic.get(), shape.count, shape.data, boxed::contiguous_strides(shape).data, 0, &view));
  return Tensor(view);
}

bool ByPlans::forward(Stack& stack, const Norm& norm, double eps, bool rms) {
  const DType none = DType::none;
  ForwardCall<Layout> call({norm.x, nullptr, nullptr, norm.weight, norm.bias, nullptr, nullptr,
                            nullptr, norm.dims, eps, rms, 0.0, norm.dtype, none, none, true,
                            false});
  if (!repeat(call, norm.x)) return false;
  const boxed::Dims shape = statistics_shape(norm);
  if (rms) {
    Tensor results[] = {std::move(call.z), in_shape(call.rstd, shape)};
    stack.finish(results);
    return true;
  }
  Tensor results[] = {std::move(call.z), in_shape(call.mean, shape), in_shape(call.rstd, shape)};
  stack.finish(results);
  return true;
}

bool ByPlans::backward(const Norm& norm, const Gradient& g, Tensor (&results)[3]) {
  const auto fits = [&](AtenTensorHandle statistic) {
    return boxed::dtype_of(statistic) == norm.compute() && boxed::is_contiguous(statistic) &&
           boxed::sizes(statistic) == Span(statistics_shape(norm));
  };
  if (!fits(g.rstd) || !(g.rms || fits(g.mean))) return false;
  BackwardCall<Backward, Layout> call(
      {g.dz,
       nullptr,
       nullptr,
       norm.x,
       g.rms ? nullptr : g.mean,
       g.rstd,
       nullptr,
       norm.weight,
       norm.bias,
       nullptr,
       nullptr,
       nullptr,
       norm.dims,
       0.0,
       norm.dtype,
       norm.dtype,
       DType::none,
       {g.wanted[0], false, false, g.wanted[1], g.wanted[2], false, false}});
  if (!repeat(call, norm.x)) return false;
  for (int i : {0, 1, 2}) results[i] = std::move(call.gradients[i == 0 ? 0 : 2 + i]);
  return true;
}

// native_layer_norm(input, normalized_shape, weight, bias, eps)
template <class Where>
void native_layer_norm(StableIValue* values, uint64_t, uint64_t) {
  const auto kernel = [](Stack& stack) {
    Norm norm{stack.tensor(0), 1, stack.tensor(2), stack.tensor(3)};
    return norm.is_served(stack) && Where::forward(stack, norm, stack.get<double>(4), false);
  };
  serve(values, "tsTTf", layer_norm_fwd, kernel, Where::others);
}

// native_layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, mask)
template <class Where>
void native_layer_norm_backward(StableIValue* values, uint64_t, uint64_t) {
  const auto kernel = [](Stack& stack) {
    Norm norm{stack.tensor(1), 2, stack.tensor(5), stack.tensor(6)};
    const auto wanted = [&](int i) { return stack.item<bool>(7, i); };
    const Gradient gradient{stack.tensor(0),
                            stack.tensor(3),
                            stack.tensor(4),
                            false,
                            {wanted(0), wanted(1), wanted(2)}};
    Tensor results[3];
    if (!norm.is_served(stack) || !gradient.fits(norm) || !Where::backward(norm, gradient, results))
      return false;
    stack.finish(results);
    return true;
  };
  serve(values, "ttsttTTm", layer_norm_bwd, kernel, Where::others);
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
template <class Where>
void fused_rms_norm(StableIValue* values, uint64_t, uint64_t) {
  const auto kernel = [](Stack& stack) {
    Norm norm{stack.tensor(0), 1, stack.tensor(2), nullptr};
    if (!norm.is_served(stack) || is_channels_last(norm.x)) return false;
    const double least = norm.compute() == DType::f64 ? DBL_EPSILON : FLT_EPSILON;
    return Where::forward(stack, norm, stack.has(3) ? stack.get<double>(3) : least, true);
  };
  serve(values, "tsTF", rms_norm_fwd, kernel, Where::others);
}

// _fused_rms_norm_backward(grad_out, input, normalized_shape, rstd, weight, mask)
template <class Where>
void fused_rms_norm_backward(StableIValue* values, uint64_t, uint64_t) {
  const auto kernel = [](Stack& stack) {
    Norm norm{stack.tensor(1), 2, stack.tensor(4), nullptr};
    const Gradient gradient{stack.tensor(0),
                            nullptr,
                            stack.tensor(3),
                            true,
                            {stack.item<bool>(5, 0), stack.item<bool>(5, 1), false}};
    Tensor results[3];
    if (!norm.is_served(stack) || !gradient.fits(norm) || !Where::backward(norm, gradient, results))
      return false;
    Tensor both[] = {std::move(results[0]), std::move(results[1])};
    stack.finish(both);
    return true;
  };
  serve(values, "ttstTm", rms_norm_bwd, kernel, Where::others);
}

// ------------------------------------------------------------------------------------------------
// Registration, under Python's lock

using torch::stable::detail::StableLibrary;

template <class Where>
constexpr void (*boxed_kernels[])(StableIValue*, uint64_t, uint64_t) = {
    native_layer_norm<Where>, native_layer_norm_backward<Where>, fused_rms_norm<Where>,
    fused_rms_norm_backward<Where>};

std::unique_ptr<StableLibrary> new_library(const char* key) {
  return std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", key, __FILE__,
                                         __LINE__);
}

template <class Where>
void take_others(PyObject* const* functions, Py_ssize_t count) {
  if (count != operator_count) throw std::runtime_error("register_operators: four functions");
  for (int i = 0; i < operator_count; ++i) {
    Py_INCREF(functions[i]);
    Py_XDECREF(std::exchange(Where::others[i], functions[i]));
  }
  boxed::exchange();
}

std::unique_ptr<StableLibrary> registered, kept, registered_by_plans;

// register_operators(*others)
PyObject* register_operators(PyObject*, PyObject* const* functions, Py_ssize_t count) {
  return call([&]() -> PyObject* {
    take_others<OnCpu>(functions, count);
    if (!kept) {
      // Torch has no kernel of this on the CPU, and the graphs of norms outlive disable().
      auto library = new_library("CPU");
      library->impl(operator_names[rms_norm_bwd], boxed_kernels<OnCpu>[rms_norm_bwd]);
      kept = std::move(library);
    }
    auto library = new_library("CPU");
    for (Operator which : {layer_norm_fwd, layer_norm_bwd, rms_norm_fwd})
      library->impl(operator_names[which], boxed_kernels<OnCpu>[which]);
    registered = std::move(library);
    return shared(Py_None).release();
  });
}

PyObject* unregister_operators(PyObject*, PyObject*) {
  registered.reset();
  Py_RETURN_NONE;
}

// register_by_plans(key, *others)
PyObject* register_by_plans(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&]() -> PyObject* {
    take_others<ByPlans>(arguments + 1, count - 1);
    const char* const key = PyUnicode_AsUTF8AndSize(arguments[0], nullptr);
    if (key == nullptr) throw Raised{};
    auto library = new_library(key);
    for (int which = 0; which < operator_count; ++which)
      library->impl(operator_names[which], boxed_kernels<ByPlans>[which]);
    registered_by_plans = std::move(library);
    return shared(Py_None).release();
  });
}

PyObject* unregister_by_plans(PyObject*, PyObject*) {
  registered_by_plans.reset();
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
    {"register_by_plans", fast(register_by_plans), METH_FASTCALL,
     "register_by_plans(key, *others): the same for a device, where a launch can be repeated."},
    {"unregister_by_plans", unregister_by_plans, METH_NOARGS, "Take those out again."},
    {"unregister_operators", unregister_operators, METH_NOARGS, "Take them out again."},
    {"operator_calls", operator_calls, METH_NOARGS,
     "The number of calls of each operator that the kernels served so far."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
