// The operators of fusednorm/ops.py and gated.py, boxed, for graphs that were compiled, exported or
// traced. What the kernels do not do is handed to Python, whose implementation serves every device.
#include "own_operators.h"

#include <atomic>
#include <initializer_list>

#include "calls.h"
#include "cpu_launch.h"
#include "fallback.h"
#include "triton_launch.h"

namespace fusednorm {
namespace {

using boxed::Layout;
using boxed::Stack;
using boxed::Tensor;

// Each operator and its twin for compiled graphs.
constexpr const char* names_of[][2] = {{"layer_norm_fwd", "_layer_norm_fwd"},
                                       {"layer_norm_bwd", "_layer_norm_bwd"},
                                       {"gated_norm_fwd", "_gated_norm_fwd"},
                                       {"gated_norm_bwd", "_gated_norm_bwd"}};
constexpr int operators = 4;

constexpr const char* kinds[] = {"tTTTTTTTsfbfdDD", "TTTtTtTTTTTTsfbfddDm", "ttTTsifbbdD",
                                 "tttTTTTsifbbDm"};

// What serves the other calls; set before the first one, and read under Python's lock.
PyObject* others[operators];

// The backend that was asked for: it serves all calls of a device that it is not the usual one of.
enum Asked { nothing, triton, cuda };
std::atomic<Asked> asked{nothing};

std::atomic<int64_t> served[operators];

// What serves a kind of device; run returns false where Python is to serve the call.
struct OnCpu {
  using Backward = cpu::Backward;
  using GatedBackward = cpu::GatedBackward;
  static bool is_asked() { return asked.load(std::memory_order_relaxed) == nothing; }
  static bool run(ForwardCall<Layout>& call, AtenTensorHandle) {
    cpu::run(call.p);
    return true;
  }
  static bool run(BackwardCall<cpu::Backward, Layout>& call, AtenTensorHandle) {
    cpu::run(call.p, {call.dgate(), call.dweight(), call.dbias(), call.dscale(), call.dshift()});
    return true;
  }
  static bool run(GatedForwardCall<Layout>& call, AtenTensorHandle) {
    cpu::run(call.p);
    return true;
  }
  static bool run(GatedBackwardCall<cpu::GatedBackward, Layout>& call, AtenTensorHandle) {
    cpu::run(call.p, call.dweight(), call.dbias());
    return true;
  }
};

struct ByPlans {
  using Backward = fusednorm::Backward;
  using GatedBackward = fusednorm::GatedBackward;
  static bool is_asked() { return asked.load(std::memory_order_relaxed) != cuda; }
  template <class Call>
  static bool run(Call& call, AtenTensorHandle like) {
    return repeat(call, like);
  }
};

// Whether the kernels serve a call: its tensors, with which it begins, are where x is and, a seed
// aside, of dtypes that they have; and x ends with the normalized_shape, which comes next.
bool is_served(const Stack& stack, int x, int shape, int seed = -1) {
  const boxed::Device device = boxed::device_of(stack.tensor(x));
  for (int i = 0; i < shape; ++i) {
    const AtenTensorHandle tensor = stack.tensor(i);
    if (tensor == nullptr) continue;
    if (!(boxed::device_of(tensor) == device)) return false;
    if (i != seed && boxed::dtype_of(tensor) == DType::none) return false;
  }
  const boxed::Span sizes = boxed::sizes(stack.tensor(x));
  return sizes.count <= boxed::max_dims && stack.is_end_of(shape, sizes);
}

// Whether each of these is absent or a gate, scale or shift as the kernels take it.
bool are_terms(const Stack& stack, std::initializer_list<int> places) {
  for (int i : places)
    if (stack.tensor(i) && boxed::sizes(stack.tensor(i)).count != 2) return false;
  return true;
}

// Results are never absent: an empty tensor stands for each that there is none of.
template <size_t COUNT>
void finish(Stack& stack, Tensor (&&results)[COUNT], AtenTensorHandle like) {
  for (Tensor& result : results)
    if (!result) result = Layout::new_vector(like, 0, boxed::dtype_of(like));
  stack.finish(results);
}

// layer_norm_fwd(x, residual, gate, weight, bias, scale, shift, seed, normalized_shape, eps, rms,
//                dropout_p, out_dtype, h_dtype, x_hat_dtype)
template <class Where>
bool forward(Stack& stack) {
  if (!is_served(stack, 0, 8, 7) || !are_terms(stack, {2, 5, 6})) return false;
  const auto tensor = [&](int i) { return stack.tensor(i); };
  ForwardCall<Layout> call({tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5),
                            tensor(6), tensor(7), stack.count(8), stack.get<double>(9),
                            stack.get<bool>(10), stack.get<double>(11), stack.dtype(12),
                            stack.dtype(13), stack.dtype(14), true, true});
  if (!call.is_empty() && !Where::run(call, tensor(0))) return false;
  finish(stack, {std::move(call.z), std::move(call.h), std::move(call.mean), std::move(call.rstd)},
         tensor(0));
  return true;
}

// layer_norm_bwd(dz, dh, x, h, mean, rstd, gate, weight, bias, scale, shift, seed,
//                normalized_shape, eps, rms, dropout_p, x_dtype, residual_dtype, x_hat_dtype,
//                output_mask)
template <class Where>
bool backward(Stack& stack) {
  if (!is_served(stack, 3, 12, 11) || !are_terms(stack, {6, 9, 10})) return false;
  const auto tensor = [&](int i) { return stack.tensor(i); };
  const auto wanted = [&](int i) { return stack.item<bool>(19, i); };
  BackwardCall<typename Where::Backward, Layout> call(
      {tensor(0),
       tensor(1),
       tensor(2),
       tensor(3),
       tensor(4),
       tensor(5),
       tensor(6),
       tensor(7),
       tensor(8),
       tensor(9),
       tensor(10),
       tensor(11),
       stack.count(12),
       stack.get<double>(15),
       stack.dtype(16),
       stack.dtype(17),
       stack.dtype(18),
       {wanted(0), wanted(1), wanted(2), wanted(3), wanted(4), wanted(5), wanted(6)}});
  if (!call.is_empty() && !Where::run(call, tensor(3))) return false;
  auto& [dx, dresidual, dgate, dweight, dbias, dscale, dshift] = call.gradients;
  finish(stack,
         {std::move(dx), std::move(dresidual), std::move(dgate), std::move(dweight),
          std::move(dbias), std::move(dscale), std::move(dshift)},
         tensor(3));
  return true;
}

// gated_norm_fwd(x, gate_input, weight, bias, normalized_shape, group_size, eps, rms,
//                norm_before_gate, out_dtype, x_hat_dtype)
template <class Where>
bool gated_forward(Stack& stack) {
  if (!is_served(stack, 0, 4)) return false;
  const auto tensor = [&](int i) { return stack.tensor(i); };
  GatedForwardCall<Layout> call({tensor(0), tensor(1), tensor(2), tensor(3), stack.count(4),
                                 stack.get<int64_t>(5), stack.get<double>(6), stack.get<bool>(7),
                                 stack.get<bool>(8), stack.dtype(9), stack.dtype(10), true});
  if (!call.is_empty() && !Where::run(call, tensor(0))) return false;
  finish(stack, {std::move(call.z), std::move(call.mean), std::move(call.rstd)}, tensor(0));
  return true;
}

// gated_norm_bwd(dz, x, gate_input, mean, rstd, weight, bias, normalized_shape, group_size, eps,
//                rms, norm_before_gate, x_hat_dtype, output_mask)
template <class Where>
bool gated_backward(Stack& stack) {
  const auto tensor = [&](int i) { return stack.tensor(i); };
  if (!is_served(stack, 1, 7) || tensor(4) == nullptr) return false;
  const auto wanted = [&](int i) { return stack.item<bool>(13, i); };
  GatedBackwardCall<typename Where::GatedBackward, Layout> call(
      {tensor(0),
       tensor(1),
       tensor(2),
       tensor(3),
       tensor(4),
       tensor(5),
       tensor(6),
       stack.count(7),
       stack.get<int64_t>(8),
       stack.get<bool>(11),
       stack.dtype(12),
       {wanted(0), wanted(1), wanted(2), wanted(3)}});
  if (!call.is_empty() && !Where::run(call, tensor(1))) return false;
  auto& [dx, dgate_input, dweight, dbias] = call.gradients;
  finish(stack, {std::move(dx), std::move(dgate_input), std::move(dweight), std::move(dbias)},
         tensor(1));
  return true;
}

template <class Where, int WHICH>
void serve(StableIValue* values, uint64_t, uint64_t) {
  constexpr bool (*functions[])(Stack&) = {forward<Where>, backward<Where>, gated_forward<Where>,
                                           gated_backward<Where>};
  Stack stack(values, kinds[WHICH]);
  if (Where::is_asked() && functions[WHICH](stack))
    served[WHICH].fetch_add(1, std::memory_order_relaxed);
  else
    boxed::hand_on(stack, others[WHICH]);
}

// Never deleted: graphs hold what was registered.
template <class Where>
void implement(const char* key, int which) {
  using torch::stable::detail::StableLibrary;
  constexpr void (*kernels[])(StableIValue*, uint64_t, uint64_t) = {
      serve<Where, 0>, serve<Where, 1>, serve<Where, 2>, serve<Where, 3>};
  auto* const library =
      new StableLibrary(StableLibrary::Kind::IMPL, "fusednorm", key, __FILE__, __LINE__);
  for (const char* name : names_of[which]) library->impl(name, kernels[which]);
}

// register_own_operator(name, function)
PyObject* register_own(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&]() -> PyObject* {
    if (count != 2) throw std::runtime_error("register_own_operator: a name and a function");
    boxed::exchange();
    for (int i = 0; i < operators; ++i) {
      if (PyUnicode_CompareWithASCIIString(arguments[0], names_of[i][0]) != 0) continue;
      others[i] = shared(arguments[1]).release();
      implement<OnCpu>("CPU", i);
      implement<ByPlans>("CUDA", i);
    }
    Py_RETURN_NONE;
  });
}

PyObject* by_plans(PyObject*, PyObject* key) {
  return call([&]() -> PyObject* {
    const char* const text = PyUnicode_AsUTF8AndSize(key, nullptr);
    if (text == nullptr) throw Raised{};
    for (int i = 0; i < operators; ++i) implement<ByPlans>(text, i);
    Py_RETURN_NONE;
  });
}

PyObject* ask(PyObject*, PyObject* backend) {
  return call([&]() -> PyObject* {
    const auto is = [&](const char* name) {
      return backend != Py_None && PyUnicode_CompareWithASCIIString(backend, name) == 0;
    };
    asked.store(is("triton") ? triton : is("cuda") ? cuda : nothing);
    Py_RETURN_NONE;
  });
}

PyObject* calls(PyObject*, PyObject*) {
  return call([] {
    Ref counts(PyDict_New());
    for (int i = 0; i < operators; ++i) {
      const Ref count(PyLong_FromLongLong(served[i].load()));
      PyDict_SetItemString(counts.get(), names_of[i][0], count.get());
    }
    return counts.release();
  });
}

}  // namespace

PyMethodDef own_operator_methods[] = {
    {"register_own_operator", fast(register_own), METH_FASTCALL,
     "register_own_operator(name, function): serve one of fusednorm's operators, on the CPU by "
     "the\n"
     "kernels, on CUDA where a launch is repeated; the function serves the other calls. Nothing\n"
     "happens to an operator that is always Python's."},
    {"serve_by_plans", by_plans, METH_O,
     "serve_by_plans(key): repeat launches for the tensors of another dispatch key than CUDA."},
    {"ask", ask, METH_O, "ask(backend): the backend that was asked for, or None."},
    {"own_operator_calls", calls, METH_NOARGS,
     "The number of calls of each operator that the kernels served so far."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
