// The operators of fusednorm/ops.py for CPU tensors: lay out, allocate, share out among threads.
//
// Arguments have been checked in Python. Only torch's stable ABI and Python's limited API are used.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/layer_norm.h"

namespace {

using fusednorm::DType;
using fusednorm::Forward;
using fusednorm::Problem;
using fusednorm::Rows;
using fusednorm::Term;
using fusednorm::cpu::Backward;
using fusednorm::cpu::Fold;
using fusednorm::cpu::Kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using MaybeTensor = std::optional<Tensor>;

// Elements of work that are worth another thread.
constexpr int64_t grain = 16384;

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, "fusednorm: expected a float dtype, got ", toString(type));
  }
}

DType dtype_of(const std::optional<ScalarType>& type) {
  return type ? dtype_of(*type) : DType::none;
}

ScalarType scalar_type_of(DType compute) {
  return compute == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// What bench/cpu_speed.py showed to pay: outputs from this size on do not stay in cache, ..
constexpr size_t streamed_bytes = size_t(8) << 20;
// .. and from this one on are fresh memory, whose page faults take a large part of a call.
constexpr size_t huge_page_bytes = size_t(16) << 20;

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  if (bytes < huge_page_bytes) return;
  constexpr size_t huge = 2 << 20;
  const size_t start = (reinterpret_cast<size_t>(data) + huge - 1) / huge * huge;
  const size_t end = (reinterpret_cast<size_t>(data) + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type) {
  int64_t strides[64], stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

size_t size_of(const Tensor& tensor) {
  const DType dtype = dtype_of(tensor.scalar_type());
  return tensor.numel() * (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2);
}

Tensor empty_like(const Tensor& like, ScalarType type) {
  const Tensor tensor = empty(like.sizes().data(), like.dim(), type);
  advise_huge_pages(tensor.data_ptr(), size_of(tensor));
  return tensor;
}

Rows output(const Tensor& tensor, int64_t cols) {
  if (!tensor.defined()) return {};
  const bool beyond_cache = size_of(tensor) >= streamed_bytes;
  return {tensor.data_ptr(), cols, dtype_of(tensor.scalar_type()), beyond_cache};
}

// The tensors of one call as the kernels index them; holds the copies of those that they cannot.
class Layout {
 public:
  Layout(int64_t rows, int64_t cols) : rows_(rows), cols_(cols) {}

  // A tensor of M rows of N columns in whatever dimensions.
  Rows rows(const MaybeTensor& tensor) {
    if (!tensor) return {};
    if (const std::optional<int64_t> stride = row_stride(*tensor))
      return {tensor->data_ptr(), *stride, dtype_of(tensor->scalar_type())};
    return rows(copies_.emplace_back(torch::stable::contiguous(*tensor)));
  }

  // N elements in whatever dimensions.
  Term vector(const MaybeTensor& tensor) {
    if (!tensor) return {};
    if (tensor->is_contiguous())
      return {tensor->data_ptr(), 0, false, dtype_of(tensor->scalar_type())};
    return vector(copies_.emplace_back(torch::stable::contiguous(*tensor)));
  }

  // [1 or S, N or 1].
  Term term(const MaybeTensor& tensor) {
    if (!tensor) return {};
    const bool is_number = tensor->size(1) < cols_;
    if (!is_number && cols_ > 1 && tensor->stride(1) != 1)
      return term(copies_.emplace_back(torch::stable::contiguous(*tensor)));
    const int64_t samples = tensor->size(0);
    samples_ = std::max(samples_, samples);
    return {tensor->data_ptr(), samples == 1 ? 0 : tensor->stride(0), is_number,
            dtype_of(tensor->scalar_type())};
  }

  // S of the terms so far; 1 where none differs between samples.
  int64_t samples() const { return samples_; }

 private:
  // The distance of two rows, where they are evenly spaced and their columns adjacent.
  std::optional<int64_t> row_stride(const Tensor& tensor) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t d = tensor.dim() - 1, adjacent = 1;
    for (; adjacent < cols_; --d) {
      if (sizes[d] != 1 && strides[d] != adjacent) return std::nullopt;
      adjacent *= sizes[d];
    }
    std::optional<int64_t> stride;
    int64_t next = 0;
    for (; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (stride && strides[d] != next) return std::nullopt;
      if (!stride) stride = strides[d];
      next = strides[d] * sizes[d];
    }
    return stride.value_or(cols_);
  }

  int64_t rows_, cols_, samples_ = 1;
  std::vector<Tensor> copies_;
};

void set_dropout(Problem& problem, const MaybeTensor& seed, double p) {
  if (!seed) return;
  problem.dropout.seed = static_cast<const int64_t*>(seed->data_ptr());
  const double threshold = std::nearbyint(p * 4294967296.0);
  problem.dropout.drop_below = uint32_t(std::min(threshold, 4294967295.0));
  problem.dropout.inverse_keep = 1.0 / (1.0 - p);
}

DType compute_dtype(DType a, DType b) {
  return a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(
    Tensor x, MaybeTensor residual, MaybeTensor gate, MaybeTensor weight, MaybeTensor bias,
    MaybeTensor scale, MaybeTensor shift, MaybeTensor seed, int64_t rows, int64_t cols, double eps,
    bool rms, double dropout_p, ScalarType out_dtype, std::optional<ScalarType> h_dtype,
    std::optional<ScalarType> x_hat_dtype, bool save_stats, bool store_h) {
  Forward p;
  p.rows = rows;
  p.cols = cols;
  p.h_dtype = dtype_of(h_dtype);
  p.compute = compute_dtype(dtype_of(x.scalar_type()), p.h_dtype);

  const Tensor z = empty_like(x, out_dtype);
  const Tensor h = h_dtype && store_h ? empty_like(x, *h_dtype) : Tensor();
  const ScalarType compute = scalar_type_of(p.compute);
  const Tensor mean = save_stats && !rms ? empty(&rows, 1, compute) : Tensor();
  const Tensor rstd = save_stats ? empty(&rows, 1, compute) : Tensor();
  if (rows == 0 || cols == 0) return {z, h, mean, rstd};

  Layout layout(rows, cols);
  p.x = layout.rows(x);
  p.residual = layout.rows(residual);
  p.gate = layout.term(gate);
  p.weight = layout.vector(weight);
  p.bias = layout.vector(bias);
  p.scale = layout.term(scale);
  p.shift = layout.term(shift);
  p.rows_per_sample = rows / layout.samples();
  p.rms = rms;
  p.eps = eps;
  p.x_hat_dtype = dtype_of(x_hat_dtype);
  set_dropout(p, seed, dropout_p);
  p.z = output(z, cols);
  p.h = output(h, cols);
  if (mean.defined()) p.mean = mean.data_ptr();
  if (rstd.defined()) p.rstd = rstd.data_ptr();

  const Kernels& kernels = fusednorm::cpu::kernels();
  torch::stable::parallel_for(0, rows, divide_up(grain, cols), [&](int64_t first, int64_t last) {
    kernels.forward(p, first, last);
  });
  return {z, h, mean, rstd};
}

// The partial sums of one gradient: [count * rows, N] that are added up to [rows, N or 1].
class Partials {
 public:
  // `gradient` is undefined where it is not wanted.
  Partials(const Tensor& gradient, int64_t rows, int64_t partial_rows, const Problem& p) {
    if (!gradient.defined()) return;
    fold_ = {nullptr,
             p.cols,
             partial_rows / rows,
             p.compute,
             gradient.data_ptr(),
             gradient.numel() < rows * p.cols,
             dtype_of(gradient.scalar_type())};
    rows_ = rows;
    if (fold_.count == 1 && !fold_.is_number && fold_.dtype == p.compute) {
      data_ = fold_.out;  // nothing to add up, nothing to convert
      return;
    }
    const int64_t sizes[2] = {partial_rows, p.cols};
    tensor_ = empty(sizes, 2, scalar_type_of(p.compute));
    fold_.partials = data_ = tensor_->data_ptr();
  }

  void* data() const { return data_; }

  void fold(const Kernels& kernels) const {
    if (fold_.partials == nullptr) return;
    constexpr int64_t width = 1024;
    const int64_t blocks = fold_.is_number ? 1 : divide_up(fold_.cols, width);
    const int64_t elements = fold_.count * (fold_.is_number ? fold_.cols : width);
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t col = i % blocks * width;
        kernels.fold(fold_, i / blocks, col, std::min(col + width, fold_.cols));
      }
    };
    torch::stable::parallel_for(0, rows_ * blocks, divide_up(grain, elements), run);
  }

 private:
  Fold fold_;
  int64_t rows_ = 0;
  void* data_ = nullptr;
  std::optional<Tensor> tensor_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients layer_norm_bwd(MaybeTensor dz, MaybeTensor dh, MaybeTensor x, Tensor h, MaybeTensor mean,
                         Tensor rstd, MaybeTensor gate, MaybeTensor weight, MaybeTensor bias,
                         MaybeTensor scale, MaybeTensor shift, MaybeTensor seed, int64_t rows,
                         int64_t cols, double dropout_p, ScalarType x_dtype,
                         ScalarType residual_dtype, std::optional<ScalarType> x_hat_dtype,
                         bool want_dx, bool want_dresidual, bool want_dgate, bool want_dweight,
                         bool want_dbias, bool want_dscale, bool want_dshift) {
  const auto gradient = [&](const MaybeTensor& like, bool wanted) {
    return wanted && like ? empty_like(*like, like->scalar_type()) : Tensor();
  };
  const bool through_z = dz.has_value();
  const Tensor dx = want_dx ? empty_like(h, x_dtype) : Tensor();
  const Tensor dresidual = want_dresidual ? empty_like(h, residual_dtype) : Tensor();
  const Tensor dgate = gradient(gate, want_dgate);
  const Tensor dweight = gradient(weight, want_dweight && through_z);
  const Tensor dbias = gradient(bias, want_dbias && through_z);
  const Tensor dscale = gradient(scale, want_dscale && through_z);
  const Tensor dshift = gradient(shift, want_dshift && through_z);
  const Gradients gradients{dx, dresidual, dgate, dweight, dbias, dscale, dshift};
  if (rows == 0 || cols == 0) {
    std::apply(
        [](auto&... tensors) {
          for (Tensor tensor : {tensors...})
            if (tensor.defined()) torch::stable::zero_(tensor);
        },
        gradients);
    return gradients;
  }

  Layout layout(rows, cols);
  Backward p;
  p.rows = rows;
  p.cols = cols;
  p.compute = dtype_of(rstd.scalar_type());
  p.dz = layout.rows(dz);
  p.dh = layout.rows(dh);
  p.h = layout.rows(h);
  if (dgate.defined()) p.x = layout.rows(x);
  p.gate = layout.term(gate);
  p.weight = layout.vector(weight);
  p.bias = layout.vector(bias);
  p.scale = layout.term(scale);
  layout.term(shift);  // counts its samples
  p.rms = !mean.has_value();
  p.x_hat_dtype = dtype_of(x_hat_dtype);
  set_dropout(p, seed, dropout_p);
  p.mean = mean ? mean->data_ptr() : nullptr;
  p.rstd = rstd.data_ptr();
  p.dx = output(dx, cols);
  p.dresidual = output(dresidual, cols);

  const int64_t samples = layout.samples();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = std::clamp<int64_t>(rows * cols / grain, 1, threads);
  p.rows_per_sample = rows / samples;
  p.units_per_sample = std::min(divide_up(wanted, samples), p.rows_per_sample);
  p.units = samples * p.units_per_sample;
  p.tasks = std::min(wanted, p.units);

  const auto term_rows = [](const Tensor& tensor) { return tensor.defined() ? tensor.size(0) : 1; };
  const Partials partials[] = {{dweight, 1, p.tasks, p},
                               {dbias, 1, p.tasks, p},
                               {dgate, term_rows(dgate), p.units, p},
                               {dscale, term_rows(dscale), p.units, p},
                               {dshift, term_rows(dshift), p.units, p}};
  p.dweight = partials[0].data();
  p.dbias = partials[1].data();
  p.dgate = partials[2].data();
  p.dscale = partials[3].data();
  p.dshift = partials[4].data();

  const Kernels& kernels = fusednorm::cpu::kernels();
  torch::stable::parallel_for(
      0, p.tasks, 1, [&](int64_t first, int64_t last) { kernels.backward(p, first, last); });
  for (const Partials& gradient : partials) gradient.fold(kernels);
  return gradients;
}

PyObject* level(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "|s", &name)) return nullptr;
  if (name && !fusednorm::cpu::use_level(name))
    return PyErr_Format(PyExc_ValueError, "level: this processor cannot run '%s'", name);
  return PyUnicode_FromString(fusednorm::cpu::kernels().level);
}

PyMethodDef methods[] = {
    {"level", level, METH_VARARGS,
     "level(name=None): use the kernels for an instruction set, avx512, avx2 or portable;\n"
     "return the name of those in use."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusednorm, CPU, library) {
  library.impl("cpu_layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  library.impl("cpu_layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
