#include "triton_launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>

#include "fallback.h"
#include "python_calls.h"

namespace fusednorm {
namespace {

// As much of CUDA's driver as a launch takes, from the library that this process has.
struct Driver {
  struct Attribute {
    uint64_t id;
    unsigned value[16];
  };
  struct Config {
    unsigned grid[3], block[3], shared;
    void* stream;
    const Attribute* attributes;
    unsigned attribute_count;
  };
  int (*launch)(const Config*, void* function, void** arguments, void** extra);
  int (*current_context)(void**);
  int (*current_device)(int*);
  int (*describe)(int error, const char** text);
};

const Driver& driver() {
  static const Driver driver = [] {
    void* const library = dlopen("libcuda.so.1", RTLD_LAZY);
    Driver found{};
    const auto find = [&](const char* name, auto& function) {
      void* const symbol = library ? dlsym(library, name) : nullptr;
      if (symbol == nullptr)
        throw std::runtime_error(std::string("no ") + name + " in libcuda.so.1");
      function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    };
    find("cuLaunchKernelEx", found.launch);
    find("cuCtxGetCurrent", found.current_context);
    find("cuCtxGetDevice", found.current_device);
    find("cuGetErrorString", found.describe);
    return found;
  }();
  return driver;
}

// An argument of a kernel: the pointer of that index plus `word`, or `word` where it is negative.
// Pointers are counted in the order of the launcher's tensors, then its results, then the scratch.
struct Argument {
  int pointer;
  uint64_t word;
};

struct Start {
  void* function;
  std::string name;
  unsigned grid[3], threads, shared;
  std::vector<Argument> arguments;
  std::vector<Driver::Attribute> attributes;
};

struct Plan {
  std::vector<Start> starts;
  int64_t scratch;  // elements of the compute dtype
  Ref kernels;      // keeps the functions loaded
};

// All that a launcher decides by: whatever differs here may differ in what it launches.
class Key {
 public:
  void put(uint64_t word) { words_[count_++] = word; }
  void put(double value) {
    uint64_t word;
    std::memcpy(&word, &value, sizeof word);
    put(word);
  }
  // Triton compiles by whether there is a pointer, its dtype, and whether it is aligned.
  void pointer(const void* pointer, DType dtype = DType::none) {
    const uint64_t aligned = reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    put(pointer ? uint64_t(dtype) << 2 | aligned << 1 | 1 : uint64_t(0));
  }
  void put(const Rows& rows) {
    pointer(rows.data, rows.dtype);
    put(uint64_t(rows.stride));
    for (const Jump& jump : rows.jumps) {
      put(uint64_t(jump.every));
      if (jump.every == 0) break;
      put(uint64_t(jump.by));
    }
  }
  void put(const Term& term) {
    pointer(term.data, term.dtype);
    put(uint64_t(term.stride) << 1 | uint64_t(term.is_number));
  }
  void put(const Problem& p) {
    for (int64_t size : {p.rows, p.cols, p.rows_per_sample}) put(uint64_t(size));
    put(uint64_t(p.rms) << 16 | uint64_t(p.compute) << 8 | uint64_t(p.x_hat_dtype));
    pointer(p.dropout.seed);
    put(uint64_t(p.dropout.drop_below));
    put(p.dropout.inverse_keep);
    for (const Term* term : {&p.gate, &p.weight, &p.bias, &p.scale}) put(*term);
  }

  void put(const Gated& p) {
    put(static_cast<const Problem&>(p));
    put(uint64_t(p.group_size) << 1 | uint64_t(p.gate_first));
    for (const Rows* rows : {&p.x, &p.gate_input}) put(*rows);
  }

  std::string str() const {
    return std::string(reinterpret_cast<const char*>(words_), count_ * sizeof *words_);
  }

 private:
  uint64_t words_[96];
  size_t count_ = 0;
};

using Plans = std::unordered_map<std::string, std::shared_ptr<const Plan>>;

// As many as a process of variable batches may need at a time; a plan is about a kilobyte.
constexpr size_t MOST_PLANS = 4096;

Plans& plans() {
  static Plans& plans = *new Plans;  // as names()
  return plans;
}

std::mutex& plans_lock() {
  static std::mutex& lock = *new std::mutex;
  return lock;
}

// Takes all of them out, to be deleted where nobody waits for them.
Plans take_plans() {
  const std::lock_guard<std::mutex> guard(plans_lock());
  return std::exchange(plans(), Plans());
}

// A plan may outlive its place among the others in a thread that has not Python's lock.
void delete_plan(const Plan* plan) {
  const boxed::WithGil locked;
  delete plan;
}

// The plan for a key; null where there is none, or on a thread that Triton has to prepare.
std::shared_ptr<const Plan> find(const std::string& key) {
  std::shared_ptr<const Plan> plan;
  {
    const std::lock_guard<std::mutex> guard(plans_lock());
    const auto found = plans().find(key);
    if (found != plans().end()) plan = found->second;
  }
  void* context = nullptr;
  if (!plan || driver().current_context(&context) != 0 || context == nullptr) return nullptr;
  return plan;
}

void start(const Start& s, const void* const* pointers, void* stream) {
  std::vector<uint64_t> words(s.arguments.size());
  std::vector<void*> addresses(s.arguments.size());
  for (size_t i = 0; i < words.size(); ++i) {
    const Argument& argument = s.arguments[i];
    words[i] = argument.word;
    if (argument.pointer >= 0) words[i] += reinterpret_cast<uintptr_t>(pointers[argument.pointer]);
    addresses[i] = &words[i];
  }
  const Driver::Config config{
      {s.grid[0], s.grid[1], s.grid[2]}, {s.threads, 1, 1}, s.shared, stream, s.attributes.data(),
      unsigned(s.attributes.size())};
  const int error = driver().launch(&config, s.function, addresses.data(), nullptr);
  if (error == 0) return;
  const char* text = nullptr;
  driver().describe(error, &text);
  const auto size = [&](int i) { return std::to_string(s.grid[i]); };
  throw std::runtime_error(s.name + ": expected the driver to launch a grid of (" + size(0) + ", " +
                           size(1) + ", " + size(2) + "), got " +
                           (text ? text : "error " + std::to_string(error)));
}

// A call to be repeated: what its plan is found by, and its pointers in the order of `Argument`, of
// which the last one is that of the scratch.
template <size_t COUNT>
struct Request {
  std::string key;
  const void* pointers[COUNT];
};

template <class Layout>
Request<13> request(const ForwardCall<Layout>& call, uint64_t device) {
  const Forward& p = call.p;
  Key key;
  key.put(device << 2);
  key.put(static_cast<const Problem&>(p));
  key.put(p.eps);
  key.put(p.shift);
  key.put(uint64_t(p.h_dtype));
  for (const Rows* rows : {&p.x, &p.residual, &p.z, &p.h}) key.put(*rows);
  for (const void* pointer : {p.mean, p.rstd}) key.pointer(pointer);
  return {key.str(),
          {p.x.data, p.residual.data, p.gate.data, p.weight.data, p.bias.data, p.scale.data,
           p.shift.data, p.dropout.seed, p.z.data, p.h.data, p.mean, p.rstd, nullptr}};
}

template <class Layout>
Request<20> request(BackwardCall<Backward, Layout>& call, uint64_t device) {
  const Backward& p = call.p;
  const Term dgate = call.dgate(), dweight = call.dweight(), dbias = call.dbias(),
             dscale = call.dscale(), dshift = call.dshift();
  Key key;
  key.put(device << 2 | 1);
  key.put(static_cast<const Problem&>(p));
  for (const Rows* rows : {&p.dz, &p.dh, &p.x, &p.h, &p.dx, &p.dresidual}) key.put(*rows);
  for (const void* pointer : {p.mean, p.rstd}) key.pointer(pointer);
  for (const Term* gradient : {&dgate, &dweight, &dbias, &dscale, &dshift}) key.put(*gradient);
  return {key.str(), {p.dz.data,    p.dh.data,      p.x.data,      p.h.data,         p.mean,
                      p.rstd,       p.gate.data,    p.weight.data, p.bias.data,      p.scale.data,
                      nullptr,      p.dropout.seed, p.dx.data,     p.dresidual.data, dgate.data,
                      dweight.data, dbias.data,     dscale.data,   dshift.data,      nullptr}};
}

template <class Layout>
Request<8> request(const GatedForwardCall<Layout>& call, uint64_t device) {
  const GatedForward& p = call.p;
  Key key;
  key.put(device << 2 | 2);
  key.put(static_cast<const Gated&>(p));
  key.put(p.eps);
  key.put(p.z);
  for (const void* pointer : {p.mean, p.rstd}) key.pointer(pointer);
  return {
      key.str(),
      {p.x.data, p.gate_input.data, p.weight.data, p.bias.data, p.z.data, p.mean, p.rstd, nullptr}};
}

template <class Layout>
Request<12> request(GatedBackwardCall<GatedBackward, Layout>& call, uint64_t device) {
  const GatedBackward& p = call.p;
  const Term dweight = call.dweight(), dbias = call.dbias();
  Key key;
  key.put(device << 2 | 3);
  key.put(static_cast<const Gated&>(p));
  for (const Rows* rows : {&p.dz, &p.dx, &p.dgate_input}) key.put(*rows);
  for (const void* pointer : {p.mean, p.rstd}) key.pointer(pointer);
  for (const Term* gradient : {&dweight, &dbias}) key.put(*gradient);
  return {key.str(),
          {p.dz.data, p.x.data, p.gate_input.data, p.mean, p.rstd, p.weight.data, p.bias.data,
           p.dx.data, p.dgate_input.data, dweight.data, dbias.data, nullptr}};
}

// Allocates the scratch of a plan, which lives until its kernels have been started.
template <class Layout, size_t COUNT>
typename Layout::Owned new_scratch(const Plan& plan, Request<COUNT>& request,
                                   typename Layout::Tensor like, DType compute) {
  typename Layout::Owned scratch;
  if (plan.scratch > 0) scratch = Layout::new_vector(like, plan.scratch, compute);
  if (scratch) request.pointers[COUNT - 1] = Layout::address(scratch.get());
  return scratch;
}

// Repeats a call from Python. Returns what the launcher returns, or the key if there is no plan.
template <class Call>
PyObject* repeat_from_python(Call&& call, PyObject* device, PyObject* stream_address,
                             PyObject* like) {
  if (call.is_empty()) return outputs(call);
  auto request = fusednorm::request(call, uint64_t(integer(device)));
  const std::shared_ptr<const Plan> plan = find(request.key);
  if (!plan) return PyBytes_FromStringAndSize(request.key.data(), Py_ssize_t(request.key.size()));
  void* const stream = PyLong_AsVoidPtr(stream_address);
  const Ref scratch = new_scratch<Layout>(*plan, request, like, call.p.compute);
  {
    const WithoutGil released;
    for (const Start& s : plan->starts) start(s, request.pointers, stream);
  }
  return outputs(call);
}

// triton_forward(device, stream, ..)
PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    const ForwardCall<Layout> call(read_forward(arguments + 2, count - 2));
    return repeat_from_python(call, arguments[0], arguments[1], arguments[2]);
  });
}

// triton_backward(device, stream, ..)
PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    BackwardCall<Backward, Layout> call(read_backward(arguments + 2, count - 2));
    return repeat_from_python(call, arguments[0], arguments[1], arguments[5]);
  });
}

// triton_gated_forward(device, stream, ..)
PyObject* gated_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    const GatedForwardCall<Layout> call(read_gated_forward(arguments + 2, count - 2));
    return repeat_from_python(call, arguments[0], arguments[1], arguments[2]);
  });
}

// triton_gated_backward(device, stream, ..)
PyObject* gated_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return call([&] {
    GatedBackwardCall<GatedBackward, Layout> call(read_gated_backward(arguments + 2, count - 2));
    return repeat_from_python(call, arguments[0], arguments[1], arguments[3]);
  });
}

// Whether somebody has asked Triton to tell him of launches.
bool somebody_listens() {
  static const Ref& runtime = *new Ref(
      member(Ref(PyImport_ImportModule("triton.knobs")), "runtime"));  // never deleted, as names()
  for (const char* hook : {"launch_enter_hook", "launch_exit_hook"})
    if (flag(member(member(runtime, hook), "calls").get())) return true;
  return false;
}

// Finds the stream that torch launches on; false where that cannot be known. A tensor of the CPU's
// is one of a device that is not there.
bool current_stream(boxed::Device device, void*& stream) {
  stream = nullptr;
  if (device.type == aoti_torch_device_type_cpu()) return true;
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = reinterpret_cast<Function>([]() -> void* {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  }());
  return function && function(device.index, &stream) == AOTI_TORCH_SUCCESS;
}

template <class Call>
bool repeat_boxed(Call& call, AtenTensorHandle like) {
  const boxed::Device device = boxed::device_of(like);
  const int index = std::max(device.index, 0);
  auto request = fusednorm::request(call, uint64_t(index));
  const std::shared_ptr<const Plan> plan = find(request.key);
  int current = -1;
  void* stream;
  if (!plan || driver().current_device(&current) != 0 || current != index ||
      !current_stream(device, stream) || boxed::locked(somebody_listens))
    return false;
  const auto scratch = new_scratch<boxed::Layout>(*plan, request, like, call.p.compute);
  for (const Start& s : plan->starts) start(s, request.pointers, stream);
  return true;
}

Ref element(PyObject* sequence, Py_ssize_t i) { return Ref(PySequence_GetItem(sequence, i)); }

unsigned small(const Ref& number) { return unsigned(integer(number.get())); }

// (function, name, grid, threads, shared, arguments, attributes)
Start read_start(PyObject* given) {
  Start s{};
  s.function = PyLong_AsVoidPtr(element(given, 0).get());
  Py_ssize_t length = 0;
  const Ref name = element(given, 1), grid = element(given, 2), arguments = element(given, 5);
  const char* const text = PyUnicode_AsUTF8AndSize(name.get(), &length);
  if (text == nullptr) throw Raised{};
  s.name.assign(text, size_t(length));
  for (int i = 0; i < 3; ++i) s.grid[i] = small(element(grid.get(), i));
  s.threads = small(element(given, 3));
  s.shared = small(element(given, 4));
  for (Py_ssize_t i = 0; i < PySequence_Size(arguments.get()); ++i) {
    const Ref argument = element(arguments.get(), i);
    s.arguments.push_back({int(integer(element(argument.get(), 0).get())),
                           PyLong_AsUnsignedLongLong(element(argument.get(), 1).get())});
  }
  const Ref attributes = element(given, 6);
  for (Py_ssize_t i = 0; i < PySequence_Size(attributes.get()); ++i) {
    const Ref attribute = element(attributes.get(), i), value = element(attribute.get(), 1);
    Driver::Attribute read{uint64_t(integer(element(attribute.get(), 0).get())), {}};
    for (Py_ssize_t j = 0; j < std::min<Py_ssize_t>(PySequence_Size(value.get()), 16); ++j)
      read.value[j] = small(element(value.get(), j));
    s.attributes.push_back(read);
  }
  if (PyErr_Occurred()) throw Raised{};
  return s;
}

// triton_keep(key, starts, scratch, kernels)
PyObject* keep(PyObject*, PyObject* const* arguments, Py_ssize_t) {
  return call([&]() -> PyObject* {
    const std::shared_ptr<Plan> plan(new Plan, delete_plan);
    for (Py_ssize_t i = 0; i < PySequence_Size(arguments[1]); ++i)
      plan->starts.push_back(read_start(element(arguments[1], i).get()));
    plan->scratch = integer(arguments[2]);
    plan->kernels = shared(arguments[3]);
    char* words = nullptr;
    Py_ssize_t length = 0;
    if (PyBytes_AsStringAndSize(arguments[0], &words, &length) < 0) throw Raised{};
    const Plans old = plans().size() >= MOST_PLANS ? take_plans() : Plans();
    const std::lock_guard<std::mutex> guard(plans_lock());
    plans()[std::string(words, size_t(length))] = plan;
    Py_RETURN_NONE;
  });
}

PyObject* forget(PyObject*, PyObject*) {
  take_plans();
  Py_RETURN_NONE;
}

}  // namespace

bool repeat(ForwardCall<boxed::Layout>& call, AtenTensorHandle like) {
  return repeat_boxed(call, like);
}

bool repeat(BackwardCall<Backward, boxed::Layout>& call, AtenTensorHandle like) {
  return repeat_boxed(call, like);
}

bool repeat(GatedForwardCall<boxed::Layout>& call, AtenTensorHandle like) {
  return repeat_boxed(call, like);
}

bool repeat(GatedBackwardCall<GatedBackward, boxed::Layout>& call, AtenTensorHandle like) {
  return repeat_boxed(call, like);
}

PyMethodDef triton_methods[] = {
    {"triton_forward", fast(forward), METH_FASTCALL,
     "Repeat a forward; see fusednorm/triton_kernels/plans.py."},
    {"triton_backward", fast(backward), METH_FASTCALL,
     "Repeat a backward; see fusednorm/triton_kernels/plans.py."},
    {"triton_gated_forward", fast(gated_forward), METH_FASTCALL,
     "Repeat a gated forward; see fusednorm/triton_kernels/plans.py."},
    {"triton_gated_backward", fast(gated_backward), METH_FASTCALL,
     "Repeat a gated backward; see fusednorm/triton_kernels/plans.py."},
    {"triton_keep", fast(keep), METH_FASTCALL,
     "triton_keep(key, starts, scratch, kernels): what to repeat from now on."},
    {"triton_forget", forget, METH_NOARGS, "Forget all that was kept."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fusednorm
