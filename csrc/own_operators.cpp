// The operators of fusednorm/ops.py, boxed, for graphs that were compiled, exported or traced. What
// the kernels do not do is handed to Python, whose implementation serves every device.
#include "own_operators.h"

#include <atomic>

#include "calls.h"
#include "cpu_launch.h"
#include "fallback.h"
#include "triton_launch.h"

namespace fusednorm {
namespace {

using boxed::Layout;
using boxed::Stack;
using boxed::Tensor;

// What serves the other calls; set before the first one, and read under Python's lock.
PyObject* others[2];

constexpr const char* kinds[] = {"tTTTTTTTsfbfdDD", "TTTtTtTTTTTTsfbfddDm"};

// The backend that was asked for: it serves all calls of a device that it is not the usual one of.
enum Asked { nothing, triton, cuda };
std::atomic<Asked> asked{nothing};

std::atomic<int64_t> served[2];

// What serves a kind of device; run returns false where Python is to serve the call.
struct OnCpu {
  using Backward = cpu::Backward;
  static bool is_asked() { return asked.load(std::memory_order_relaxed) == nothing; }
  static bool run(ForwardCall<Layout>& call, AtenTensorHandle) {
    cpu::run(call.p);
    return true;
  }
  static bool run(BackwardCall<cpu::Backward, Layout>& call, AtenTensorHandle) {
    cpu::run(call.p, {call.dgate(), call.dweight(), call.dbias(), call.dscale(), call.dshift()});
    return true;
  }
};

struct ByPlans {
  using Backward = fusednorm::Backward;
  static bool is_asked() { return asked.load(std::memory_order_relaxed) != cuda; }
  template <class Call>
  static bool run(Call& call, AtenTensorHandle like) {
    return repeat(call, like);
  }
};

// Whether the kernels serve a call: all of its tensors, with which it begins, are where x is, of
// dtypes that they have, and x ends with the normalized_shape, which comes next.
bool is_served(const Stack& stack, int x, int terms, int seed) {
  const int shape = seed + 1;
  const boxed::Device device = boxed::device_of(stack.tensor(x));
  for (int i = 0; i <= seed; ++i) {
    const AtenTensorHandle tensor = stack.tensor(i);
    if (tensor == nullptr) continue;
    if (!(boxed::device_of(tensor) == device)) return false;
    if (i != seed && boxed::dtype_of(tensor) == DType::none) return false;
    const bool is_term = i == terms || (i >= terms + 3 && i < seed);
    if (is_term && boxed::sizes(tensor).count != 2) return false;
  }
  const boxed::Span sizes = boxed::sizes(stack.tensor(x));
  return sizes.count <= boxed::max_dims && stack.is_end_of(shape, sizes);
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
  if (!is_served(stack, 0, 2, 7)) return false;
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
  if (!is_served(stack, 3, 6, 11)) return false;
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

template <class Where, int WHICH>
void serve(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values, kinds[WHICH]);
  if (Where::is_asked() && (WHICH == 0 ? forward<Where>(stack) : backward<Where>(stack)))
    served[WHICH].fetch_add(1, std::memory_order_relaxed);
  else
    boxed::hand_on(stack, others[WHICH]);
}

// Never deleted: graphs hold what was registered.
template <class Where>
void implement(const char* key) {
  using torch::stable::detail::StableLibrary;
  auto* const library =
      new StableLibrary(StableLibrary::Kind::IMPL, "fusednorm", key, __FILE__, __LINE__);
  for (const char* name : {"layer_norm_fwd", "_layer_norm_fwd"})
    library->impl(name, serve<Where, 0>);
  for (const char* name : {"layer_norm_bwd", "_layer_norm_bwd"})
    library->impl(name, serve<Where, 1>);
}

// register_own_operators(forward, backward)
PyObject* register_own(PyObject*, PyObject* const* functions, Py_ssize_t count) {
  return call([&]() -> PyObject* {
    if (count != 2) throw std::runtime_error("register_own_operators: two functions");
    for (int i = 0; i < 2; ++i) others[i] = shared(functions[i]).release();
    boxed::exchange();
    implement<OnCpu>("CPU");
    implement<ByPlans>("CUDA");
    Py_RETURN_NONE;
  });
}

PyObject* by_plans(PyObject*, PyObject* key) {
  return call([&]() -> PyObject* {
    const char* const text = PyUnicode_AsUTF8AndSize(key, nullptr);
    if (text == nullptr) throw Raised{};
    implement<ByPlans>(text);
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
  return Py_BuildValue("{sLsL}", "layer_norm_fwd", served[0].load(), "layer_norm_bwd",
                       served[1].load());
}

}  // namespace

PyMethodDef own_operator_methods[] = {
    {"register_own_operators", fast(register_own), METH_FASTCALL,
     "register_own_operators(forward, backward): serve fusednorm's operators, on the CPU by the\n"
     "kernels, on CUDA where a launch is repeated; the functions serve the others."},
    {"serve_by_plans", by_plans, METH_O,
     "serve_by_plans(key): repeat launches for the tensors of another dispatch key than CUDA."},
    {"ask", ask, METH_O, "ask(backend): the backend that was asked for, or None."},
    {"own_operator_calls", calls, METH_NOARGS,
     "The number of calls of each operator that the kernels served so far."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
